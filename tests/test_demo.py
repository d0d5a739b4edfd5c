"""Images that can be judged: the demonstration checkpoints, generated from bundles and by diffusers.

Parity (test_parity.py) says that an image is diffusers'; here code looks at the image and says whether it shows what
the prompt asked for.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from train_demo.data import held_back_for_edges
from train_demo.evaluate import Row, draw, evaluate, rows, scores_of
from train_demo.judge import Scores, judge
from train_demo.scenes import render
from unseen_scenes import captions, scenes

from hypersd import Pipeline
from hypersd.engines.openvino.library import has_native_bf16
from hypersd.export import ExportOptions, SourceOptions, export_bundle
from hypersd.export.checkpoints import DEMO_CONTROLNET
from hypersd.export.controlnet_sources import ControlNetSource
from hypersd.export.repositories import DEMO_ROOT
from hypersd.runtime.control_images import canny
from hypersd.samplers import DDIM, LCM
from hypersd.samplers.ddim import DDIMStep
from hypersd.samplers.tcd import TCDStep

PROMPTS = 32
UNIFIED = "Hyper-Demo15-1step-lora"
# Every sampler, and which row of the table of figures is the same checkpoint with the same settings.
GENERATED = {
    "DDIM, 2 steps": ("Hyper-Demo15-2steps-lora", {}, "2steps-lora, DDIM"),
    "DDIM, 8 steps, guidance": ("Hyper-Demo15-8steps-CFG-lora", {}, "8steps-CFG-lora, DDIM"),
    "TCD, 1 step": (UNIFIED, {"num_inference_steps": 1}, "1step-lora, TCD, 1 step, eta 1"),
    "TCD, 4 steps, eta 1": (UNIFIED, {"num_inference_steps": 4}, "1step-lora, TCD, 4 steps, eta 1"),
    "LCM": ("Hyper-DemoXL-1step-Unet", {}, "DemoXL 1step-Unet, LCM"),
}


@pytest.fixture(scope="session")
def demo_pipeline(shared_folder: Path) -> Callable[..., Pipeline]:
    """``demo_pipeline(name, precision, vae, backend)``: a demonstration checkpoint, exported once a session."""
    folder = shared_folder / "demo"

    @functools.cache
    def load(name: str, precision: str = "fp32", vae: str | None = None, backend: str = "auto") -> Pipeline:
        options = ExportOptions(sources=SourceOptions(vae=vae), precision=precision)
        return Pipeline.load(export_bundle(name, folder / f"{name}-{precision}-{vae}", options).root, backend)

    return load


def generated_by_us(pipe: Pipeline, **call: Any) -> np.ndarray:
    """One image a prompt, whose place in the list is its seed: uint8 [N, H, W, 3]."""
    made = [pipe(prompt, seed=seed, output_type="np", **call).images for seed, prompt in enumerate(captions(PROMPTS))]
    return np.round(np.concatenate(made) * 255).astype(np.uint8)


@pytest.fixture(scope="session")
def generated(demo_pipeline) -> Callable[[str], np.ndarray]:
    """``generated(name)``: the images of a float32 bundle with one of these settings, made once a session."""

    @functools.cache
    def images(name: str) -> np.ndarray:
        checkpoint, call, _ = GENERATED[name]
        return generated_by_us(demo_pipeline(checkpoint), **call)

    return images


@pytest.fixture(scope="session")
def score(generated) -> Callable[[str], Scores]:
    """``score(name)``: what the judge says of these images."""
    return functools.cache(lambda name: scores_of(generated(name), scenes(PROMPTS)))


def row_named(name: str) -> Row:
    return next(row for row in rows() if row.name == name)


@functools.cache
def generated_by_diffusers(name: str) -> np.ndarray:
    """The images of a row of the table of figures."""
    row = row_named(name)
    return draw(row.pipeline(DEMO_ROOT), captions(PROMPTS), **row.call)


@pytest.mark.parametrize("name", GENERATED)
def test_bundles_generate_diffusers_images_and_what_was_asked(name: str, generated, score) -> None:
    """Image by image the judge says of the bundle's what it says of diffusers'; and it says that they are right."""
    _, _, row = GENERATED[name]
    ours, theirs = generated(name), generated_by_diffusers(row)
    pairs = zip(ours, theirs, scenes(PROMPTS), strict=True)
    differ = [
        captions(PROMPTS)[i] for i, (our, their, scene) in enumerate(pairs) if judge(our, scene) != judge(their, scene)
    ]
    # The judge has thresholds: an image that lies on one may fall to either side by rounding alone.
    assert len(differ) <= 1, differ
    assert score(name).overall > 0.95


def test_half_precision_loses_nothing(demo_pipeline, score) -> None:
    """float16 graphs of several steps follow the prompt as often as float32 graphs."""
    name = "TCD, 4 steps, eta 1"
    checkpoint, call, _ = GENERATED[name]
    images = generated_by_us(demo_pipeline(checkpoint, "fp16", backend="onnxruntime"), **call)
    half, full = scores_of(images, scenes(PROMPTS)), score(name)
    assert abs(half.overall - full.overall) <= 0.02, (half, full)


@pytest.mark.parametrize("name", ["TCD, 1 step", "TCD, 4 steps, eta 1"])
def test_bfloat16_on_the_cpu_loses_nothing(name: str, demo_pipeline, generated, score) -> None:
    """OpenVINO's bfloat16 follows the prompt as often as float32; without bfloat16 it reports float32."""
    checkpoint, call, _ = GENERATED[name]
    fast = demo_pipeline(checkpoint, backend="openvino")
    assert fast.choice.precision == ("bf16" if has_native_bf16() else "fp32")
    ours, theirs = generated_by_us(fast, **call), generated(name)
    assert abs(scores_of(ours, scenes(PROMPTS)).overall - score(name).overall) <= 0.02
    errors = np.mean((ours.astype(float) - theirs) ** 2, axis=(1, 2, 3))
    assert -10 * np.log10(errors.max() / 255**2) > 35, "dB: seen 40 in one step, 51 in four"


