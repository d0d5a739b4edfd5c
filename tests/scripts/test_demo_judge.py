"""The judge of the demonstration checkpoints: fair to soft images, and merciless where a part is wrong."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.filters import gaussian
from skimage.transform import resize
from train_demo.judge import Scores, Verdict, compare, judge, look, score
from train_demo.scenes import (
    COLOURS,
    PAIRS,
    PATTERNS,
    PLACES,
    RADII,
    SHAPES,
    TINTS,
    Background,
    Scene,
    Thing,
    draw_scene,
    render,
)

CIRCLE = Thing("circle", "red", "medium", "centre")
PLAIN = Background("plain", "white")
PARTS = ("colours", "shapes", "places", "sizes", "backgrounds", "counts")


def draw_scenes(n: int, seed: int) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [draw_scene(rng) for _ in range(n)]


def judge_all(images: list[np.ndarray], scenes: list[Scene]) -> Scores:
    return score(judge(image, scene) for image, scene in zip(images, scenes, strict=True))


def worst(scores: Scores) -> float:
    return min(dataclasses.astuple(scores))


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """``sigma`` in pixels."""
    return to_bytes(gaussian(image.astype(float), sigma, channel_axis=-1))


def scale(image: np.ndarray, size: int) -> np.ndarray:
    return to_bytes(resize(image.astype(float), (size, size), order=1, anti_aliasing=True))


def to_bytes(image: np.ndarray) -> np.ndarray:
    return image.round().clip(0, 255).astype(np.uint8)


SCENES = draw_scenes(60, seed=1)
RNG = np.random.default_rng(2)
IMAGES = [render(scene, RNG) for scene in SCENES]


# Fairness


def test_clean_images_are_right():
    """A perfect model would get full marks: what is missing from 1 in a report is the model's."""
    scenes, rng = draw_scenes(300, seed=3), np.random.default_rng(4)
    assert worst(judge_all([render(scene, rng) for scene in scenes], scenes)) >= 0.99


def test_soft_and_noisy_images_are_right():
    """A VAE's soft edges and grain cost no marks."""
    rng = np.random.default_rng(5)
    images = [to_bytes(blur(image, 0.7) + rng.normal(0, 3, image.shape)) for image in IMAGES]
    assert worst(judge_all(images, SCENES)) >= 0.97


def test_halved_and_doubled_images_are_right():
    """Half the resolution, as of a coarser VAE, still tells the shapes."""
    for images in ([scale(p, 48) for p in IMAGES], [scale(scale(p, 48), 96) for p in IMAGES]):
        assert worst(judge_all(images, SCENES)) >= 0.97


def test_drift_of_colour_and_shift_are_right():
    """A little less contrast, a little warmth, two pixels of shift: still the image that was asked for."""
    images = [to_bytes(np.roll(p, (2, -2), (0, 1)) * 0.96 + (4, 0, -4)) for p in IMAGES]
    assert worst(judge_all(images, SCENES)) >= 0.97


@pytest.mark.parametrize("size", [64, 128, 192])
def test_every_size_is_judged_alike(size: int):
    """Nothing in the judge counts in pixels of 96."""
    rng = np.random.default_rng(size)
    assert worst(judge_all([render(scene, rng, size) for scene in SCENES[:30]], SCENES[:30])) >= 0.99


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_every_scene_is_judged_right_as_drawn(seed: int):
    """No combination of shapes, colours and backgrounds is beyond the judge."""
    scene = draw_scene(np.random.default_rng(seed))
    assert judge(render(scene), scene).all_right, look(render(scene))


@pytest.mark.parametrize("colours", [("blue", "blue"), ("blue", "purple")], ids=" ".join)
@pytest.mark.parametrize("pair", PAIRS, ids=" ".join)
def test_large_things_that_touch_are_told_apart(pair: tuple[str, str], colours: tuple[str, str]):
    """Two large stars overlap; they are still two."""
    rng = np.random.default_rng(6)
    for first in SHAPES:
        for second in SHAPES:
            things = (Thing(first, colours[0], "large", pair[0]), Thing(second, colours[1], "large", pair[1]))
            scene = Scene(things, Background("striped", "blue"))
            assert judge(blur(render(scene, rng), 0.7), scene).all_right, (first, second)


# Strictness

OTHERS = [
    *[("shape", shape) for shape in SHAPES if shape != CIRCLE.shape],
    *[("colour", colour) for colour in COLOURS if colour != CIRCLE.colour],
    *[("place", place) for place in PLACES if place != CIRCLE.place],
    *[("size", size) for size in RADII if size != CIRCLE.size],
]


