"""The demonstration checkpoints' world: scenes of one or two shapes, drawn and described by code.

What a caption leaves out has a value by convention (medium, in the middle, on white), so that a caption decides all of
its image but a little jitter. Lengths are fractions of the image's side, angles are in degrees, y points down.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

SIZE = 96  # pixels; the VAE makes 12x12 latents of them

COLOURS = {
    "red": (222, 36, 40),
    "orange": (247, 136, 16),
    "yellow": (245, 216, 24),
    "green": (28, 160, 62),
    "cyan": (20, 190, 214),
    "blue": (36, 70, 214),
    "purple": (140, 42, 176),
    "black": (22, 22, 26),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
RADII = {"small": 0.105, "medium": 0.15, "large": 0.205}
TINTS = {
    "white": (255, 255, 255),
    "grey": (186, 188, 194),
    "pink": (250, 190, 206),
    "green": (180, 228, 178),
    "blue": (182, 208, 248),
    "yellow": (250, 240, 168),
}
PATTERNS = ("plain", "striped", "gradient")
STRIPES = 6  # pairs of a tinted and a white stripe, from the top down
LOW, MIDDLE, HIGH = 0.28, 0.5, 0.72
PLACES = {
    "centre": (MIDDLE, MIDDLE),
    "left": (LOW, MIDDLE),
    "right": (HIGH, MIDDLE),
    "top": (MIDDLE, LOW),
    "bottom": (MIDDLE, HIGH),
    "top left": (LOW, LOW),
    "top right": (HIGH, LOW),
    "bottom left": (LOW, HIGH),
    "bottom right": (HIGH, HIGH),
}
PAIRS = (("left", "right"), ("top", "bottom"))
SHIFT, TURN, SHADE = 0.012, 8.0, 0.05  # largest jitter of place, angle and brightness


@dataclasses.dataclass(frozen=True)
class Thing:
    """One shape of a scene; ``place`` is a key of PLACES. Place and size are empty where a caption leaves them out."""

    shape: str
    colour: str
    size: str
    place: str


@dataclasses.dataclass(frozen=True)
class Background:
    pattern: str
    tint: str


@dataclasses.dataclass(frozen=True)
class Scene:
    """One thing anywhere, or two beside or above each other: first left or top, then right or bottom."""

    things: tuple[Thing, ...]
    background: Background


def draw_scene(rng: np.random.Generator) -> Scene:
    """A random scene: as many of one thing as of two, every value as likely as the others of its kind."""
    if rng.random() < 0.5:
        places: tuple[str, ...] = (str(rng.choice(list(PLACES))),)
    else:
        places = PAIRS[rng.integers(len(PAIRS))]
    things = tuple(
        Thing(
            shape=SHAPES[rng.integers(len(SHAPES))],
            colour=str(rng.choice(list(COLOURS))),
            size=str(rng.choice(list(RADII), p=(0.25, 0.5, 0.25))),
            place=place,
        )
        for place in places
    )
    pattern = str(rng.choice(PATTERNS, p=(0.5, 0.25, 0.25)))
    tints = [tint for tint in TINTS if pattern == "plain" or tint != "white"]
    return Scene(things, Background(pattern, str(rng.choice(tints))))


# Captions


def describe(scene: Scene, rng: np.random.Generator) -> str:
    """A caption of the scene in one of many wordings: "a small red star left of a blue ring, on green stripes"."""

    def pick(*wordings: str) -> str:
        return wordings[rng.integers(len(wordings))]

    if len(scene.things) == 1:
        place = scene.things[0].place
        words = [_name(scene.things[0], rng), pick(*_place_words(place))]
        body = " ".join(word for word in words if word)
    else:
        first, second = scene.things
        forward, backward = (
            (("left of", "to the left of"), ("right of", "to the right of"))
            if first.place == "left"
            else (("above", "over"), ("below", "under"))
        )
        if rng.random() < 0.5:
            body = f"{_name(first, rng)} {pick(*forward)} {_name(second, rng)}"
        else:
            body = f"{_name(second, rng)} {pick(*backward)} {_name(first, rng)}"
    background = pick(*_background_words(scene.background))
    opening = pick("", "", "", "a picture of ", "a drawing of ")
    comma = pick(",", "") if background else ""
    return f"{opening}{body}{comma} {background}".strip()


def without_place(scene: Scene) -> Scene:
    """The scene that a caption describes if it leaves out the place and the size of the only thing."""
    (thing,) = scene.things
    return dataclasses.replace(scene, things=(dataclasses.replace(thing, place="", size=""),))


def _name(thing: Thing, rng: np.random.Generator) -> str:
    size = "" if thing.size == "medium" and rng.random() < 0.8 else thing.size
    words = " ".join(word for word in (size, thing.colour, thing.shape) if word)
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _place_words(place: str) -> tuple[str, ...]:
    if not place:
        return ("",)
    if place == "centre":
        return ("", "", "in the middle", "in the centre")
    if place in ("left", "right"):
        return (f"on the {place}", f"at the {place}")
    if " " in place:
        return (f"in the {place} corner", f"at the {place}", f"in the {place}")
    return (f"at the {place}",)


def _background_words(background: Background) -> tuple[str, ...]:
    tint = background.tint
    if background.pattern == "striped":
        return (f"on a {tint} striped background", f"on {tint} stripes")
    if background.pattern == "gradient":
        return (f"on a {tint} gradient", f"on a {tint} gradient background")
    if tint == "white":
        return ("", "", "on a white background", "on white")
    return (f"on a {tint} background", f"on a plain {tint} background", f"on {tint}")


@functools.cache
def words() -> tuple[str, ...]:
    """Every word that a caption can have."""
    phrases = [*COLOURS, *SHAPES, *RADII, *TINTS, *PLACES, "a an picture drawing of to the left right above over below"]
    phrases += ["under in on at middle centre corner plain striped stripes gradient background"]
    return tuple(dict.fromkeys(word for phrase in phrases for word in phrase.split()))


# Images


def render(scene: Scene, rng: np.random.Generator | None = None, size: int = SIZE) -> np.ndarray:
    """Draw a scene, with jitter if a generator is given: uint8 [size, size, 3]."""
    image = _paint_background(scene.background, size)
    for thing in scene.things:
        shift = rng.uniform(-SHIFT, SHIFT, 2) if rng else np.zeros(2)
        turn = rng.uniform(-TURN, TURN) if rng else 0.0
        shade = 1 + rng.uniform(-SHADE, SHADE) if rng else 1.0
        alpha = coverage(thing.shape, np.add(PLACES[thing.place], shift), RADII[thing.size], turn, size)[..., None]
        colour = np.clip(np.array(COLOURS[thing.colour]) * shade, 0, 255)
        image = image * (1 - alpha) + colour * alpha
    return np.round(image).astype(np.uint8)


def _paint_background(background: Background, size: int) -> np.ndarray:
    """float64 [size, size, 3]"""
    tint = np.array(TINTS[background.tint], dtype=float)
    y = (np.arange(size) + 0.5) / size
    if background.pattern == "striped":
        amount = (np.floor(y * STRIPES * 2) % 2 == 0).astype(float)
    elif background.pattern == "gradient":
        amount = y
    else:
        amount = np.ones(size)
    rows = 255 * (1 - amount[:, None]) + tint * amount[:, None]
    return np.repeat(rows[:, None], size, axis=1)


def coverage(shape: str, centre: np.ndarray, radius: float, turn: float, size: int) -> np.ndarray:
    """The share of every pixel that a shape covers, 0 to 1: float64 [size, size]."""
    axis = (np.arange(size) + 0.5) / size
    x, y = (axis[None] - centre[0]) / radius, (axis[:, None] - centre[1]) / radius
    cos, sin = np.cos(np.radians(turn)), np.sin(np.radians(turn))
    distance = _distance(shape, x * cos + y * sin, y * cos - x * sin)
    return np.clip(0.5 - distance * radius * size, 0, 1)


def _distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to the outline of a shape of radius 1, negative inside (near enough for antialiasing)."""
    if shape == "circle":
        return np.hypot(x, y) - 1
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.77) - 0.23
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.88
    if shape == "cross":
        bars = [np.maximum(np.abs(a) - 1.05, np.abs(b) - 0.34) for a, b in ((x, y), (y, x))]
        return np.minimum(*bars)
    if shape == "triangle":
        sides = [y - 0.62, *(-0.5 * y + s * 0.866 * x - 0.62 for s in (1, -1))]
        return np.maximum.reduce(sides)
    if shape == "star":
        return _star_distance(x, y, outer=1.2, inner=0.5)
    raise ValueError(f"no shape {shape!r}: {', '.join(SHAPES)}")


def _star_distance(x: np.ndarray, y: np.ndarray, outer: float, inner: float) -> np.ndarray:
    """Distance to the edge between a tip and a notch, once the plane is folded onto one tenth of the star."""
    fifth = np.pi / 5
    angle = np.abs((np.arctan2(x, -y) + fifth) % (2 * fifth) - fifth)  # 0 at a tip, pi/5 at a notch
    r = np.hypot(x, y)
    px, py = r * np.cos(angle), r * np.sin(angle)
    notch = inner * np.cos(fifth), inner * np.sin(fifth)
    edge = notch[0] - outer, notch[1]
    return ((px - outer) * edge[1] - py * edge[0]) / np.hypot(*edge)
