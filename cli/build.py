"""Build TensorRT engines for a bundle.

Writes one target into the bundle: an engine for every network, for one version of TensorRT, one kind of GPU (or all
that TensorRT-RTX knows) and one range of picture sizes. TensorRT-RTX builds on any machine, TensorRT for the GPU at
hand. Interrupted, it goes on where it stopped; done, it says so. `hypersd info` shows what a bundle has.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from .engine_options import add_engine_options

if TYPE_CHECKING:
    from ..engines import Bundle

EXTRA = "tensorrt-rtx"
DIMS = ("batch", "height", "width")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which bundle, for what, and how."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="the folder that `hypersd export` wrote")
    parser.add_argument(
        "--backend",
        choices=["auto", "tensorrt", "tensorrt-rtx"],
        default="auto",
        help="auto takes what is installed: TensorRT with a GPU, else TensorRT-RTX (default: auto)",
    )
    parser.add_argument(
        "--remove", metavar="TARGET", help="build nothing, and delete the engines of this name in `hypersd info`"
    )
    shapes = parser.add_argument_group("pictures", "a part of the bundle's ranges; what is left out keeps them whole")
    shapes.add_argument("--batch", type=int, metavar="N", help="pictures at a time")
    shapes.add_argument("--height", type=int, metavar="PIXELS", help="one height alone")
    shapes.add_argument("--width", type=int, metavar="PIXELS", help="one width alone")
    shapes.add_argument("--dynamic", nargs="+", metavar="DIM=MIN:OPT:MAX", help="a range of batch, height or width")
    add_engine_options(parser)


def run(args: argparse.Namespace) -> None:
    """Build what is missing, and say what to do next."""
    import dataclasses

    from ..engines import Bundle, build_engines
    from ..engines.tensorrt.targets import choose_shapes
    from .console import StageLines, err, out
    from .engine_options import check_engine_options, choose_api, find_target, make_build_options, say_next, say_target

    if args.remove is not None:
        _remove(Bundle.load(args.bundle), args.remove)
        return
    began = time.perf_counter()
    options, spans = make_build_options(args), _spans(args)
    bundle = Bundle.load(args.bundle)
    options = dataclasses.replace(options, shapes=choose_shapes(bundle.manifest, spans))
    api = choose_api(args.backend)
    check_engine_options(api, options)
    try:
        bundle = build_engines(bundle, args.backend, options, StageLines())
    except KeyboardInterrupt:
        raise KeyboardInterrupt("finished engines are kept: the same command goes on from there") from None
    name = find_target(bundle, api, options)
    say_target(bundle, name, time.perf_counter() - began, out())
    say_next(bundle, name, out(), err())


def _remove(bundle: Bundle, name: str) -> None:
    from ..engines.tensorrt.build import remove_target
    from .console import out

    remove_target(bundle, name)
    out().print(f"engines {name} are deleted", markup=False, soft_wrap=True)


def _spans(args: argparse.Namespace) -> dict[str, tuple[int, int, int]]:
    """The dimensions that were named, as (min, opt, max)."""
    from ..errors import RequestError
    from ..export.shapes import parse_dynamic

    fixed = {name: (extent,) * 3 for name in DIMS if (extent := getattr(args, name)) is not None}
    ranges = dict(map(parse_dynamic, args.dynamic or ()))
    if both := sorted(fixed.keys() & ranges.keys()):
        raise RequestError(f"--{both[0]} and --dynamic {both[0]}=…: give one of the two")
    return fixed | ranges
