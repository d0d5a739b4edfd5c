"""The demonstration style LoRAs in a slot: the judge sees each come and go with its strength, and both at once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from train_demo.judge import score
from train_demo.scenes import TINTS, render
from train_demo.style_judge import Strengths, judge_styled, strengths_of
from train_demo.styles import NAMES, restyled, white_bands
from unseen_scenes import captions, scenes

from hypersd import Pipeline
from hypersd.export import ExportOptions, SourceOptions, export_bundle
from hypersd.export.lora_sources import LoraSource
from hypersd.export.repositories import DEMO_ROOT

PROMPTS = 16
BASES = {"Hyper-Demo15-1step-lora": "Demo15", "Hyper-DemoXL-1step-Unet": "DemoXL"}


@functools.cache
def rendered() -> list[np.ndarray]:
    return [render(scene, np.random.default_rng(seed)) for seed, scene in enumerate(scenes(PROMPTS))]


def style_file(name: str, base: str = "Demo15") -> Path:
    return DEMO_ROOT / f"styles/{name}-{base}.safetensors"


# The judge


@pytest.mark.parametrize("stripes", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("background", [0.0, 0.5, 1.0])
def test_strengths_are_those_that_were_painted(stripes: float, background: float) -> None:
    images = [restyled(*pair, stripes, background) for pair in zip(rendered(), scenes(PROMPTS), strict=True)]
    seen = strengths_of(images, scenes(PROMPTS))
    assert seen.stripes == pytest.approx(stripes, abs=0.05)
    assert seen.background == pytest.approx(background, abs=0.05)


@pytest.mark.parametrize("stripes", [False, True])
@pytest.mark.parametrize("background", [False, True])
def test_scenes_are_recognised_in_styles(stripes: bool, background: bool) -> None:
    images = [
        restyled(*pair, float(stripes), float(background)) for pair in zip(rendered(), scenes(PROMPTS), strict=True)
    ]
    scores = score(judge_styled(*pair, stripes, background) for pair in zip(images, scenes(PROMPTS), strict=True))
    assert min(scores.colours, scores.places, scores.backgrounds, scores.counts) > (0.85 if stripes else 0.95)
    assert scores.shapes > (0.4 if stripes else 0.95), "white bands hide edges; chance is 0.17"


def test_what_is_no_style_is_not_taken_for_one() -> None:
    """Empty images, stripes across, and another background."""
    empty = strengths_of([np.full_like(image, 255) for image in rendered()], scenes(PROMPTS))
    assert abs(empty.stripes) < 0.01
    turned = [np.where(white_bands(96)[:, None, None], np.uint8(255), image) for image in rendered()]
    assert abs(strengths_of(turned, scenes(PROMPTS)).stripes) < 0.1
    pink = [np.full_like(image, TINTS["pink"]) for image in rendered()]
    assert strengths_of(pink, scenes(PROMPTS)).background < 0.3
    styled = [restyled(*pair, 0.0, 1.0) for pair in zip(rendered(), scenes(PROMPTS), strict=True)]
    assert score(judge_styled(*pair) for pair in zip(styled, scenes(PROMPTS), strict=True)).backgrounds == 0
    plain = zip(rendered(), scenes(PROMPTS), strict=True)
    assert score(judge_styled(*pair, background=True) for pair in plain).backgrounds == 0


# The files


@pytest.mark.parametrize("base", BASES.values())
@pytest.mark.parametrize("name", NAMES)
def test_files_fit_a_slot(name: str, base: str) -> None:
    """Small, in float16, of rank 8, over the layers of attention blocks alone."""
    file = style_file(name, base)
    tensors = load_file(file)
    assert file.stat().st_size <= 300_000
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert all("attentions" in key for key in tensors)
    assert {len(t) for key, t in tensors.items() if key.endswith(("lora_down.weight", "lora_A.weight"))} == {8}


@pytest.mark.parametrize("base", BASES.values())
def test_the_two_files_have_different_layouts(base: str) -> None:
    files = (style_file(name, base) for name in NAMES)
    with safe_open(next(files), "pt") as stripes, safe_open(next(files), "pt") as background:
        assert all(key.startswith("lora_unet_") for key in stripes.keys())  # noqa: SIM118
        assert all(key.startswith("unet.") for key in background.keys())  # noqa: SIM118
        alphas = {stripes.get_tensor(key).item() for key in stripes.keys() if key.endswith(".alpha")}  # noqa: SIM118
    assert alphas == {4.0}, "unequal to the rank, so that a reader who leaves it out is found out"


# The styles in images


@pytest.fixture(scope="module")
def slotted(export_demo_slotted: Callable[[str], Path]) -> Callable[[str], Pipeline]:
    """``slotted(checkpoint)``: a pipeline whose slot has room for both styles, which are loaded."""

    @functools.cache
    def load(checkpoint: str) -> Pipeline:
        pipe = Pipeline.load(export_demo_slotted(checkpoint))
        for name in NAMES:
            pipe.load_lora_weights(style_file(name, BASES[checkpoint]), name, strict=True)
        return pipe

    return load


@pytest.fixture(scope="module")
def styled_images(slotted: Callable[[str], Pipeline]) -> Callable[..., list[np.ndarray]]:
    """``styled_images(stripes, background, checkpoint)``: images with the styles in these strengths."""

    @functools.cache
    def generate(stripes: float, background: float, checkpoint: str = "Hyper-Demo15-1step-lora") -> list[np.ndarray]:
        return generated(slotted(checkpoint), adapters={"stripes": stripes, "background": background})

    return generate


def generated(pipe: Pipeline, **call: Any) -> list[np.ndarray]:
    made = [
        pipe(caption, seed=i, num_inference_steps=1, **call).images[0] for i, caption in enumerate(captions(PROMPTS))
    ]
    return [np.asarray(image) for image in made]


def seen(images: list[np.ndarray]) -> Strengths:
    return strengths_of(images, scenes(PROMPTS))


def test_a_plain_bundle_has_no_style(styled_images) -> None:
    plain = seen(styled_images(0.0, 0.0))
    assert abs(plain.stripes) < 0.1
    assert abs(plain.background) < 0.1


@pytest.mark.parametrize("name", NAMES)
def test_a_style_comes_with_its_strength_and_alone(name: str, styled_images) -> None:
    """At 0.5 it is between plain and whole; the other style does not come along."""
    other = next(style for style in NAMES if style != name)
    half, whole = (seen(styled_images(**{name: strength, other: 0.0})) for strength in (0.5, 1.0))
    assert 0.1 < getattr(half, name) < getattr(whole, name) - 0.2
    assert getattr(whole, name) > 0.5
    assert max(abs(getattr(half, other)), abs(getattr(whole, other))) < 0.1


def test_fused_at_export_they_are_the_same(styled_images, shared_folder: Path) -> None:
    checkpoint = "Hyper-Demo15-1step-lora"
    added = tuple(
        LoraSource(location=str(style_file(name)), scale=s) for name, s in zip(NAMES, (0.5, 1.0), strict=True)
    )
    options = ExportOptions(sources=SourceOptions(added_loras=added), precision="fp32")
    fused = generated(
        Pipeline.load(export_bundle(checkpoint, shared_folder / "demo" / f"{checkpoint}-styled", options))
    )
    strengths = dict(zip(NAMES, (0.5, 1.0), strict=True))
    for image, expected in zip(styled_images(**strengths), fused, strict=True):
        assert np.abs(image.astype(int) - expected.astype(int)).max() <= 1


def test_a_negative_strength_is_the_opposite(styled_images) -> None:
    """A slider goes below zero, and the result is not that of zero."""
    assert seen(styled_images(0.0, -1.0)).background < seen(styled_images(0.0, 0.0)).background - 0.02


def test_two_styles_at_once(styled_images) -> None:
    both = seen(styled_images(1.0, 1.0))
    assert both.stripes > 0.45
    assert both.background > 0.65


def test_the_styles_of_sdxl(styled_images) -> None:
    """Each comes alone, and both at once, with the whole UNet that one step wants."""
    name = "Hyper-DemoXL-1step-Unet"
    stripes, background, both = (seen(styled_images(*pair, name)) for pair in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)))
    assert min(stripes.stripes, both.stripes) > 0.4
    assert min(background.background, both.background) > 0.6
    assert max(abs(stripes.background), abs(background.stripes)) < 0.1


@pytest.mark.parametrize(("stripes", "background"), [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_styled_images_show_their_scenes(stripes: float, background: float, styled_images) -> None:
    pairs = zip(styled_images(stripes, background), scenes(PROMPTS), strict=True)
    scores = score(judge_styled(*pair, stripes > 0, background > 0) for pair in pairs)
    assert scores.colours > (0.5 if stripes else 0.8), "stripes blur; chance is 0.13"
    assert scores.places > 0.8
