"""Export a checkpoint to a bundle.

Downloads missing files, fuses the LoRAs into UNet and text encoders, traces every component to ONNX, compares each with
torch on ONNX Runtime, and writes the bundle; then builds TensorRT engines if TensorRT is installed (--backend). An
interrupted export continues where it stopped.

Weights come from the Hub (HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE and HF_HOME apply) or from local files; the clone
contains the weights of the demonstration checkpoints. --random-weights downloads nothing: `hypersd bench` then shows
the cost of a checkpoint on this machine before you download it.
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from ..engines.precision import PRECISIONS
from ..engines.vocabulary import TENSORRT_BACKENDS
from .arguments import add_engine_options, build_command, folder, option_words, quoted, size, span_type

if TYPE_CHECKING:
    from ..engines import BuildOptions, Bundle
    from ..export.checkpoints import Checkpoint
    from ..export.exporter import ExportOptions
    from ..export.lora_slot import SlotOptions
    from .build import Builder
    from .console import StageLines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the checkpoint, its sources, the form of the bundle and the options of engines."""
    parser.add_argument("--ckpt", required=True, metavar="NAME", help="a checkpoint that `hypersd list` shows")
    parser.add_argument(
        "--out",
        type=folder,
        metavar="FOLDER",
        help="the bundle (default: bundles/NAME, with random weights NAME-random)",
    )
    parser.add_argument("--replace", action="store_true", help="replace a bundle made from other inputs")
    _add_sources(parser.add_argument_group("sources"))
    _add_form(parser.add_argument_group("bundle"))
    _add_extras(parser.add_argument_group("additions"))
    add_engine_options(parser)


def _add_sources(group: argparse._ArgumentGroup) -> None:
    words = "Hub repository, diffusers folder or single-file checkpoint (default: the checkpoint's)"
    group.add_argument("--base", metavar="WHERE", help=words)
    group.add_argument("--revision", help="branch, tag or commit of --base on the Hub")
    group.add_argument("--variant", choices=["fp16"], help="take the base's half-size weight files, where it has them")
    group.add_argument(
        "--lora",
        metavar="FILE",
        help="local file instead of the published one, a LoRA in any layout (for the one-step UNet: that UNet)",
    )
    group.add_argument(
        "--lora-scale", type=float, default=1.0, metavar="X", help="strength of the LoRA, such as 0.8 (default: 1)"
    )
    group.add_argument(
        "--add-lora",
        action="append",
        default=[],
        metavar="WHERE[:SCALE]",
        help="one more LoRA, for UNet and text encoders: file, folder, Hub repository or OWNER/NAME/FILE; SCALE is its "
        "strength (default: 1); may be given more than once",
    )
    group.add_argument(
        "--vae",
        metavar="WHERE",
        help="Hub repository, folder or file; `tiny` for TAESD (default: the base's; for fp16 of published SDXL "
        "a repaired one)",
    )
    group.add_argument(
        "--controlnet",
        action="append",
        default=[],
        metavar="WHERE",
        help="Hub repository, folder or file of a ControlNet for the bundle, or NAME=WHERE; may be repeated",
    )
    group.add_argument(
        "--random-weights",
        action="store_true",
        help="download nothing: random weights in the published architecture, for measurements; images are noise",
    )


def _add_form(group: argparse._ArgumentGroup) -> None:
    words = "fp16 (default), fp32, or int8: fp16, with the weights of the UNet's linear layers in 8 bits"
    group.add_argument("--precision", choices=[*PRECISIONS], default="fp16", help=words)
    group.add_argument(
        "--size", type=size, metavar="WxH", help="width and height in pixels (default: the base's training size)"
    )
    group.add_argument("--batch", type=int, metavar="N", help="images per run of a component (default: 1)")
    group.add_argument(
        "--text-only",
        action="store_true",
        help="text to image alone: leave out the VAE's encoder, which init images need (--image)",
    )
    group.add_argument(
        "--lora-slot",
        type=int,
        metavar="RANK",
        help="let the bundle take LoRA files at run time, whose ranks add up to RANK, such as 32 (generate --use-lora)",
    )
    group.add_argument(
        "--lora-slot-text", action="store_true", help="let the text encoders take them too, not the UNet alone"
    )
    group.add_argument(
        "--dynamic",
        nargs="*",
        type=span_type(),
        metavar="DIM=MIN:OPT:MAX",
        help="let batch, height or width vary; without values all three: batch 1 to 4, sides half to one and a half",
    )


