"""The image sizes and batches that a bundle is made for."""

from __future__ import annotations

import dataclasses

from ..engines.specs import LARGEST_BATCH, LARGEST_SIDE, ImageShapes, Range
from ..engines.vocabulary import DIMS
from ..errors import RequestError

SMALLEST = 64  # pixels of a side
MULTIPLE = 8  # pixels per latent


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapeOptions:
    """The user's choice of shapes; None takes the base's own size, and one image.

    Attributes:
        dynamic: dimensions that may vary, as (min, opt, max). ``{}`` lets all vary over the default ranges.
    """

    batch: int | None = None
    height: int | None = None
    width: int | None = None
    dynamic: dict[str, tuple[int, int, int]] | None = None


def image_shapes(options: ShapeOptions, default_size: int | tuple[int, int]) -> ImageShapes:
    """The bundle's shapes.

    Args:
        options: the user's choice.
        default_size: height and width that the base was trained for, in pixels; one number for a square.

    Raises:
        RequestError: a size or batch is out of range, or not a multiple of 8.
    """
    height, width = (default_size, default_size) if isinstance(default_size, int) else default_size
    usual = {
        "batch": 1 if options.batch is None else options.batch,
        "height": height if options.height is None else options.height,
        "width": width if options.width is None else options.width,
    }
    spans = {name: (extent, extent, extent) for name, extent in usual.items()}
    for name, span in (options.dynamic or {}).items():
        if name not in DIMS:
            raise RequestError(f"dynamic {name!r} is not known: expected {', '.join(DIMS)}")
        if getattr(options, name) not in (None, span[1]):
            raise RequestError(f"{name} {getattr(options, name)} and a range of it: give one of the two")
    if options.dynamic is not None:
        spans |= options.dynamic or {name: _default_span(name, extent) for name, extent in usual.items()}
    return ImageShapes(**{name: _range(name, *spans[name]) for name in DIMS})


def _default_span(name: str, usual: int) -> tuple[int, int, int]:
    """One to four images; half to one and a half times the usual size."""
    if name == "batch":
        return 1, usual, max(4, usual)
    return (
        max(SMALLEST, usual // 2 // MULTIPLE * MULTIPLE),
        usual,
        min(LARGEST_SIDE, usual * 3 // 2 // MULTIPLE * MULTIPLE),
    )


def parse_dynamic(text: str) -> tuple[str, tuple[int, int, int]]:
    """``height=512:768:1024`` as a name and (min, opt, max).

    Raises:
        RequestError: the text does not have that form.
    """
    name, _, span = text.partition("=")
    parts = span.split(":")
    if name not in DIMS or len(parts) != 3 or not all(part.isdecimal() for part in parts):
        raise RequestError(f"--dynamic {text!r}: expected batch, height or width as NAME=MIN:OPT:MAX")
    low, usual, high = map(int, parts)
    return name, (low, usual, high)


def _range(name: str, low: int, usual: int, high: int) -> Range:
    least, most = (1, LARGEST_BATCH) if name == "batch" else (SMALLEST, LARGEST_SIDE)
    for extent in (low, usual, high):
        if not least <= extent <= most:
            raise RequestError(f"{name} {extent} is out of range: expected {least} to {most}")
        if name != "batch" and extent % MULTIPLE:
            raise RequestError(f"{name} {extent} is not a multiple of {MULTIPLE}: take {_nearest(extent)}")
    if not low <= usual <= high:
        raise RequestError(f"{name} {low}:{usual}:{high}: expected MIN <= OPT <= MAX")
    return Range(name=name, min=low, opt=usual, max=high)


def _nearest(extent: int) -> int:
    return max(SMALLEST, round(extent / MULTIPLE) * MULTIPLE)
