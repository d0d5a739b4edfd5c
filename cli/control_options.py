"""Options of `hypersd generate` for ControlNets: control images, preprocessing, strength and range of steps."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..engines.component_names import split_named
from ..engines.vocabulary import PREPROCESSES

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..engines.manifest import Manifest, Preprocess

T = TypeVar("T")
Given = tuple[str | None, T]  # the ControlNet's name, if one was given
PER_CONTROLNET = ("preprocess", "control_scale", "control_start", "control_end")


def add_control_options(parser: argparse.ArgumentParser) -> None:
    """Add the options; each with a value per ControlNet also takes NAME=VALUE and may be repeated."""
    group = parser.add_argument_group(
        "ControlNets", "with several in a bundle: NAME=VALUE, or one value for each in their order"
    )
    each: dict[str, Any] = {"action": "append", "default": []}
    group.add_argument("--control-image", type=_file, metavar="FILE", help="photograph or drawing to follow", **each)
    group.add_argument(
        "--preprocess",
        type=_preprocess,
        metavar="|".join(PREPROCESSES),
        help="Canny edges, scribble (light lines from dark ones) or none (default: the known kind of the ControlNet)",
        **each,
    )
    group.add_argument("--canny-low", type=float, metavar="N", help="lower threshold (default: 100)")
    group.add_argument("--canny-high", type=float, metavar="N", help="upper threshold (default: 200)")
    group.add_argument(
        "--control-scale",
        type=_number,
        metavar="X",
        help="strength (default: the ControlNet's own, mostly 1)",
        **each,
    )
    group.add_argument(
        "--control-start", type=_number, metavar="X", help="part of the steps, 0..1, after which it acts", **each
    )
    group.add_argument(
        "--control-end", type=_number, metavar="X", help="part of the steps, 0..1, until which it acts", **each
    )
    group.add_argument("--save-control", action="store_true", help="also write the preprocessed control images")


def _file(text: str) -> Given[Path]:
    name, value = (None, text) if os.path.exists(text) else split_named(text)  # Path.exists raises for a long name
    return name, Path(value)


def _preprocess(text: str) -> Given[Preprocess]:
    name, value = split_named(text)
    for known in PREPROCESSES:
        if value == known:
            return name, known
    raise argparse.ArgumentTypeError(f"{value!r} is not known: expected {', '.join(PREPROCESSES)}")


def _number(text: str) -> Given[float]:
    name, value = split_named(text)
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is not a number") from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlImage:
    """A control image as it was read, and its preprocessing."""

    file: Path
    image: Image
    preprocess: Preprocess


@dataclasses.dataclass(frozen=True, kw_only=True)
class Controls:
    """The options by ControlNet; ``arguments`` are the pipeline's, without the images."""

    sources: Mapping[str, ControlImage]
    arguments: Mapping[str, Any]
    thresholds: tuple[float, float]
    resize_mode: str

    def images(self, width: int, height: int) -> dict[str, Image]:
        """The control images at the image's size, fitted before they are preprocessed: edges stay sharp."""
        from ..runtime.control_images import preprocess
        from ..runtime.image_files import fit

        return {
            name: preprocess(fit(image.image, width, height, self.resize_mode), image.preprocess, self.thresholds)
            for name, image in self.sources.items()
        }

    def metadata(self) -> dict[str, Any]:
        """Metadata for the image besides the request."""
        return {
            "control_image": {name: image.file.name for name, image in self.sources.items()},
            "preprocess": {name: self.words(name) for name in self.sources},
        }

    def words(self, name: str) -> str:
        """The preprocessing of an image, for messages and metadata."""
        preprocess = self.sources[name].preprocess
        low, high = self.thresholds
        return f"canny {low:g} {high:g}" if preprocess == "canny" else preprocess


