"""Says by pixels which parts of a scene are right in an image.

Looking comes first and knows nothing of the prompt: :func:`look` names what is in an image, in the words of the
world of scenes.py, or None where nothing of that world is near enough. Only then is it compared with the scene. Soft
edges, a slight drift of colour and a shift of a few pixels are fine. Lengths are fractions of the image's side.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping

import numpy as np
from skimage.color import rgb2lab
from skimage.measure import label, regionprops
from skimage.morphology import dilation, erosion
from skimage.segmentation import expand_labels

from .scenes import COLOURS, PLACES, RADII, SHAPES, STRIPES, TINTS, Scene, Thing, coverage

Colour = tuple[int, int, int]

# Distances of colours are in CIE Lab (CIE76): a just visible difference is about 2, the nearest two COLOURS are 31
# apart, the nearest two TINTS 20.
COLOUR_LIMIT = 20.0
TINT_LIMIT = 9.0
LIKE_NOTHING = 35.0  # a pixel that far from every background is of a thing, if of one in no known colour
PURE = 0.75  # share of a thing's core that has to be within COLOUR_LIMIT of the named colour
LEAST_AREA = 0.006  # of the image, a third of the smallest thing: less is a speck
MOST_SIGHTS = 4  # things that are looked at in one image, the largest first
WIDEST = 0.56  # the widest thing spans 0.49, two that touch span 0.8 and more
CUTS = (0.42, 0.58)  # where two things that touch may meet
SOFT_EDGE = 0.025  # how far a thing's edge may reach beyond the pixels that have its colour
SHARPEN = 1.5  # so that a soft edge costs less of the overlap
TURNS = (-12, -8, -4, 0, 4, 8, 12)  # degrees
# Overlap with the template; an edge that is off by 6 % of the radius costs a thin shape more than a round one.
LEAST_FIT = {"circle": 0.82, "square": 0.82, "triangle": 0.8, "star": 0.72, "ring": 0.74, "cross": 0.77}
SIZE_LIMIT = 1.25  # times larger or smaller than one of RADII; neighbours are 1.4 apart
BLOT = 1.5  # times larger or smaller than all RADII: no thing of this world
PLACE_LIMIT = 0.11  # half of the distance between neighbouring PLACES
LEAST_CONTRAST = 10.0  # between the two colours of a pattern; the palest tint is 24 away from white
FLATTEST = 7.0  # the most contrast that a plain background may have from top to bottom, or between stripes
PHASES = (0.0, -0.01, 0.01, -0.02, 0.02)  # where the stripes may begin
LEAST_BACKGROUND = 0.3  # of the image
MOST_DEVIATION = 7.0  # mean distance of the background's pixels from the pattern seen in them


@dataclasses.dataclass(frozen=True)
class Sight:
    """One thing seen; None where it has no name."""

    colour: str | None
    shape: str | None
    size: str | None
    place: str | None


@dataclasses.dataclass(frozen=True)
class View:
    """The things that are seen in an image, the largest first."""

    sights: tuple[Sight, ...]
    count: int | None  # None if something is seen that is no thing
    pattern: str | None
    tint: str | None


@dataclasses.dataclass(frozen=True)
class ThingVerdict:
    """The parts of one described thing that are right."""

    colour: bool
    shape: bool
    place: bool
    size: bool


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The parts of an image that are right; ``things`` in the order of the scene's."""

    things: tuple[ThingVerdict, ...]
    pattern: bool
    tint: bool
    count: bool

    @property
    def all_right(self) -> bool:
        parts = [part for thing in self.things for part in dataclasses.astuple(thing)]
        return all(parts) and self.pattern and self.tint and self.count


@dataclasses.dataclass(frozen=True)
class Scores:
    """Shares, 0 to 1: of things the first four, of images the next two."""

    colours: float
    shapes: float
    places: float
    sizes: float
    backgrounds: float
    counts: float

    @property
    def overall(self) -> float:
        return (self.colours + self.shapes + self.places + self.backgrounds) / 4


def judge(image: np.ndarray, scene: Scene, tints: Mapping[str, Colour] = TINTS) -> Verdict:
    """Compare an image, uint8 [size, size, 3], with the scene that it should show, on one of ``tints``."""
    return compare(look(image, tints), scene)


