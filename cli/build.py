"""Build TensorRT engines for a bundle.

Writes one target into the bundle: an engine for every component, for one version of TensorRT, one kind of GPU (or all
that TensorRT-RTX supports) and one range of image sizes. TensorRT-RTX builds on any machine, TensorRT for the local
GPU. An interrupted build continues where it stopped. `hypersd info` shows the targets of a bundle.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import TYPE_CHECKING

from ..engines.vocabulary import TENSORRT_BACKENDS
from .arguments import add_engine_options, folder, option_words, quoted, size, span_type

if TYPE_CHECKING:
    from rich.console import Console

    from ..engines import BuildOptions, Bundle
    from ..engines.tensorrt.api import TensorRTApi
    from ..engines.tensorrt.machine import Machine

EXTRA = "tensorrt-rtx"
BUNDLE_FIRST = " (and BUNDLE before the option)"  # an option of several values would take the bundle as one of them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the bundle, the backend, the range of images and the options of engines."""
    parser.add_argument("bundle", type=folder, metavar="BUNDLE", help="the folder that `hypersd export` wrote")
    parser.add_argument(
        "--backend",
        choices=["auto", *TENSORRT_BACKENDS],
        default="auto",
        help="auto: TensorRT if it is installed and there is a GPU, else TensorRT-RTX (default: auto)",
    )
    parser.add_argument(
        "--remove", metavar="TARGET", help="build nothing, delete the target of this name (see `hypersd info`)"
    )
    shapes = parser.add_argument_group("images", "a part of the bundle's ranges; the default is all of each range")
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
    """Build the missing engines, and print the next command."""
    from ..engines import Bundle, build_engines
    from ..engines.image_shapes import choose_shapes
    from .console import StageLines, err, out

    if args.remove is not None:
        _remove(args)
        return
    began = time.perf_counter()
    options, spans = make_build_options(args), _spans(args)
    bundle = Bundle.load(args.bundle)
    options = dataclasses.replace(options, shapes=choose_shapes(bundle.manifest, spans))
    builder = find_builder(args.backend)
    builder.check(options, bundle.manifest.precision)
    try:
        bundle = build_engines(bundle, args.backend, options, StageLines())
    except KeyboardInterrupt:
        raise KeyboardInterrupt("finished engines are kept: the same command continues from there") from None
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
    """The dimensions that the options name, as (min, opt, max)."""
    from ..errors import RequestError

    width, height = args.size or (None, None)
    extents = {"batch": args.batch, "height": height, "width": width}
    fixed = {name: (extent,) * 3 for name, extent in extents.items() if extent is not None}
    ranges = dict(args.dynamic or ())
    if both := sorted(fixed.keys() & ranges.keys()):
        option = "--batch" if both[0] == "batch" else "--size"
        raise RequestError(f"{option} and --dynamic {both[0]}=MIN:OPT:MAX: give one of the two")
    return fixed | ranges


def make_build_options(args: argparse.Namespace) -> BuildOptions:
    """The engine options, checked as far as that takes no time.

    Raises:
        RequestError: the timing cache is a folder.
    """
    from ..engines import BuildOptions
    from ..errors import RequestError

    if args.timing_cache is not None and args.timing_cache.is_dir():
        raise RequestError(f"--timing-cache {args.timing_cache} is a folder: expected a file name")
    return BuildOptions(
        compute_capabilities=tuple(args.compute_capability or ()),
        optimization_level=args.optimization_level,
        stripped=args.strip_weights,
        timing_cache=args.timing_cache,
    )


@dataclasses.dataclass(frozen=True)
class Builder:
    """TensorRT or TensorRT-RTX, and this machine; found once for a command."""

    api: TensorRTApi
    machine: Machine

    def check(self, options: BuildOptions, precision: str) -> None:
        """Reject options that cannot be built here for a bundle of this precision, before any time is spent.

        Raises:
            RequestError: an option is not supported by the backend or for such a bundle, or out of range.
            DeviceError: a GPU is needed.
        """
        from ..engines.tensorrt.build_options import check_options

        check_options(self.api, options, self.machine, precision)

    def target(self, bundle: Bundle, options: BuildOptions) -> str:
        """The name of the target that these options build."""
        from ..engines.tensorrt.build_options import make_target
        from ..engines.tensorrt.targets import target_name

        return target_name(make_target(bundle.manifest, self.api, options, self.machine), bundle.manifest)

    def why_not(self, bundle: Bundle, name: str) -> str | None:
        """Why a target cannot run on this machine; None if it can."""
        from ..engines.load import why_not

        return why_not(bundle, name, self.machine)


def find_builder(backend: str) -> Builder:
    """Load the backend that builds.

    Raises:
        DeviceError: it is not installed, or cannot be loaded.
    """
    from ..engines.tensorrt.api import load_api
    from ..engines.tensorrt.build_options import choose_backend
    from ..engines.tensorrt.machine import this_machine

    machine = this_machine()
    return Builder(load_api(choose_backend(backend, machine)), machine)


def say_target(bundle: Bundle, name: str, seconds: float, console: Console) -> None:
    """Print the line of a finished build."""
    target = bundle.manifest.engines[name]
    size = sum(bundle.manifest.files[plan.file].size for plan in target.plans.values())
    console.print(f"engines {name}: {size / 1e6:,.1f} MB, in {seconds:.1f} s", markup=False, soft_wrap=True)


def say_next(bundle: Bundle, out: Console, err: Console, why_not: str | None = None) -> None:
    """Print the next command, and which backend runs here if the new engines cannot."""
    from ..export.checkpoints import example_prompt

    if why_not:
        line = f"these engines cannot run on this machine ({why_not}); ONNX Runtime is used here instead"
        err.print(line, markup=False, soft_wrap=True)
    prompt = example_prompt(bundle.manifest.checkpoint)
    if bundle.manifest.random_weights:
        out.print(f"measure with: hypersd bench {quoted(bundle.root)}", markup=False, soft_wrap=True)
        return
    images = " --image photo.jpg --mask mask.png" if bundle.manifest.is_inpainting else ""
    command = f'hypersd generate {quoted(bundle.root)} "{prompt}"{images}'
    out.print(f"generate with: {command}", markup=False, soft_wrap=True)
    if names := list(bundle.manifest.controlnets):
        given = "photo.jpg" if len(names) == 1 else f"{names[0]}=photo.jpg"
        out.print(f"with a control image: {command} --control-image {given}", markup=False, soft_wrap=True)