def _add_extras(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--one-graph",
        nargs="+",
        type=int,
        default=[],
        metavar="STEPS",
        help="add a graph of the whole image for each number of steps: tokens and noise in, pixels out",
    )
    group.add_argument(
        "--backend",
        choices=["auto", "none", *TENSORRT_BACKENDS],
        default="auto",
        help="build TensorRT engines too; auto: with the TensorRT that is installed, if any (default: auto)",
    )
    group.add_argument(
        "--triton",
        type=folder,
        metavar="FOLDER",
        help="add the bundle to a model repository for Triton Inference Server; the bundle stays where it is",
    )


def run(args: argparse.Namespace) -> None:
    """Export the bundle with its additions, and print the next command."""
    from ..errors import RequestError
    from ..export.checkpoints import find_checkpoint
    from .build import make_build_options, say_next, say_target
    from .console import StageLines, err, out

    checkpoint = find_checkpoint(args.ckpt)  # reports a misspelt name before torch is loaded
    build_options = make_build_options(args)
    if args.backend == "none" and (given := option_words(args)):
        raise RequestError(f"{given[0]} is for engines, but --backend none builds none: leave one of them out")
    _check_one_graphs(checkpoint, args)
    _check_triton(args)
    began = time.perf_counter()
    builder, why_none = _find_builder(args.backend, build_options, args.precision)
    from ..export.exporter import export_bundle

    progress = StageLines()
    bundle = export_bundle(args.ckpt, args.out, _export_options(args), progress)
    built, why_not = time.perf_counter(), None
    _say_bundle(bundle, built - began)
    bundle = _add_one_graphs(bundle, args.one_graph, progress)
    if builder is not None:
        if bundle.manifest.one_graphs:
            line = "the engines are of the separate components; one-graphs run on ONNX Runtime and OpenVINO"
            err().print(line, markup=False, soft_wrap=True)
        bundle = _build(bundle, args, build_options, progress)
        target = builder.target(bundle, build_options)
        why_not = builder.why_not(bundle, target)
        say_target(bundle, target, time.perf_counter() - built, out())
    elif why_none:
        line = f"the bundle is ONNX only, because {why_none}; then: {build_command(bundle.root, *option_words(args))}"
        err().print(line, markup=False, soft_wrap=True)
    _write_triton(bundle, args)
    say_next(bundle, out(), err(), why_not)


def _check_one_graphs(checkpoint: Checkpoint, args: argparse.Namespace) -> None:
    """Reject impossible one-graphs before the export takes minutes."""
    if not args.one_graph:
        return
    from ..errors import RequestError
    from ..tools.one_graph import check_can_compose

    check_can_compose(checkpoint.name, checkpoint.guidance_scale, args.controlnet)
    if unknown := [steps for steps in args.one_graph if steps not in checkpoint.allowed_steps]:
        allowed = ", ".join(map(str, checkpoint.allowed_steps))
        raise RequestError(f"--one-graph {unknown[0]}: {checkpoint.name} was distilled for {allowed} steps")


def _add_one_graphs(bundle: Bundle, steps: list[int], progress: StageLines) -> Bundle:
    """The bundle with a graph of the whole image for each number of steps, and a line for each."""
    if not steps:
        return bundle
    from ..runtime.params import Params
    from ..tools.one_graph import add_one_graph
    from .console import out

    batch = bundle.manifest.shapes.batch.opt
    for number in dict.fromkeys(steps):
        params = Params(prompt="", num_inference_steps=number, num_images_per_prompt=batch)
        bundle = add_one_graph(bundle, params, progress)
    for name, one_graph in bundle.manifest.one_graphs.items():
        size = bundle.manifest.files[one_graph.network.onnx].size
        line = f"{name}: {size / 1e6:,.1f} MB, it shares the weights of the components"
        out().print(line, markup=False, soft_wrap=True)
    return bundle