def compare(view: View, scene: Scene) -> Verdict:
    """Every described thing is held against another one seen, in the way that makes most of them right."""
    nothing: list[Sight | None] = [None] * len(scene.things)
    orders = itertools.permutations([*view.sights, *nothing], len(scene.things))
    ways = [tuple(map(_compare_thing, order, scene.things)) for order in orders]
    return Verdict(
        things=max(ways, key=lambda things: sum(sum(dataclasses.astuple(thing)) for thing in things)),
        pattern=view.pattern == scene.background.pattern,
        tint=view.tint == scene.background.tint,
        count=view.count == len(scene.things),
    )


def _compare_thing(sight: Sight | None, thing: Thing) -> ThingVerdict:
    if sight is None:
        return ThingVerdict(False, False, False, False)
    return ThingVerdict(
        colour=sight.colour == thing.colour,
        shape=sight.shape == thing.shape,
        place=sight.place == thing.place,
        size=sight.size == thing.size,
    )


def score(verdicts: Iterable[Verdict]) -> Scores:
    """The shares of what is right; of no verdicts, nothing is right."""
    verdicts = list(verdicts)
    things = [thing for verdict in verdicts for thing in verdict.things]
    return Scores(
        colours=_share(thing.colour for thing in things),
        shapes=_share(thing.shape for thing in things),
        places=_share(thing.place for thing in things),
        sizes=_share(thing.size for thing in things),
        backgrounds=_share(verdict.pattern and verdict.tint for verdict in verdicts),
        counts=_share(verdict.count for verdict in verdicts),
    )


def _share(parts: Iterable[bool]) -> float:
    parts = list(parts)
    return sum(parts) / max(1, len(parts))


PARTS = ("overall", "colours", "shapes", "places", "sizes", "backgrounds", "counts")


# Looking