@pytest.mark.parametrize(("part", "value"), OTHERS)
@pytest.mark.parametrize("soft", [0.0, 1.0])
def test_one_wrong_part_of_a_thing_fails_alone(part: str, value: str, soft: float):
    """A score that falls names what broke, whichever value was asked for and whichever was drawn."""
    other = dataclasses.replace(CIRCLE, **{part: value})
    for drawn, asked in ((CIRCLE, other), (other, CIRCLE)):
        image = blur(render(Scene((drawn,), Background("gradient", "green"))), soft)
        verdict = judge(image, Scene((asked,), Background("gradient", "green")))
        right = dataclasses.asdict(verdict.things[0])
        assert [name for name, is_right in right.items() if not is_right] == [part]
        assert verdict.pattern
        assert verdict.tint
        assert verdict.count


@pytest.mark.parametrize(("pattern", "tint"), [(p, t) for p in PATTERNS for t in TINTS if p == "plain" or t != "white"])
def test_a_wrong_background_fails_alone(pattern: str, tint: str):
    """Pattern and tint are told apart from each other and from the things."""
    image = blur(render(Scene((CIRCLE,), Background(pattern, tint))), 0.7)
    view = look(image)
    for asked in [Background(p, t) for p in PATTERNS for t in TINTS]:
        verdict = compare(view, Scene((CIRCLE,), asked))
        assert verdict.pattern == (asked.pattern == pattern)
        assert verdict.tint == (asked.tint == tint)
        assert all(dataclasses.astuple(verdict.things[0]))


def test_a_missing_thing_is_wrong_in_everything():
    """Drawing one thing of two is not half right in its colour."""
    pair = (Thing("star", "blue", "small", "left"), Thing("ring", "red", "large", "right"))
    verdict = judge(render(Scene(pair[1:], PLAIN)), Scene(pair, PLAIN))
    assert dataclasses.astuple(verdict.things[0]) == (False,) * 4
    assert dataclasses.astuple(verdict.things[1]) == (True,) * 4
    assert not verdict.count


def test_a_thing_too_many_fails_the_count_alone():
    """A thing that nobody asked for is seen; a speck is not."""
    scene = Scene((dataclasses.replace(CIRCLE, place="left"),), PLAIN)
    extra = Thing("star", "blue", "small", "right")
    verdict = judge(render(Scene((*scene.things, extra), PLAIN)), scene)
    assert not verdict.count
    assert dataclasses.replace(verdict, count=True).all_right
    speck = render(scene)
    speck[5:10, 80:85] = 0
    assert judge(speck, scene).all_right


def test_a_blot_fails_the_count():
    """Something that is no thing of the world spoils the image, though it is not one of the things."""
    scene = Scene((dataclasses.replace(CIRCLE, place="left", size="small"),), PLAIN)
    image = render(scene)
    image[10:90, 50:90:4] = image[10:90, 51:90:4] = image[48:50, 50:90] = (110, 80, 60)
    assert look(image).count is None
    assert dataclasses.replace(judge(image, scene), count=True, pattern=True, tint=True).all_right


def test_swapped_words_are_wrong():
    """A blue star and a red ring are not a red star and a blue ring: attributes must be bound to their things."""
    star, ring = Thing("star", "blue", "medium", "left"), Thing("ring", "red", "medium", "right")
    swapped = (dataclasses.replace(star, colour="red"), dataclasses.replace(ring, colour="blue"))
    verdict = judge(render(Scene((star, ring), PLAIN)), Scene(swapped, PLAIN))
    assert [dataclasses.astuple(thing) for thing in verdict.things] == [(False, True, True, True)] * 2
    assert verdict.count


def test_grey_and_two_coloured_things_have_no_colour():
    """The nearest of eight names is not good enough; the shape still counts."""
    scene = Scene((CIRCLE,), PLAIN)
    mask = render(scene)[..., 1] < 60
    half = mask & (np.arange(96) < 48)
    for where, colour in ((mask, (110, 80, 60)), (half, COLOURS["blue"])):
        image = render(scene)
        image[where] = colour
        thing = judge(image, scene).things[0]
        assert (thing.colour, thing.shape) == (False, True)


def test_half_a_thing_has_no_right_shape():
    """A shape needs its whole outline."""
    image = render(Scene((CIRCLE,), PLAIN))
    image[48:] = 255
    assert not judge(image, Scene((CIRCLE,), PLAIN)).things[0].shape


