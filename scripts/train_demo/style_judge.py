"""Says by pixels how much of each demonstration style an image has, and whether it still shows its scene."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
from skimage.morphology import dilation, erosion

from .judge import Verdict, judge
from .scenes import COLOURS, TINTS, Scene, render
from .styles import STYLE_TINTS, TINT, WHITE, near_things, where, white_bands, with_background


@dataclasses.dataclass(frozen=True)
class Strengths:
    """How far images are on the way from plain, 0, to each style, 1."""

    stripes: float
    background: float


def strengths_of(images: Iterable[np.ndarray], scenes: Iterable[Scene]) -> Strengths:
    """The means over images, uint8 [size, size, 3] each."""
    seen = [
        (stripes_in(image, scene), background_in(image, scene)) for image, scene in zip(images, scenes, strict=True)
    ]
    stripes, background = np.mean(seen, axis=0)
    return Strengths(float(stripes), float(background))


def stripes_in(image: np.ndarray, scene: Scene) -> float:
    """The difference between the bands within things: 0 for plain ones, 1 for white and the thing's colour.

    The mean over the scene's things; one that is missing has no stripes.
    """
    white, found = white_bands(len(image)), []
    for thing in scene.things:
        inner = erosion(where(thing, len(image)) == 1)
        bands = [image[inner & columns].mean(axis=0) for columns in (~white, white)]
        way = WHITE - COLOURS[thing.colour]
        found.append((bands[1] - bands[0]) @ way / (way @ way))
    return float(np.mean(found))


def background_in(image: np.ndarray, scene: Scene) -> float:
    """The share of the way from the scene's background to the style's, over all pixels beyond the things.

    It counts what is left of the way, so that another way leads nowhere.
    """
    beyond = ~near_things(scene, len(image))
    plain = render(dataclasses.replace(scene, things=()), size=len(image))
    away = [np.linalg.norm(some[beyond] - np.array(STYLE_TINTS[TINT], float), axis=-1).sum() for some in (image, plain)]
    return float(1 - away[0] / away[1])


def judge_styled(image: np.ndarray, scene: Scene, stripes: bool = False, background: bool = False) -> Verdict:
    """Compare an image that has styles with the scene that it shows in spite of them."""
    if stripes:
        image = without_stripes(image)
    if background:
        return judge(image, with_background(scene), STYLE_TINTS)
    return judge(image, scene, TINTS)


def without_stripes(image: np.ndarray) -> np.ndarray:
    """The image with every white band painted over, from the coloured columns on both of its sides.

    Columns beside a white band are painted over too: they are blurred.
    """
    blurred = dilation(white_bands(len(image)), np.ones(3))
    every, columns = np.arange(len(image)), np.flatnonzero(~blurred)
    made = image.copy()
    for row, channel in np.ndindex(len(image), 3):
        made[row, :, channel] = np.interp(every, columns, image[row, columns, channel])
    return made