def look(image: np.ndarray, tints: Mapping[str, Colour] = TINTS) -> View:
    """Name everything in an image, uint8 [size, size, 3], on one of ``tints``."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape != (len(image), len(image), 3):
        raise ValueError(f"no square RGB image in uint8: {image.dtype} {list(image.shape)}")
    regions, count = _find_things(image, tints)
    beyond = _dilate(regions > 0, len(image))
    rows, pattern, tint = _look_at_background(image, ~beyond, tints)
    territories = expand_labels(regions, SOFT_EDGE * len(image))
    sights = [
        _look_at_thing(image, rows, regions == number, territories == number)
        for number in range(1, min(count, MOST_SIGHTS) + 1)
    ]
    things = tuple(sight for sight in sights if sight)
    return View(things, count if len(things) == len(sights) else None, pattern, tint)


def _dilate(mask: np.ndarray, size: int) -> np.ndarray:
    """A mask with two hundredths of the image around it, where soft edges are."""
    for _ in range(max(1, round(0.02 * size))):
        mask = dilation(mask)
    return mask


def _find_things(image: np.ndarray, tints: Mapping[str, Colour]) -> tuple[np.ndarray, int]:
    """Which thing every pixel is of, int64 [size, size], from 1 for the largest thing, 0 for none; and how many."""
    size = len(image)
    regions = label(_is_thing(tuple(tints.values()))[tuple(np.moveaxis(image >> 3, -1, 0))], connectivity=1)
    for region in regionprops(regions):
        top, left, bottom, right = region.bbox
        if max(bottom - top, right - left) > WIDEST * size and region.area > LEAST_AREA * size**2:
            _cut(regions, region.label, along=int(right - left > bottom - top))
    areas = np.bincount(regions.ravel())
    areas[0] = 0
    count = int((areas > LEAST_AREA * size**2).sum())
    ranks = np.zeros(len(areas), int)
    ranks[np.argsort(-areas, kind="stable")[:count]] = np.arange(1, count + 1)
    return ranks[regions], count


def _cut(regions: np.ndarray, number: int, along: int) -> None:
    """Make two of a region that is too long for one thing, where it is narrowest near the middle of axis ``along``."""
    mask = regions == number
    size = len(mask)
    near = np.arange(round(CUTS[0] * size), round(CUTS[1] * size) + 1)
    widths = mask.sum(1 - along)[near]
    cut = min(zip(widths, abs(near - size / 2), near, strict=True))[-1]
    beyond = np.arange(size) >= cut
    regions[mask & (beyond[None] if along else beyond[:, None])] = regions.max() + 1


@functools.cache
def _is_thing(tints: tuple[Colour, ...]) -> np.ndarray:
    """Whether a colour is no background's: bool [32, 32, 32] over RGB / 8.

    It is nearer to one of COLOURS than to any mixture of white and a tint, or far from all of these.
    """
    axis = np.arange(32) * 8 + 3.5
    lab = _lab(np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1))
    backgrounds = np.concatenate([255 + (np.array(tints, float) - 255) * amount for amount in np.linspace(0, 1, 7)])
    nearest = [
        np.min([np.linalg.norm(lab - colour, axis=-1) for colour in _lab(colours)], axis=0)
        for colours in (np.array(list(COLOURS.values())), backgrounds)
    ]
    return (nearest[0] < nearest[1]) | (nearest[1] > LIKE_NOTHING)


def _lab(rgb: np.ndarray) -> np.ndarray:
    """CIE Lab of RGB values from 0 to 255: float64, same shape."""
    return rgb2lab(np.asarray(rgb, float) / 255)


def _name_colour(lab: np.ndarray, colours: Mapping[str, Colour], limit: float) -> str | None:
    """The nearest name of a colour, float64 [3], or None if none is near."""
    distances = np.linalg.norm(_lab(list(colours.values())) - lab, axis=-1)
    best = int(distances.argmin())
    return list(colours)[best] if distances[best] <= limit else None


# Backgrounds


def _look_at_background(
    image: np.ndarray, mask: np.ndarray, tints: Mapping[str, Colour]
) -> tuple[np.ndarray, str | None, str | None]:
    """The colour of every row's background, float64 [size, 3], and the names of pattern and tint."""
    size = len(image)
    seen = mask.sum(1) >= 3
    if mask.mean() < LEAST_BACKGROUND or not seen.any():
        return np.full((size, 3), 255.0), None, None
    medians = np.array([np.median(image[i, mask[i]], axis=0) if seen[i] else np.zeros(3) for i in range(size)])
    fits = [_fit_background(medians, seen, phase) for phase in PHASES]
    parts, fitted = min(fits, key=lambda fit: np.square(fit[1] - medians)[seen].sum())
    deviation = np.linalg.norm(_lab(image) - _lab(fitted)[:, None], axis=-1)[mask].mean()
    rows = np.where(seen[:, None], medians, fitted)
    if deviation > MOST_DEVIATION:
        return rows, None, None
    return rows, *_name_background(*parts, tints)


