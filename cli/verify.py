"""Compare a bundle's images with diffusers' own, stage by stage.

Loads with diffusers what the bundle was made of, draws the same prompts and seeds with both, and prints how far text,
each step's latents, decoder and image are apart. Writes each pair side by side with its difference: ours, diffusers',
the difference at full contrast. A bundle's ControlNets draw more, along a few lines, each alone and all together.
Ends with exit code 1 where an image is further off than the threshold.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import BUNDLE_HELP, add_backend, folder

if TYPE_CHECKING:
    from rich.table import Table

    from ..tools.verification import Comparison


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which bundle, which prompts, and how close is close enough."""
    parser.add_argument("bundle", type=folder, help=BUNDLE_HELP)
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times (default: two)")
    parser.add_argument("--seed", type=int, default=0, help="of the first image (default: 0)")
    parser.add_argument("--steps", type=int, metavar="N", help="default: the checkpoint's own")
    parser.add_argument("--min-psnr", type=float, metavar="DB", help="default: 60 for fp32, 30 for fp16 and bf16")
    add_backend(parser, "what draws the bundle's images, as for `hypersd generate` (default: auto)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for the pairs (default: BUNDLE-verify)")


def run(args: argparse.Namespace) -> None:
    """Compare, print, write, judge."""
    import dataclasses
    import math

    from ..errors import RequestError
    from ..runtime import Pipeline
    from ..tools import verification
    from .console import DownloadBar, err, out, spinner
    from .image_output import write_png

    with spinner(f"loading {args.bundle}"):
        pipe = Pipeline.load(args.bundle, args.backend, precision=args.precision)
    threshold = verification.find_threshold(pipe)
    if args.min_psnr is not None:
        if not math.isfinite(args.min_psnr):
            raise RequestError(f"--min-psnr {args.min_psnr}: expected a number of decibels")
        threshold = dataclasses.replace(threshold, psnr=args.min_psnr)
    folder = args.out or args.bundle.with_name(f"{args.bundle.resolve().name}-verify")
    console, comparisons = out(), []
    prompts = args.prompt or verification.PROMPTS
    images: list[tuple[str, int, list[str]]] = [(prompt, args.seed + i, []) for i, prompt in enumerate(prompts)]
    names, followed = list(pipe.manifest.controlnets), verification.control_image(pipe.manifest)
    images += [(prompts[0], args.seed, [name]) for name in names]
    images += [(prompts[0], args.seed, names)] if len(names) > 1 else []
    err().print("loading what the bundle was made of with diffusers")
    reference = verification.load_reference(pipe.manifest, DownloadBar(err()))
    for i, (prompt, seed, controlnets) in enumerate(images):
        with spinner(f"drawing image {i + 1} of {len(images)} with both"):
            comparison = verification.compare(
                pipe, reference, prompt, seed, args.steps, dict.fromkeys(controlnets, followed)
            )
        path = folder / f"pair-{i}.png"
        write_png(path, verification.side_by_side(comparison), {"prompt": comparison.prompt, "seed": comparison.seed})
        control = f", with {' and '.join(comparison.controlnets)}" if comparison.controlnets else ""
        line = f"\n{comparison.prompt!r}, seed {comparison.seed}{control}: {path}"
        console.print(line, markup=False, soft_wrap=True)
        console.print(_table(comparison))
        comparisons.append(comparison)
    verification.check_thresholds(comparisons, threshold)
    console.print(
        f"all {len(comparisons)} images are diffusers' own: at least {threshold.psnr:g} dB, "
        f"largest error at most {threshold.largest:g} of full scale",
        markup=False,
    )


def _table(comparison: Comparison) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("stage", "PSNR dB", "SSIM", "mean error", "largest error"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for difference in comparison.differences:
        table.add_row(
            difference.stage,
            f"{difference.psnr:.1f}",
            "" if difference.ssim is None else f"{difference.ssim:.6f}",
            f"{difference.mean:.1e}",
            f"{difference.largest:.1e}",
        )
    return table
