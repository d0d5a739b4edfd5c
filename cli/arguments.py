"""Options and argument types that several commands share, and command lines for the user to copy."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..engines.vocabulary import BACKENDS, OPTIMIZATION_LEVELS

if TYPE_CHECKING:
    from ..engines import Bundle

BUNDLE_HELP = "the folder that `hypersd export` wrote, or OWNER/NAME[@REVISION] on the Hub"


def folder(text: str) -> Path:
    """Parse a folder's name; an empty one (a shell variable that is not set) would mean the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty: expected a folder, such as bundles/Hyper-SDXL-1step-lora")
    return Path(text)


def open_bundle(place: Path, hashes: bool = False) -> Bundle:
    """Open a bundle in a folder or on the Hub; downloads are shown. Errors are those of both."""
    from ..engines.bundle import Bundle
    from ..engines.hub_bundles import find_bundle
    from .console import DownloadBar, err

    return Bundle.load(find_bundle(place, DownloadBar(err())), hashes=hashes)


def verify_folder(bundle: Path) -> Path:
    """The folder of `hypersd verify`'s results: beside the bundle, or in the current folder for one on the Hub."""
    from ..engines.hub_bundles import bundle_name

    if name := bundle_name(bundle):
        return Path(f"{name}-verify")
    return bundle.with_name(f"{bundle.resolve().name}-verify")


def size(text: str) -> tuple[int, int]:
    """Parse ``1024x768`` as (width, height) in pixels."""
    match = re.fullmatch(r"(\d{1,5})[xX](\d{1,5})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r}: expected WIDTHxHEIGHT in pixels, such as 512x512")
    return int(match[1]), int(match[2])


def count(text: str) -> int:
    """A number of things, 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, 1 or more")
    return int(text)


def size_word(size: tuple[int, int] | None) -> str | None:
    """Format (width, height) as ``1024x768``."""
    return None if size is None else f"{size[0]}x{size[1]}"


def quoted(path: Path) -> str:
    """Quote a path for the shell, so that no command takes it for an option."""
    return shlex.quote(f"./{path}" if str(path).startswith("-") else str(path))


def build_command(bundle: Path, *options: str) -> str:
    """The command line that builds a bundle's engines; the bundle is first, because some options take several words."""
    return " ".join(["hypersd build", quoted(bundle), *map(shlex.quote, options)])


def add_backend(parser: argparse.ArgumentParser, words: str) -> None:
    """Add `--backend` (help text ``words``), `--precision` (OpenVINO only) and `--low-memory`."""
    parser.add_argument(
        "--backend",
        default="auto",
        choices=BACKENDS,
        help=words,
    )
    parser.add_argument(
        "--precision",
        choices=["fp32", "bf16"],
        help="OpenVINO only: compute type (default: bf16 where the processor supports it natively, else fp32); "
        "the other backends compute in the bundle's precision",
    )
    parser.add_argument(
        "--low-memory",
        action="store_true",
        help="load components when they are needed and release them after: the same images in the memory of the "
        "largest, each after its own loads and without CUDA graphs",
    )


def add_image_settings(parser: argparse.ArgumentParser) -> None:
    """Add the settings of an image that `generate` and `batch` share."""
    parser.add_argument("--steps", type=int, metavar="N", help="a number that the checkpoint was distilled for")
    parser.add_argument("--eta", type=float, help="0..1, stochasticity")
    parser.add_argument(
        "--guidance-scale", type=float, metavar="X", help="classifier-free guidance; 1 or less turns it off"
    )
    parser.add_argument(
        "--negative-prompt", metavar="TEXT", help="text that guidance moves away from; needs guidance above 1"
    )
    parser.add_argument("--size", type=size, metavar="WxH", help="in pixels, within the bundle's range")


def add_allow_random_weights(parser: argparse.ArgumentParser) -> None:
    """Add `--allow-random-weights`."""
    parser.add_argument(
        "--allow-random-weights", action="store_true", help="accept a bundle of random weights, whose images are noise"
    )


def add_engine_options(parser: argparse.ArgumentParser, hint: str = "") -> None:
    """Add the options of TensorRT engines; ``hint`` ends the message about a bad value."""
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
        choices=OPTIMIZATION_LEVELS,
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
    """Make a parser of a compute capability; ``hint`` ends its error message."""

    def parse(text: str) -> str:
        if not re.fullmatch(r"\d{1,2}\.\d", text):
            raise argparse.ArgumentTypeError(f"{text!r} is not a compute capability: expected e.g. 8.9{hint}")
        return text

    return parse


def span_type(hint: str = "") -> Callable[[str], tuple[str, tuple[int, int, int]]]:
    """Make a parser of a dimension's range; ``hint`` ends its error message."""

    def parse(text: str) -> tuple[str, tuple[int, int, int]]:
        from ..errors import RequestError
        from ..export.shapes import parse_dynamic

        try:
            return parse_dynamic(text)
        except RequestError:
            form = "expected batch, height or width as NAME=MIN:OPT:MAX"
            raise argparse.ArgumentTypeError(f"{text!r} is not a range: {form}{hint}") from None

    return parse


def option_words(args: argparse.Namespace) -> list[str]:
    """The engine options that were given, as words of a command."""
    words = []
    for name in ("compute_capability", "optimization_level", "strip_weights", "timing_cache"):
        value, option = getattr(args, name), f"--{name.replace('_', '-')}"
        if value is not None and value is not False:  # 0 is a level
            values = value if isinstance(value, list) else [] if value is True else [value]
            words += [option, *map(str, values)]
    return words
