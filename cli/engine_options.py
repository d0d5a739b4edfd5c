"""What `build` and `export` share: the options of TensorRT engines, their checks, and what is said of the result."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import quoted

if TYPE_CHECKING:
    from rich.console import Console

    from ..engines import BuildOptions, Bundle
    from ..engines.tensorrt.api import TensorRTApi
    from ..engines.tensorrt.machine import Machine

LEVELS = range(6)


def add_engine_options(parser: argparse.ArgumentParser, hint: str = "") -> None:
    """How to build engines; ``hint`` goes with what is said of a bad value where an option takes several."""
    group = parser.add_argument_group("engines")
    group.add_argument(
        "--compute-capability",
        nargs="+",
        type=_capability_type(hint),
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
        "--timing-cache",
        type=Path,
        metavar="FILE",
        help="TensorRT: kernel timings that builds on one kind of GPU share (default: one in the cache folder)",
    )


def _capability_type(hint: str) -> Callable[[str], str]:
    """Reads a compute capability; ``hint`` goes with what it says of others."""

    def parse(text: str) -> str:
        if not re.fullmatch(r"\d{1,2}\.\d", text):
            raise argparse.ArgumentTypeError(f"{text!r} is not a compute capability: expected e.g. 8.9{hint}")
        return text

    return parse


def span_type(hint: str = "") -> Callable[[str], tuple[str, tuple[int, int, int]]]:
    """Reads a dimension's range; ``hint`` goes with what it says of others."""

    def parse(text: str) -> tuple[str, tuple[int, int, int]]:
        from ..errors import RequestError
        from ..export.shapes import parse_dynamic

        try:
            return parse_dynamic(text)
        except RequestError:
            form = "expected batch, height or width as NAME=MIN:OPT:MAX"
            raise argparse.ArgumentTypeError(f"{text!r} is not a range: {form}{hint}") from None

    return parse


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
        timing_cache=args.timing_cache,
    )


def option_words(args: argparse.Namespace) -> list[str]:
    """The engine options that were given, as words of a command."""
    words = []
    for name in ("compute_capability", "optimization_level", "strip_weights", "timing_cache"):
        value, option = getattr(args, name), f"--{name.replace('_', '-')}"
        if value is not None and value is not False:  # 0 is a level
            values = value if isinstance(value, list) else [] if value is True else [value]
            words += [option, *map(str, values)]
    return words


@dataclasses.dataclass(frozen=True)
class Builder:
    """What a command builds with, looked up once: TensorRT or TensorRT-RTX, and this machine."""

    api: TensorRTApi
    machine: Machine

    def check(self, options: BuildOptions) -> None:
        """Refuse what cannot be built here before any time is spent.

        Raises:
            RequestError: an option is not supported by the backend, or out of range.
            DeviceError: a GPU is needed.
        """
        from ..engines.tensorrt.build_options import check_options

        check_options(self.api, options, self.machine)

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
    """The backend to build with, loaded.

    Raises:
        DeviceError: it is not installed, or cannot be loaded.
    """
    from ..engines.tensorrt.api import load_api
    from ..engines.tensorrt.build_options import choose_backend
    from ..engines.tensorrt.machine import this_machine

    machine = this_machine()
    return Builder(load_api(choose_backend(backend, machine)), machine)


def say_target(bundle: Bundle, name: str, seconds: float, console: Console) -> None:
    """The line of a finished build."""
    target = bundle.manifest.engines[name]
    size = sum(bundle.manifest.files[plan.file].size for plan in target.plans.values())
    console.print(f"engines {name}: {size / 1e6:,.1f} MB, in {seconds:.1f} s", markup=False, soft_wrap=True)


def say_next(bundle: Bundle, out: Console, err: Console, why_not: str | None = None) -> None:
    """How to draw, and with what if the engines that were just built cannot run here."""
    from ..export.checkpoints import example_prompt

    if why_not:
        line = f"these engines cannot run on this machine ({why_not}); ONNX Runtime is used here instead"
        err.print(line, markup=False, soft_wrap=True)
    prompt = example_prompt(bundle.manifest.checkpoint)
    if bundle.manifest.random_weights:
        out.print(f"measure with: hypersd bench {quoted(bundle.root)}", markup=False, soft_wrap=True)
        return
    command = f'hypersd generate {quoted(bundle.root)} "{prompt}"'
    out.print(f"generate with: {command}", markup=False, soft_wrap=True)
    if names := list(bundle.manifest.controlnets):
        given = "photo.jpg" if len(names) == 1 else f"{names[0]}=photo.jpg"
        out.print(f"along an image: {command} --control-image {given}", markup=False, soft_wrap=True)
