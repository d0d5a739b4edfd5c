"""What `build` and `export` share: the options of TensorRT engines, their checks, and what is said of the result."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from ..engines import BuildOptions, Bundle
    from ..engines.tensorrt.api import TensorRTApi

LEVELS = range(6)


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """How to build engines."""
    group = parser.add_argument_group("engines")
    group.add_argument(
        "--compute-capability",
        nargs="+",
        type=_compute_capability,
        metavar="X.Y",
        help="TensorRT-RTX: build for these GPUs alone, such as 8.9 12.0 (default: portable, for all RTX GPUs)",
    )
    group.add_argument(
        "--optimization-level",
        type=int,
        choices=LEVELS,
        metavar="0..5",
        help="0 builds quickest, 5 makes the fastest engines (default: TensorRT's own)",
    )
    group.add_argument(
        "--strip-weights",
        action="store_true",
        help="leave the weights out: small engines, which take them from the ONNX files at every load; needs a GPU",
    )
    group.add_argument(
        "--refittable", action="store_true", help="let the weights of a loaded engine be exchanged; needs a GPU"
    )
    group.add_argument(
        "--timing-cache",
        type=Path,
        metavar="FILE",
        help="TensorRT: kernel timings that builds on one kind of GPU share (default: one in the cache folder)",
    )


def _compute_capability(text: str) -> str:
    if not re.fullmatch(r"\d{1,2}\.\d", text):
        raise argparse.ArgumentTypeError(f"{text!r} is none: expected such as 8.9 (and BUNDLE before the option)")
    return text


def make_build_options(args: argparse.Namespace) -> BuildOptions:
    """What the user said, checked as far as that takes no time.

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
        refittable=args.refittable,
        timing_cache=args.timing_cache,
    )


def given_options(args: argparse.Namespace) -> list[str]:
    """Those of the engine options that were given."""
    names = ("compute_capability", "optimization_level", "strip_weights", "refittable", "timing_cache")
    values = {f"--{name.replace('_', '-')}": getattr(args, name) for name in names}
    return [option for option, value in values.items() if value is not None and value is not False]  # 0 is a level


def choose_api(backend: str) -> TensorRTApi:
    """The flavour to build with, ready.

    Raises:
        DeviceError: it is not installed, or cannot be loaded.
    """
    from ..engines.tensorrt.api import load_api
    from ..engines.tensorrt.build import choose_backend
    from ..engines.tensorrt.machine import this_machine

    return load_api(choose_backend(backend, this_machine()))


def check_engine_options(api: TensorRTApi, options: BuildOptions) -> None:
    """Refuse what cannot be built here before any time is spent.

    Raises:
        RequestError: an option is not one of this flavour's, or out of range.
        DeviceError: a GPU is needed.
    """
    from ..engines.tensorrt.build import check_options
    from ..engines.tensorrt.machine import this_machine

    check_options(api, options, this_machine())


def find_target(bundle: Bundle, api: TensorRTApi, options: BuildOptions) -> str:
    """The name of the target that these options build."""
    from ..engines.tensorrt.build import make_target
    from ..engines.tensorrt.machine import this_machine
    from ..engines.tensorrt.targets import target_name

    return target_name(make_target(bundle.manifest, api, options, this_machine()), bundle.manifest)


def say_target(bundle: Bundle, name: str, seconds: float, console: Console) -> None:
    """The line of a finished build."""
    target = bundle.manifest.engines[name]
    size = sum(bundle.manifest.files[plan.file].size for plan in target.plans.values())
    console.print(f"engines {name}: {size / 1e6:,.1f} MB, in {seconds:.1f} s", markup=False, soft_wrap=True)


def say_next(bundle: Bundle, name: str | None, out: Console, err: Console) -> None:
    """How to draw, and with what if not with the engines that were just built."""
    if name is not None:
        from ..engines.load import why_not
        from ..engines.tensorrt.machine import this_machine

        if reason := why_not(bundle, name, this_machine()):
            line = f"these engines cannot run on this machine ({reason}); ONNX Runtime draws here instead"
            err.print(line, markup=False, soft_wrap=True)
    out.print(f'draw with: hypersd generate {bundle.root} "a photo of a cat"', markup=False, soft_wrap=True)
