"""Images of bundles against diffusers' own pipelines: same weights, same seed, every checkpoint of the table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hypersd import Pipeline
from hypersd.export.checkpoints import CHECKPOINTS

TOLERANCE = 2e-3  # of full scale
SEED = 7
# The model card's call of each row: what diffusers is given there.
CARD = {
    "tcd": [{"num_inference_steps": n, "guidance_scale": 0.0, "eta": 1.0} for n in (1, 2, 8)],
    "lcm": [{"num_inference_steps": 1, "timesteps": [800], "guidance_scale": 0.0}],
}
PROMPT = "a photo of a cat"


def card_calls(name: str) -> list[dict[str, Any]]:
    """The arguments with which the model card calls diffusers for a checkpoint."""
    if "1step-lora" in name:
        return CARD["tcd"]
    if name.endswith("-Unet"):
        return CARD["lcm"]
    steps = int(name.split("-")[2].removesuffix("steps"))
    guidance = 5.0 if "CFG" in name else 0.0
    return [{"num_inference_steps": steps, "guidance_scale": guidance, "eta": 0.0}]


def generate_both(pipe: Pipeline, reference: Any, **arguments: Any) -> tuple[np.ndarray, np.ndarray]:
    """The bundle's and diffusers' images [B, H, W, 3] in 0..1."""
    ours = pipe(**arguments, seed=SEED, output_type="np").images
    theirs = reference(**arguments, generator=torch.Generator().manual_seed(SEED), output_type="np").images
    return ours, theirs


@pytest.mark.parametrize("name", [checkpoint.name for checkpoint in CHECKPOINTS])
def test_every_checkpoint_generates_diffusers_image(
    name: str,
    export_tiny: Callable[[str], Path],
    load_pipeline: Callable[..., Pipeline],
    reference: Callable[[str], Any],
) -> None:
    """The whole path of every row: LoRA, fusing, tracing, text, sampler and decoder change no image."""
    pipe, judge = load_pipeline(export_tiny(name)), reference(name)
    for call in card_calls(name):
        ours, theirs = generate_both(pipe, judge, prompt=PROMPT, **call)
        assert np.abs(ours - theirs).max() < TOLERANCE, call
        assert theirs.std() > 0.05, "the reference is a flat image: equality would prove nothing"


@pytest.mark.parametrize("name", [checkpoint.name for checkpoint in CHECKPOINTS])
def test_recommended_settings_are_the_model_cards(
    name: str, export_tiny: Callable[[str], Path], load_pipeline: Callable[..., Pipeline]
) -> None:
    """A call with nothing but a prompt uses the card's settings."""
    pipe = load_pipeline(export_tiny(name))
    call = card_calls(name)[0]
    plain = pipe(PROMPT, seed=SEED, output_type="np").images
    explicit = pipe(PROMPT, seed=SEED, output_type="np", **call).images
    assert np.array_equal(plain, explicit)


def test_images_depend_on_prompt_seed_and_lora(
    export_tiny: Callable[[str], Path], load_pipeline: Callable[..., Pipeline]
) -> None:
    """The tolerance is far below what a wrong prompt, seed or LoRA changes: parity above can fail."""
    one, other = (load_pipeline(export_tiny(f"Hyper-SD15-{n}steps-lora")) for n in (2, 4))
    image = one(PROMPT, seed=SEED, output_type="np").images
    changed = [
        one("red dog", seed=SEED, output_type="np"),
        one(PROMPT, seed=SEED + 1, output_type="np"),
        other(PROMPT, seed=SEED, output_type="np", num_inference_steps=2, force=True),
    ]
    for result in changed:
        assert np.abs(result.images - image).max() > 5 * TOLERANCE


@pytest.mark.parametrize("name", ["Hyper-SD15-8steps-CFG-lora", "Hyper-SDXL-8steps-CFG-lora"])
@pytest.mark.parametrize("negative", [None, "", "red dog"])
def test_guidance_and_negative_prompts(
    name: str,
    negative: str | None,
    export_tiny: Callable[[str], Path],
    load_pipeline: Callable[..., Pipeline],
    reference: Callable[[str], Any],
) -> None:
    """Negative prompts condition as in diffusers; without one SDXL's zeros and SD1.5's empty text differ."""
    arguments = {"prompt": PROMPT, "negative_prompt": negative, "num_inference_steps": 8, "guidance_scale": 7.0}
    ours, theirs = generate_both(load_pipeline(export_tiny(name)), reference(name), **arguments, eta=0.0)
    assert np.abs(ours - theirs).max() < TOLERANCE


@pytest.mark.parametrize("name", ["Hyper-SD15-1step-lora", "Hyper-SDXL-1step-lora"])
def test_lists_of_prompts_and_several_images_each(
    name: str,
    export_tiny: Callable[[str], Path],
    load_pipeline: Callable[..., Pipeline],
    reference: Callable[[str], Any],
) -> None:
    """Images come in diffusers' order and from its noise, also when a fixed batch of 1 makes it several runs."""
    arguments = {"prompt": [PROMPT, "blue dog"], "num_images_per_prompt": 2, "num_inference_steps": 4}
    ours, theirs = generate_both(
        load_pipeline(export_tiny(name)), reference(name), **arguments, guidance_scale=0.0, eta=0.5
    )
    assert ours.shape == (4, 64, 64, 3)
    assert np.abs(ours - theirs).max() < TOLERANCE


def test_a_float32_decoder_in_a_half_precision_bundle(
    sdxl_mixed_bundle: Path, load_pipeline: Callable[..., Pipeline], reference: Callable[[str], Any]
) -> None:
    """SDXL's own VAE stays float32, and gets the latents as diffusers gives them to it: cast, then scaled."""
    pipe, judge = load_pipeline(sdxl_mixed_bundle, "onnxruntime"), reference("Hyper-SDXL-1step-lora")
    assert pipe.engines["vae_decoder"].inputs["latent_sample"].dtype == "float32"
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(SEED)).half()
    with torch.no_grad():
        expected = judge.vae.decode(latents.float() / judge.vae.config.scaling_factor).sample
    assert (pipe.decode(latents) - expected).abs().max() < 1e-5


def test_dynamic_fp16_bundle_at_odd_sizes(
    sdxl_dynamic_bundle: Path, load_pipeline: Callable[..., Pipeline], reference: Callable[[str], Any]
) -> None:
    """One fp16 bundle serves every multiple of 8 in its range, guided, at half precision's own error."""
    pipe, judge = load_pipeline(sdxl_dynamic_bundle, "onnxruntime"), reference("Hyper-SDXL-8steps-CFG-lora")
    for height, width, count in [(64, 64, 1), (104, 72, 2), (88, 96, 1)]:
        arguments = {"height": height, "width": width, "num_images_per_prompt": count}
        latents = torch.randn(count, 4, height // 8, width // 8, generator=torch.Generator().manual_seed(SEED))
        ours = pipe(PROMPT, **arguments, latents=latents, output_type="latent").images
        theirs = judge(
            PROMPT, **arguments, latents=latents, num_inference_steps=8, guidance_scale=5.0, output_type="latent"
        ).images
        error = (ours.float() - theirs).abs()
        assert ours.dtype == torch.float16
        assert error.max() < 0.05 * theirs.abs().max()
        assert error.mean() < 5e-3 * theirs.abs().mean()