def test_the_tiny_decoder_keeps_what_is_seen(demo_pipeline, score) -> None:
    """``--vae tiny`` costs sharpness, not the image."""
    name = "TCD, 1 step"
    images = generated_by_us(demo_pipeline(UNIFIED, vae="tiny"), **GENERATED[name][1])
    tiny, full = scores_of(images, scenes(PROMPTS)), score(name)
    assert tiny.overall > full.overall - 0.1, (tiny, full)


# Under the ControlNet: what the caption leaves out, the edges say.


@pytest.fixture(scope="session")
def controlled_pipeline(shared_folder: Path) -> Callable[[str], Pipeline]:
    """``controlled_pipeline(name)``: a demonstration checkpoint's bundle with the ControlNet on edges."""
    folder = shared_folder / "demo"

    @functools.cache
    def load(name: str) -> Pipeline:
        sources = SourceOptions(controlnets=(ControlNetSource(location=DEMO_CONTROLNET),))
        options = ExportOptions(sources=sources, precision="fp32")
        return Pipeline.load(export_bundle(name, folder / f"{name}-controlled", options).root)

    return load


@pytest.mark.parametrize(
    ("name", "row"), [("Hyper-Demo15-2steps-lora", "canny, 2steps-lora"), (UNIFIED, "canny, 1step-lora")]
)
def test_edges_are_followed(name: str, row: str, controlled_pipeline, figures) -> None:
    """The bundle's score is the published one, which diffusers' pipeline got; without its edges it loses it."""
    aside, prompts = zip(*held_back_for_edges(PROMPTS), strict=True)
    photos = [Image.fromarray(render(scene, np.random.default_rng(i))) for i, scene in enumerate(aside)]
    pipe = controlled_pipeline(name)

    def generated(**control: Any) -> np.ndarray:
        made = [
            pipe(caption, seed=i, control_image=canny(photo), output_type="np", **control).images
            for i, (caption, photo) in enumerate(zip(prompts, photos, strict=True))
        ]
        return np.round(np.concatenate(made) * 255).astype(np.uint8)

    followed, ignored = scores_of(generated(), aside), scores_of(generated(controlnet_conditioning_scale=0.0), aside)
    assert followed.overall == pytest.approx(figures[row]["overall"], abs=0.07)
    assert ignored.overall < followed.overall - 0.1
    assert followed.places > ignored.places + 0.5


# Ways in which samplers have been got wrong. Each takes the runtime's own part and gives the broken one.