def _check_triton(args: argparse.Namespace) -> None:
    if args.triton is not None:
        from ..triton_backend.repository import check_repository

        check_repository(args.triton, args.out)


def _write_triton(bundle: Bundle, args: argparse.Namespace) -> None:
    """Add the bundle to a model repository for Triton, and print the command that serves it."""
    if args.triton is None:
        return
    from ..triton_backend.repository import write_repository
    from .console import out

    model = write_repository(bundle, args.triton, args.replace)
    line = f"Triton model {model}; serve it with: tritonserver --model-repository {quoted(args.triton.resolve())}"
    out().print(line, markup=False, soft_wrap=True)


def _export_options(args: argparse.Namespace) -> ExportOptions:
    from ..export.controlnet_sources import ControlNetSource
    from ..export.exporter import ExportOptions
    from ..export.lora_sources import LoraSource
    from ..export.random_weights import RandomWeights
    from ..export.shapes import ShapeOptions
    from ..export.sources import SourceOptions

    dynamic = None if args.dynamic is None else dict(args.dynamic)
    width, height = args.size or (None, None)
    return ExportOptions(
        sources=SourceOptions(
            base=args.base,
            revision=args.revision,
            variant=args.variant,
            checkpoint_file=args.lora,
            vae=args.vae,
            controlnets=tuple(map(ControlNetSource.parse, args.controlnet)),
            added_loras=tuple(map(LoraSource.parse, args.add_lora)),
        ),
        shapes=ShapeOptions(batch=args.batch, height=height, width=width, dynamic=dynamic),
        precision=args.precision,
        lora_scale=args.lora_scale,
        text_only=args.text_only,
        lora_slot=_slot_options(args),
        random_weights=RandomWeights() if args.random_weights else None,
        replace=args.replace,
    )


def _slot_options(args: argparse.Namespace) -> SlotOptions | None:
    from ..errors import RequestError
    from ..export.lora_slot import SlotOptions

    if args.lora_slot is not None:
        return SlotOptions(rank=args.lora_slot, with_text=args.lora_slot_text)
    if args.lora_slot_text:
        raise RequestError("--lora-slot-text: give the slot's rank with it, --lora-slot RANK")
    return None


def _find_builder(backend: str, options: BuildOptions, precision: str) -> tuple[Builder | None, str]:
    """The builder, or the reason why there is none; impossible options are rejected before the export takes minutes."""
    from ..errors import DeviceError
    from .build import find_builder

    if backend == "none":
        return None, ""
    try:
        builder = find_builder(backend)
    except DeviceError as error:
        if backend != "auto":
            raise
        return None, str(error)
    builder.check(options, precision)
    return builder, ""


def _build(bundle: Bundle, args: argparse.Namespace, options: BuildOptions, progress: StageLines) -> Bundle:
    """Build the engines; a failure tells the user that the bundle itself is complete."""
    from ..engines import build_engines
    from ..errors import BundleError, HyperSDError

    kept = f"{bundle.root} is complete without engines, and finished engines are kept"
    try:
        return build_engines(bundle, args.backend, options, progress)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{kept}: the same command continues from there") from None
    except BundleError:
        raise  # the bundle is damaged
    except HyperSDError as error:
        command = build_command(bundle.root, "--backend", args.backend, *option_words(args))
        raise type(error)(f"{error}; {kept}; continue with: {command}") from error


def _say_bundle(bundle: Bundle, seconds: float) -> None:
    from .console import out

    plans = bundle.plan_files()
    size = sum(record.size for file, record in bundle.manifest.files.items() if file not in plans)
    line = f"bundle {bundle.root}: {size / 1e6:,.1f} MB, in {seconds:.1f} s"
    out().print(line, markup=False, soft_wrap=True)