@pytest.mark.parametrize("turned", [np.rot90, np.flipud], ids=["rot90", "flipud"])
def test_backgrounds_the_wrong_way_round_are_wrong(turned):
    """Stripes run across, and a gradient has its tint at the bottom."""
    for pattern in ("striped", "gradient"):
        scene = Scene((CIRCLE,), Background(pattern, "yellow"))
        assert not judge(np.ascontiguousarray(turned(render(scene))), scene).pattern


# Broken samplers


def test_noise_scores_nothing():
    """Fine and coarse noise have blots in every colour and place; none of it counts."""
    rng = np.random.default_rng(7)
    fine = [rng.integers(0, 256, (96, 96, 3)).astype(np.uint8) for _ in SCENES]
    coarse = [scale(rng.integers(0, 256, (12, 12, 3)).astype(np.uint8), 96) for _ in SCENES]
    assert judge_all(fine, SCENES).overall <= 0.05
    assert judge_all(coarse, SCENES).overall <= 0.1


@pytest.mark.parametrize("value", [0, 128, 255])
def test_an_even_image_scores_nothing(value: int):
    """Black, grey or white: at most the white background of some scenes is right."""
    scores = judge_all([np.full((96, 96, 3), value, np.uint8)] * len(SCENES), SCENES)
    assert scores.overall <= 0.05
    assert scores.colours == scores.shapes == scores.places == scores.counts == 0


def test_unfinished_images_score_low():
    """Images of too few steps (noise, mush, a pale average of two images) lose their score, the worse the more."""
    rng = np.random.default_rng(8)
    noisy = [to_bytes(p + rng.normal(0, 40, p.shape)) for p in IMAGES]
    mixed = [to_bytes((a + b.astype(float)) / 2) for a, b in zip(IMAGES, IMAGES[1:] + IMAGES[:1], strict=True)]
    halves = [np.hstack([a[:, :48], b[:, 48:]]) for a, b in zip(IMAGES, IMAGES[1:] + IMAGES[:1], strict=True)]
    assert judge_all(noisy, SCENES).overall <= 0.6
    assert judge_all(mixed, SCENES).overall <= 0.3
    assert judge_all(halves, SCENES).overall <= 0.6
    assert judge_all([blur(p, 3) for p in IMAGES], SCENES).overall <= 0.85
    assert judge_all([blur(p, 6) for p in IMAGES], SCENES).overall <= 0.5


def test_a_image_of_another_prompt_scores_chance():
    """Good images that ignore their prompts are no good."""
    assert judge_all(IMAGES[1:] + IMAGES[:1], SCENES).overall <= 0.3


# Scores


def test_scores_are_shares_of_things_and_of_images():
    """Two things weigh twice in what things have, and an image once in what images have."""
    star, ring = Thing("star", "blue", "medium", "left"), Thing("ring", "red", "medium", "right")
    both = judge(render(Scene((star, ring), PLAIN)), Scene((star, ring), PLAIN))
    wrong = judge(render(Scene((CIRCLE,), PLAIN)), Scene((star,), Background("plain", "grey")))
    scores = score([both, wrong])
    assert dataclasses.astuple(scores) == pytest.approx((2 / 3, 2 / 3, 2 / 3, 1, 1 / 2, 1))
    assert scores.overall == pytest.approx((2 / 3 * 3 + 1 / 2) / 4)


def test_no_images_score_nothing():
    """An empty evaluation must not look like a pass."""
    assert dataclasses.astuple(score([])) == (0.0,) * len(PARTS)


def test_a_verdict_is_all_right_only_without_a_fault():
    """The property that the other tests lean on."""
    right = judge(render(Scene((CIRCLE,), PLAIN)), Scene((CIRCLE,), PLAIN))
    assert right.all_right
    for part in ("pattern", "tint", "count"):
        assert not dataclasses.replace(right, **{part: False}).all_right
    assert not Verdict((dataclasses.replace(right.things[0], size=False),), True, True, True).all_right


@pytest.mark.parametrize("shape", [(96, 96), (96, 64, 3), (96, 96, 4)])
def test_other_arrays_are_refused(shape: tuple[int, ...]):
    """A batch or a float image must not be judged as if it were a bad image."""
    with pytest.raises(ValueError, match="no square RGB"):
        look(np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match="float64"):
        look(np.zeros((96, 96, 3)))
