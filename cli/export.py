"""Export a checkpoint to a bundle.

Downloads what is missing, fuses the LoRA into the UNet, traces every network to ONNX, checks each against torch on
ONNX Runtime, and writes the bundle. Interrupted, it goes on where it stopped; done, it says so.

Weights come from the Hub (HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE and HF_HOME hold) or from local files.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to export, from what, how and where to."""
    parser.add_argument("--ckpt", required=True, metavar="NAME", help="a checkpoint that `hypersd list` shows")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="the bundle (default: bundles/NAME)")
    parser.add_argument("--replace", action="store_true", help="replace a bundle made from other inputs")
    sources = parser.add_argument_group("sources")
    sources.add_argument(
        "--base",
        metavar="WHERE",
        help="Hub repository, diffusers folder or single-file checkpoint (default: the checkpoint's)",
    )
    sources.add_argument("--revision", help="branch, tag or commit of --base on the Hub")
    sources.add_argument("--variant", choices=["fp16"], help="take the base's half-size weight files")
    sources.add_argument(
        "--lora", metavar="FILE", help="local file instead of the Hub's (for the one-step UNet: that UNet's file)"
    )
    sources.add_argument(
        "--lora-scale", type=float, default=1.0, metavar="X", help="its strength, such as 0.8 (default: 1)"
    )
    sources.add_argument(
        "--vae",
        metavar="WHERE",
        help="Hub repository or folder; `tiny` for TAESD (default: the base's; fixed one for fp16 SDXL)",
    )
    form = parser.add_argument_group("bundle")
    form.add_argument("--precision", choices=["fp16", "fp32"], default="fp16", help="of all networks (default: fp16)")
    form.add_argument("--height", type=int, metavar="PIXELS", help="default: what the base was trained for")
    form.add_argument("--width", type=int, metavar="PIXELS", help="default: what the base was trained for")
    form.add_argument("--batch", type=int, metavar="N", help="pictures per run of a network (default: 1)")
    form.add_argument(
        "--dynamic",
        nargs="*",
        metavar="DIM=MIN:OPT:MAX",
        help="let batch, height or width vary; with no values all three: batch 1 to 4, sides half to one and a half",
    )


def run(args: argparse.Namespace) -> None:
    """Export, and say what to do next."""
    from ..export.checkpoints import find_checkpoint
    from ..export.shapes import ShapeOptions, parse_dynamic
    from .console import StageLines, out

    find_checkpoint(args.ckpt)  # a misspelt name is answered at once, before torch is loaded
    dynamic = None if args.dynamic is None else dict(map(parse_dynamic, args.dynamic))
    began = time.perf_counter()
    from ..export.exporter import ExportOptions, export_bundle
    from ..export.sources import SourceOptions

    options = ExportOptions(
        sources=SourceOptions(
            base=args.base, revision=args.revision, variant=args.variant, lora=args.lora, vae=args.vae
        ),
        shapes=ShapeOptions(batch=args.batch, height=args.height, width=args.width, dynamic=dynamic),
        precision=args.precision,
        lora_scale=args.lora_scale,
        replace=args.replace,
    )
    bundle = export_bundle(args.ckpt, args.out, options, StageLines())
    size = sum(record.size for record in bundle.manifest.files.values())
    console = out()
    console.print(f"bundle {bundle.root}: {size / 1e6:,.1f} MB, in {time.perf_counter() - began:.1f} s", markup=False)
    console.print(f'draw with: hypersd generate {bundle.root} "a photo of a cat"', markup=False, soft_wrap=True)