def read_controls(args: argparse.Namespace, manifest: Manifest) -> Controls | None:
    """Read the control images; None if there are none.

    Raises:
        RequestError: a file is not an image, an option names a ControlNet that the bundle lacks, or there
            are more or fewer values than ControlNets.
    """
    from ..errors import RequestError
    from ..runtime.control_images import check_opencv
    from ..runtime.controls import make_controls
    from ..runtime.image_files import open_image

    if not args.control_image:
        _check_lonely(args)
        return None
    names = list(manifest.controlnets)
    if not names:
        raise RequestError(
            f"--control-image: {args.bundle} was exported without a ControlNet: export one with --controlnet"
        )
    files = _by_name("--control-image", args.control_image, names, spread=False)
    values = {option: _values(args, option, names, files) for option in PER_CONTROLNET}
    preprocess: dict[str, Preprocess] = {name: settings.preprocess for name, settings in manifest.controlnets.items()}
    preprocess |= values["preprocess"]
    thresholds = _thresholds(args)
    if any(preprocess[name] == "canny" for name in files):
        check_opencv()
    scales, starts, ends = (values[option] for option in ("control_scale", "control_start", "control_end"))
    make_controls(manifest, files, scales, starts, ends)  # rejects numbers that are out of range
    sources = {
        name: ControlImage(file=file, image=open_image(file), preprocess=preprocess[name])
        for name, file in files.items()
    }
    arguments = {
        "controlnet_conditioning_scale": scales or None,
        "control_guidance_start": starts or None,
        "control_guidance_end": ends or None,
    }
    return Controls(sources=sources, arguments=arguments, thresholds=thresholds, resize_mode=args.resize_mode or "crop")


def _values(args: argparse.Namespace, option: str, names: Sequence[str], files: Mapping[str, Path]) -> dict[str, Any]:
    """An option's values; a ControlNet that is named must have an image."""
    from ..errors import RequestError

    values = _by_name(_spelt(option), getattr(args, option), names)
    named = {name for name, _ in getattr(args, option)} - {None}
    if without := sorted(named - files.keys()):
        raise RequestError(f"{_spelt(option)} {without[0]}=: expected --control-image {without[0]}=FILE with it")
    return values


def _thresholds(args: argparse.Namespace) -> tuple[float, float]:
    from ..runtime.control_images import CANNY_THRESHOLDS, check_thresholds

    given = zip((args.canny_low, args.canny_high), CANNY_THRESHOLDS, strict=True)
    low, high = (usual if number is None else number for number, usual in given)
    check_thresholds(low, high)
    return low, high


def _spelt(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def _check_lonely(args: argparse.Namespace) -> None:
    """Reject options that have no effect without a control image."""
    from ..errors import RequestError

    for option in (*PER_CONTROLNET, "canny_low", "canny_high", "save_control"):
        if getattr(args, option) not in (None, False, []):
            raise RequestError(f"{_spelt(option)} is about a control image: expected --control-image FILE with it")


def _by_name(option: str, given: Sequence[Given[T]], names: Sequence[str], spread: bool = True) -> dict[str, T]:
    """Values by the ControlNet's name: named, one for each, or with ``spread`` one for all."""
    from ..errors import RequestError

    named = [name for name, _ in given if name is not None]
    if unknown := [name for name in named if name not in names]:
        raise RequestError(f"{option} {unknown[0]}=: the bundle has no such ControlNet, it has {', '.join(names)}")
    if len(named) != len(set(named)):
        raise RequestError(f"{option}: two values for the same ControlNet, expected one")
    if len(named) == len(given):
        return {name: value for name in names for given_name, value in given if name == given_name}
    if named:
        raise RequestError(f"{option}: some values with NAME= and some without: expected all or none")
    values = [value for _, value in given]
    if len(values) == 1 and spread:
        values *= len(names)
    if len(values) != len(names):
        count = f"{len(names)} ControlNet{'s' if len(names) > 1 else ''} ({', '.join(names)})"
        raise RequestError(f"{option}: {len(values)} for {count}: expected one for each, or NAME=VALUE")
    return dict(zip(names, values, strict=True))
