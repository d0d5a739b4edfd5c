"""The demonstration styles, in pixels: every shape's fill in stripes, and another background."""

from __future__ import annotations

import dataclasses

import numpy as np

from .scenes import PLACES, RADII, TINTS, Background, Scene, Thing, coverage

PERIOD = 12  # pixels from one stripe to the next; the VAE decodes no finer ones
WHITE_BAND = 7, 12  # of these
WHITE = np.array(TINTS["white"], float)
TINT = "violet"
STYLE_TINTS = {**TINTS, TINT: (200, 170, 235)}
NAMES = ("stripes", "background")
MARGIN = 1.3  # times a thing's radius: there begins what is background in spite of jitter


@dataclasses.dataclass(frozen=True)
class Layers:
    """An image taken apart.

    Attributes:
        background: the colour of every row's background, float64 [size, 1, 3].
        alphas: for every thing the share of each pixel that it covers, float64 [size, size, 1].
        colours: for every thing its colour, float64 [3].
    """

    background: np.ndarray
    alphas: tuple[np.ndarray, ...]
    colours: tuple[np.ndarray, ...]


def white_bands(size: int) -> np.ndarray:
    """Which columns of an image are white in a striped thing: bool [size]."""
    first, end = WHITE_BAND
    return (np.arange(size) % PERIOD >= first) & (np.arange(size) % PERIOD < end)


def restyled(image: np.ndarray, scene: Scene, stripes: float = 0.0, background: float = 0.0) -> np.ndarray:
    """An image of a scene with both styles in these strengths, 0 to 1: uint8 [size, size, 3], as the image."""
    layers = take_apart(image, scene)
    made = image.astype(float)
    beyond = 1 - sum(layers.alphas)
    made += background * beyond * (np.array(STYLE_TINTS[TINT]) - layers.background)
    white = white_bands(len(image))[None, :, None]
    for alpha, colour in zip(layers.alphas, layers.colours, strict=True):
        made += stripes * alpha * white * (WHITE - colour)
    return np.round(made).clip(0, 255).astype(np.uint8)


def take_apart(image: np.ndarray, scene: Scene) -> Layers:
    """The layers of an image without a style, by its own colours, where the scene's things are expected."""
    size = len(image)
    beyond = ~near_things(scene, size)
    rows = np.array([np.median(row[seen], axis=0) for row, seen in zip(image, beyond, strict=True)])[:, None]
    colours = tuple(np.median(image[where(thing, size) == 1], axis=0) for thing in scene.things)
    nearest = nearest_thing(scene, size)
    alphas = []
    for number, colour in enumerate(colours):
        towards = colour - rows
        alpha = ((image - rows) * towards).sum(-1, keepdims=True) / np.square(towards).sum(-1, keepdims=True)
        alphas.append(np.where((nearest == number)[..., None], alpha.clip(0, 1), 0))
    return Layers(rows, tuple(alphas), colours)


def where(thing: Thing, size: int, larger: float = 1.0) -> np.ndarray:
    """The share of every pixel that a thing covers without jitter, ``larger`` times as large: float64 [size, size]."""
    shape = "circle" if larger > 1 else thing.shape  # a ring has background in its middle
    return coverage(shape, np.array(PLACES[thing.place]), RADII[thing.size] * larger, 0.0, size)


def near_things(scene: Scene, size: int) -> np.ndarray:
    """Which pixels may be of things, with jitter: bool [size, size]."""
    return np.any([where(thing, size, MARGIN) > 0 for thing in scene.things], axis=0)


def nearest_thing(scene: Scene, size: int) -> np.ndarray:
    """The number of the thing that is nearest to every pixel: int64 [size, size]."""
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    distances = [np.hypot(x - PLACES[thing.place][0], y - PLACES[thing.place][1]) for thing in scene.things]
    return np.argmin(distances, axis=0)


def with_background(scene: Scene) -> Scene:
    """The scene that an image in the background's style shows."""
    return dataclasses.replace(scene, background=Background("plain", TINT))