def leading_spacing(monkeypatch: pytest.MonkeyPatch) -> None:
    def leading(sampler: DDIM, steps: int, strength: float = 1.0) -> list[int]:
        return [i * (1000 // steps) + sampler.config.steps_offset for i in reversed(range(steps))]

    monkeypatch.setattr(DDIM, "spaced_timesteps", leading)


def own_alpha_for_previous(monkeypatch: pytest.MonkeyPatch) -> None:
    """DDIM that lands at the level of noise where it began, but for the last step."""
    whole = DDIMStep.__call__

    def call(
        step: DDIMStep, model_output: torch.Tensor, sample: torch.Tensor, noise: torch.Tensor | None
    ) -> torch.Tensor:
        is_last = step.direction < 0.1
        return whole(step, model_output, sample, noise) if is_last else sample

    monkeypatch.setattr(DDIMStep, "__call__", call)


def image_and_noise_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network's output taken for the image."""

    def call(
        step: TCDStep, model_output: torch.Tensor, sample: torch.Tensor, noise: torch.Tensor | None
    ) -> torch.Tensor:
        at_s = step.signal_s * model_output + step.spread_s * sample
        return at_s if noise is None else step.keep * at_s + step.sigma * noise

    monkeypatch.setattr(TCDStep, "__call__", call)


def noise_twice_as_strong(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = TCDStep.__call__

    def call(
        step: TCDStep, model_output: torch.Tensor, sample: torch.Tensor, noise: torch.Tensor | None
    ) -> torch.Tensor:
        return whole(step, model_output, sample, None if noise is None else 2 * noise)

    monkeypatch.setattr(TCDStep, "__call__", call)


def first_timestep_of_tcd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LCM, "custom_timesteps", lambda sampler, timesteps: [999])


@pytest.mark.parametrize(
    ("name", "breaks"),
    [
        ("DDIM, 2 steps", leading_spacing),
        ("DDIM, 8 steps, guidance", own_alpha_for_previous),
        ("TCD, 1 step", image_and_noise_swapped),
        ("TCD, 4 steps, eta 1", noise_twice_as_strong),
        ("LCM", first_timestep_of_tcd),
    ],
)
def test_a_broken_sampler_loses_its_score(
    name: str, breaks: Callable[[pytest.MonkeyPatch], None], demo_pipeline, score, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The judge is strong enough to protect us: each mistake costs 15 points or more."""
    checkpoint, call, _ = GENERATED[name]
    right = score(name)  # before it is broken
    breaks(monkeypatch)
    broken = scores_of(generated_by_us(demo_pipeline(checkpoint), **call), scenes(PROMPTS))
    assert broken.overall < right.overall - 0.15, (right, broken)


# The published figures, and whether they are those of the published weights.

POINTS_LOST = {"2steps-lora, DDIM": 10, "4steps-lora, DDIM": 5, "8steps-lora, DDIM": 5, "8steps-CFG-lora, DDIM": 5}
POINTS_LOST |= {f"1step-lora, TCD, {steps}, eta 1": 10 for steps in ("1 step", "2 steps")}
POINTS_LOST |= {f"1step-lora, TCD, {steps} steps, eta 1": 5 for steps in (4, 8)}
BASE = "Demo15, DDIM, 50 steps"


@pytest.fixture(scope="session")
def figures() -> Mapping[str, Mapping[str, Any]]:
    """Shares of 200 prompts, from 0 to 1, as scripts/train_demo wrote them beside the weights."""
    return json.loads((DEMO_ROOT / "figures.json").read_text())


def test_figures_are_complete(figures) -> None:
    """Every row that can be generated has its figures, in the table's order."""
    assert list(figures) == [row.name for row in rows()]


@pytest.mark.parametrize("name", ["Demo15, DDIM, 50 steps", "DemoXL, DDIM, 50 steps"])
def test_the_bases_are_good_enough_to_judge_others_by(name: str, figures) -> None:
    assert figures[name]["colours"] >= 0.95
    assert figures[name]["shapes"] >= 0.85


@pytest.mark.parametrize("name", POINTS_LOST)
@pytest.mark.parametrize("part", ["overall", "colours", "shapes"])
def test_few_steps_lose_few_points(name: str, part: str, figures) -> None:
    assert figures[name][part] >= figures[BASE][part] - POINTS_LOST[name] / 100


@pytest.mark.parametrize("name", [row.name for row in rows() if row.control])
def test_mistakes_show_in_the_figures(name: str, figures) -> None:
    """Every negative control is 15 points worse than what it is the control of."""
    assert figures[name]["overall"] <= figures[figures[name]["control"]]["overall"] - 0.15


@pytest.mark.parametrize(
    "name",
    [
        "2steps-lora, DDIM, alpha ignored",
        "4steps-lora, DDIM, step number for timestep",
        "4steps-lora, DDIM, as the unified LoRA wants it",
        "DemoXL 1step-Unet, LCM, as SD1.5's LoRA wants it",
        "canny, 2steps-lora",
        "canny, 2steps-lora, edges ignored",
        "canny, 1step-lora",
        "canny, 1step-lora, edges ignored",
    ],
)
def test_figures_are_those_of_the_weights(name: str, figures) -> None:
    """Fewer prompts give about the same share: the published weights, LoRAs and ControlNet are the ones measured."""
    scores = evaluate(row_named(name), DEMO_ROOT, PROMPTS)
    assert scores.overall == pytest.approx(figures[name]["overall"], abs=0.1)