def _fit_background(medians: np.ndarray, seen: np.ndarray, phase: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows' colours as a mean colour, stripes and a slope from top to bottom: these, [3, 3], and the rows made of them.

    The stripes begin at ``phase``. Only the rows that are ``seen`` count, bool [size].
    """
    y = (np.arange(len(seen)) + 0.5) / len(seen)
    stripes = 0.5 - np.floor((y - phase) * STRIPES * 2) % 2
    factors = np.stack([np.ones(len(seen)), stripes, y - 0.5], 1)
    parts = np.linalg.lstsq(factors[seen], medians[seen], rcond=None)[0]
    return parts, factors @ parts


def _name_background(
    mean: np.ndarray, stripes: np.ndarray, slope: np.ndarray, tints: Mapping[str, Colour]
) -> tuple[str | None, str | None]:
    """Pattern and tint from a mean colour and two differences, float64 [3] each in RGB."""
    ends = _lab(np.stack([[mean - part / 2, mean + part / 2] for part in (stripes, slope)]).clip(0, 255))
    contrasts = np.linalg.norm(ends[:, 0] - ends[:, 1], axis=-1)
    strongest = int(contrasts.argmax())
    if contrasts[strongest] <= FLATTEST:
        return "plain", _name_colour(_lab(mean.clip(0, 255)), tints, TINT_LIMIT)
    light, dark = ends[strongest]
    if contrasts[strongest] < LEAST_CONTRAST or contrasts[1 - strongest] > FLATTEST:
        return None, None
    if _name_colour(light, tints, TINT_LIMIT) != "white":
        return None, None
    return ("striped", "gradient")[strongest], _name_colour(dark, tints, TINT_LIMIT)


# Things


def _look_at_thing(image: np.ndarray, rows: np.ndarray, mask: np.ndarray, territory: np.ndarray) -> Sight | None:
    """Name the thing whose pixels are in ``mask``, with its soft edge in ``territory``, both bool [size, size].

    None for a blot: far too large or small, or with neither a colour nor a shape, wherever it is.
    """
    core = _core(image, rows, mask)
    colour = np.median(core, axis=0)
    name = _name_colour(_lab(colour), COLOURS, COLOUR_LIMIT)
    if name:
        away = np.linalg.norm(_lab(core) - _lab(COLOURS[name]), axis=-1)
        name = name if (away <= COLOUR_LIMIT).mean() >= PURE else None
    shape, radius, centre, fit = _fit(_alpha(image, rows, territory, colour))
    well_fit = fit >= LEAST_FIT[shape]
    size, ratio = min(((size, _ratio(radius, RADII[size])) for size in RADII), key=lambda pair: pair[1])
    if ratio > BLOT or not (name or well_fit):
        return None
    place, distance = min(((place, np.hypot(*(centre - PLACES[place]))) for place in PLACES), key=lambda pair: pair[1])
    return Sight(
        colour=name,
        shape=shape if well_fit else None,
        size=size if ratio <= SIZE_LIMIT else None,
        place=place if distance <= PLACE_LIMIT else None,
    )


def _ratio(a: float, b: float) -> float:
    """The larger one by the smaller one."""
    return max(a / b, b / a)


def _core(image: np.ndarray, rows: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The pixels of a thing that its edge does not touch, uint8 [pixels, 3]."""
    inner = mask.copy()
    for _ in range(max(1, len(image) // 96)):
        inner = erosion(inner)
    if inner.sum() >= 0.3 * mask.sum():
        return image[inner]
    # A thin thing is all edge: those least like the background.
    contrast = np.abs(image - rows[:, None]).sum(-1)[mask]
    return image[mask][contrast >= np.median(contrast)]


def _alpha(image: np.ndarray, rows: np.ndarray, territory: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """The share of every pixel that a thing of that colour covers, 0 to 1, edges made harder: float64 [size, size]."""
    towards = colour - rows
    length = np.maximum((towards**2).sum(1), 1)
    alpha = ((image - rows[:, None]) * towards[:, None]).sum(-1) / length[:, None]
    return np.where(territory, ((alpha - 0.5) * SHARPEN + 0.5).clip(0, 1), 0)


def _fit(alpha: np.ndarray) -> tuple[str, float, np.ndarray, float]:
    """The best shape, its radius, its centre (x, y: float64 [2]), and its overlap with ``alpha``, 1 if they are alike.

    Every shape's origin is its centre of mass, so that place and radius follow from the mass and only turns are tried.
    """
    size = len(alpha)
    ys, xs = np.nonzero(alpha > 0)
    if len(xs) == 0:
        return SHAPES[0], RADII["small"], np.zeros(2), 0.0
    top, left = max(0, ys.min() - 2), max(0, xs.min() - 2)
    side = max(ys.max() - top, xs.max() - left) + 3
    crop = alpha[top : top + side, left : left + side]
    crop = np.pad(crop, ((0, side - crop.shape[0]), (0, side - crop.shape[1])))
    area = crop.sum()
    axis = (np.arange(side) + 0.5) / side
    centre = np.array([(crop.sum(0) * axis).sum(), (crop.sum(1) * axis).sum()]) / area
    best = 0.0, SHAPES[0], 1.0
    for shape in SHAPES:
        radius = np.sqrt(area / _unit_area(shape))  # in pixels
        for turn in (0,) if shape in ("circle", "ring") else TURNS:
            template = coverage(shape, centre, radius / side, turn, side)
            best = max(
                best, (float(np.minimum(crop, template).sum() / np.maximum(crop, template).sum()), shape, radius)
            )
    fit, shape, radius = best
    return shape, float(radius / size), (centre * side + (left, top)) / size, fit


@functools.cache
def _unit_area(shape: str) -> float:
    """The area of a shape of radius 1."""
    return coverage(shape, np.array([0.5, 0.5]), 1 / 3, 0, 300).sum() * (3 / 300) ** 2
