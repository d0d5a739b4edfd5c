"""Init images and masks that can be judged: the demonstration checkpoint repaints, moves and recolours shapes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from train_demo.judge import judge
from train_demo.scenes import PLACES, SIZE, Background, Scene, Thing, describe, render

from hypersd import Pipeline

LEFT, RIGHT = Thing("circle", "red", "large", "left"), Thing("square", "yellow", "large", "right")
REPAINTED = Thing("star", "green", "large", "right")
MOST_OUTSIDE = 2.0  # of 255, the mean error where the mask keeps the image: it goes through the VAE


def scene(*things: Thing, tint: str = "blue") -> Scene:
    return Scene(things, Background("plain", tint))


def caption(wanted: Scene) -> str:
    return describe(wanted, np.random.default_rng(0))


def picture(shown: Scene) -> Image.Image:
    return Image.fromarray(render(shown))


def right_half() -> Image.Image:
    mask = Image.new("L", (SIZE, SIZE))
    mask.paste(255, (SIZE // 2, 0, SIZE, SIZE))
    return mask


def is_right(image: Image.Image, wanted: Scene) -> bool:
    return all(all(dataclasses.astuple(thing)) for thing in judge(np.asarray(image), wanted).things)


def error_outside(image: Image.Image, before: Image.Image) -> float:
    pixels, original = (np.asarray(one, np.float64)[:, : SIZE // 2] for one in (image, before))
    return float(np.abs(pixels - original).mean())


@pytest.fixture(scope="module")
def pipe(demo_bundle: Path) -> Pipeline:
    return Pipeline.load(demo_bundle)


def test_a_shape_is_repainted_through_a_mask(pipe: Pipeline) -> None:
    """It changes inside the mask, and stays outside."""
    before, wanted = picture(scene(RIGHT)), scene(REPAINTED)
    for seed in range(4):
        image = pipe(caption(wanted), image=before, mask_image=right_half(), num_inference_steps=4, seed=seed).images[0]
        assert is_right(image, wanted)
        assert error_outside(image, before) < MOST_OUTSIDE


def test_a_crop_leaves_every_pixel_outside_as_it_is(pipe: Pipeline) -> None:
    """A second shape stands outside the mask."""
    before, wanted = picture(scene(LEFT, RIGHT)), scene(LEFT, REPAINTED)
    image = pipe(
        caption(wanted),
        image=before,
        mask_image=right_half(),
        padding_mask_crop=SIZE,
        num_inference_steps=4,
        seed=0,
    ).images[0]
    assert is_right(image, wanted)
    assert error_outside(image, before) == 0


@pytest.mark.parametrize("place", PLACES)
def test_a_painted_shape_decides_place_and_colour(place: str, pipe: Pipeline) -> None:
    """The prompt says neither where the shape is; a low strength keeps what was painted."""
    painted = scene(Thing("circle", "purple", "large", place), tint="yellow")
    image = pipe(
        "a large purple circle on a yellow background",
        image=picture(painted),
        strength=0.2,
        keep_steps=True,
        num_inference_steps=8,
        seed=1,
    ).images[0]
    assert is_right(image, painted)


def test_a_high_strength_follows_the_prompt(pipe: Pipeline) -> None:
    """The other end of the slider: nothing of the init image is left, so the tests above can fail."""
    wanted = scene(Thing("star", "green", "large", "centre"), tint="pink")
    start = picture(scene(RIGHT))
    image = pipe(caption(wanted), image=start, strength=1.0, num_inference_steps=4, seed=2).images[0]
    assert is_right(image, wanted)
    assert not is_right(image, scene(RIGHT))


def test_the_tiny_encoder_keeps_what_is_seen(shared_folder: Path) -> None:
    """``--vae tiny``: TAESD's encoder gives latents without a sample, and its decoder reads them."""
    from hypersd.export import ExportOptions, SourceOptions, export_bundle

    name, root = "Hyper-Demo15-1step-lora", shared_folder / "demo" / "Hyper-Demo15-1step-lora-fp32-tiny"
    options = ExportOptions(sources=SourceOptions(vae="tiny"), precision="fp32")
    tiny = Pipeline.load(export_bundle(name, root, options).root)
    painted = scene(Thing("circle", "green", "large", "top left"))
    image = tiny(
        "a large green circle on a blue background",
        image=picture(painted),
        strength=0.16,
        keep_steps=True,
        num_inference_steps=8,
        seed=1,
    ).images[0]
    assert is_right(image, painted)
