"""Build TensorRT engines for a bundle.

Writes one target into the bundle: an engine for every network, for one version of TensorRT, one kind of GPU (or all
that TensorRT-RTX knows) and one range of image sizes. TensorRT-RTX builds on any machine, TensorRT for the GPU at
hand. Interrupted, it goes on where it stopped; done, it says so. `hypersd info` shows what a bundle has.
"""

from __future__ import annotations

import argparse
import time

from .arguments import BUNDLE_HELP, folder, size
from .engine_options import add_engine_options, option_words, span_type

EXTRA = "tensorrt-rtx"
BUNDLE_FIRST = " (and BUNDLE before the option)"  # an option of several values takes a bundle for one of them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which bundle, for what, and how."""
    parser.add_argument("bundle", type=folder, metavar="BUNDLE", help=BUNDLE_HELP)
    parser.add_argument(
        "--backend",
        choices=["auto", "tensorrt", "tensorrt-rtx"],
        default="auto",
        help="auto takes what is installed: TensorRT with a GPU, else TensorRT-RTX (default: auto)",
    )
    parser.add_argument(
        "--remove", metavar="TARGET", help="build nothing, and delete the engines of this name in `hypersd info`"
    )
    shapes = parser.add_argument_group("images", "a part of the bundle's ranges; what is left out keeps them whole")
    shapes.add_argument("--batch", type=int, metavar="N", help="images at a time")
    shapes.add_argument("--size", type=size, metavar="WxH", help="one width and height in pixels")
    shapes.add_argument(
        "--dynamic",
        nargs="+",
        type=span_type(BUNDLE_FIRST),
        metavar="DIM=MIN:OPT:MAX",
        help="a range of batch, height or width",
    )
    add_engine_options(parser, BUNDLE_FIRST)


def run(args: argparse.Namespace) -> None:
    """Build what is missing, and say what to do next."""
    import dataclasses

    from ..engines import Bundle, build_engines
    from ..engines.image_shapes import choose_shapes
    from .console import StageLines, err, out
    from .engine_options import find_builder, make_build_options, say_next, say_target

    if args.remove is not None:
        _remove(args)
        return
    began = time.perf_counter()
    options, spans = make_build_options(args), _spans(args)
    bundle = Bundle.load(args.bundle)
    options = dataclasses.replace(options, shapes=choose_shapes(bundle.manifest, spans))
    builder = find_builder(args.backend)
    builder.check(options)
    try:
        bundle = build_engines(bundle, args.backend, options, StageLines())
    except KeyboardInterrupt:
        raise KeyboardInterrupt("finished engines are kept: the same command goes on from there") from None
    name = builder.target(bundle, options)
    say_target(bundle, name, time.perf_counter() - began, out())
    say_next(bundle, out(), err(), builder.why_not(bundle, name))


def _remove(args: argparse.Namespace) -> None:
    from ..engines import Bundle
    from ..engines.tensorrt.target_builder import remove_target
    from ..errors import RequestError
    from .console import out

    shapes = [f"--{name}" for name in ("batch", "size", "dynamic") if getattr(args, name) is not None]
    backend = ["--backend"] if args.backend != "auto" else []
    if given := [*backend, *shapes, *option_words(args)]:
        raise RequestError(f"--remove builds nothing: leave {given[0]} out")
    remove_target(Bundle.load(args.bundle), args.remove)
    out().print(f"engines {args.remove} are deleted", markup=False, soft_wrap=True)


def _spans(args: argparse.Namespace) -> dict[str, tuple[int, int, int]]:
    """The dimensions that were named, as (min, opt, max)."""
    from ..errors import RequestError

    width, height = args.size or (None, None)
    extents = {"batch": args.batch, "height": height, "width": width}
    fixed = {name: (extent,) * 3 for name, extent in extents.items() if extent is not None}
    ranges = dict(args.dynamic or ())
    if both := sorted(fixed.keys() & ranges.keys()):
        option = "--batch" if both[0] == "batch" else "--size"
        raise RequestError(f"{option} and --dynamic {both[0]}=MIN:OPT:MAX: give one of the two")
    return fixed | ranges
