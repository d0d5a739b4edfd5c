"""Images from an init image, with and without a mask, against diffusers' own pipelines: same weights, same seed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers_pipelines import make_pipeline
from PIL import Image, ImageDraw

from hypersd import Pipeline
from hypersd.errors import RequestError
from hypersd.export.checkpoints import CHECKPOINTS

TOLERANCE = 2e-3  # of full scale
SEED = 7
SIDE = 64
PROMPT = "a photo of a cat"
STRENGTHS = (0.3, 0.6, 1.0)
ROWS = {  # steps of which a strength of 0.3 leaves one, and the settings of the sampler
    "1step-lora": {"num_inference_steps": 4, "eta": 0.7},
    "-Unet": {"num_inference_steps": 4},
    "lora": {"num_inference_steps": 8, "eta": 0.0},
}
EACH_CHECKPOINT = pytest.mark.parametrize("name", [checkpoint.name for checkpoint in CHECKPOINTS])
SAMPLERS = ["Hyper-SD15-1step-lora", "Hyper-SDXL-1step-Unet", "Hyper-SDXL-8steps-CFG-lora"]


def settings(name: str) -> dict[str, Any]:
    row = next(row for end, row in ROWS.items() if name.endswith(end))
    return {**row, "guidance_scale": 5.0 if "CFG" in name else 0.0}


def photo(seed: int = 0) -> Image.Image:
    """An image with structure at every scale."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (5, 5, 3), np.uint8)).resize(
        (SIDE, SIDE), Image.Resampling.BICUBIC
    )
    grain = generator.integers(-20, 20, (SIDE, SIDE, 3))
    return Image.fromarray(np.clip(np.asarray(coarse, np.int64) + grain, 0, 255).astype(np.uint8))


def mask(box: tuple[int, int, int, int]) -> Image.Image:
    image = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(image).rectangle(box, fill=255)
    return image


MASKS = {"part": mask((16, 8, 47, 39)), "pixel": mask((24, 40, 24, 40)), "whole": mask((0, 0, SIDE, SIDE))}


@pytest.fixture(scope="module")
def judges(reference: Callable[[str], Any]) -> Callable[[str, str], Any]:
    """``judges(name, kind)``: diffusers' pipeline, ``Img2Img`` or ``Inpaint``, with ``reference``'s parts."""

    @functools.cache
    def judge(name: str, kind: str) -> Any:
        return make_pipeline(name, kind, reference(name).components)

    return judge


@pytest.fixture(scope="module")
def load(export_tiny: Callable[[str], Path], load_pipeline: Callable[..., Pipeline]) -> Callable[[str], Pipeline]:
    return lambda name: load_pipeline(export_tiny(name))


def both(pipe: Pipeline, judge: Any, **arguments: Any) -> tuple[np.ndarray, np.ndarray]:
    """The bundle's and diffusers' images [B, H, W, 3] in 0..1."""
    ours = pipe(PROMPT, **arguments, seed=SEED, output_type="np", force=True).images
    size = {"height": SIDE, "width": SIDE} if "mask_image" in arguments else {}
    generator = torch.Generator().manual_seed(SEED)
    theirs = judge(PROMPT, **arguments, **size, generator=generator, output_type="np").images
    return ours, theirs


@EACH_CHECKPOINT
def test_every_checkpoint_starts_from_an_image_as_diffusers_does(
    name: str, load: Callable[[str], Pipeline], judges: Callable[[str, str], Any]
) -> None:
    """The encoder's sample, the order of the draws, the steps that are left: strength by strength."""
    for strength in STRENGTHS:
        ours, theirs = both(load(name), judges(name, "Img2Img"), image=photo(), strength=strength, **settings(name))
        assert np.abs(ours - theirs).max() < TOLERANCE, strength
        assert theirs.std() > 0.05, "the reference is a flat image: equality would prove nothing"


@EACH_CHECKPOINT
def test_every_checkpoint_repaints_a_mask_as_diffusers_does(
    name: str, load: Callable[[str], Pipeline], judges: Callable[[str, str], Any]
) -> None:
    """The latents outside the mask come back after every step, with the noise of the next one."""
    for strength in STRENGTHS:
        arguments = {"image": photo(), "mask_image": MASKS["part"], "strength": strength, **settings(name)}
        ours, theirs = both(load(name), judges(name, "Inpaint"), **arguments)
        assert np.abs(ours - theirs).max() < TOLERANCE, strength


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("which", ["pixel", "whole"])
def test_masks_of_one_pixel_and_of_everything(
    name: str, which: str, load: Callable[[str], Pipeline], judges: Callable[[str, str], Any]
) -> None:
    arguments = {"image": photo(), "mask_image": MASKS[which], "strength": 0.6, **settings(name)}
    ours, theirs = both(load(name), judges(name, "Inpaint"), **arguments)
    assert np.abs(ours - theirs).max() < TOLERANCE


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("masked", [False, True])
def test_two_images_of_one_prompt(
    name: str, masked: bool, load: Callable[[str], Pipeline], judges: Callable[[str, str], Any]
) -> None:
    """One generator makes one sample of the encoder for both, and noise for each."""
    arguments = {"image": photo(), "strength": 0.6, "num_images_per_prompt": 2, **settings(name)}
    arguments |= {"mask_image": MASKS["part"]} if masked else {}
    ours, theirs = both(load(name), judges(name, "Inpaint" if masked else "Img2Img"), **arguments)
    assert ours.shape == (2, SIDE, SIDE, 3)
    assert np.abs(ours - theirs).max() < TOLERANCE
    assert np.abs(ours[0] - ours[1]).max() > 10 * TOLERANCE


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("masked", [False, True])
def test_an_image_and_a_generator_for_each_prompt(
    name: str, masked: bool, load: Callable[[str], Pipeline], judges: Callable[[str, str], Any]
) -> None:
    """Every image is that of its own prompt, seed and init image alone."""
    prompts, images, seeds = [PROMPT, "blue dog"], [photo(0), photo(1)], [SEED, 8]
    masks = {"mask_image": [MASKS["part"], MASKS["pixel"]]} if masked else {}
    arguments = {"image": images, "strength": 0.6, **masks, **settings(name)}
    ours = load(name)(prompts, **arguments, seed=seeds, output_type="np", force=True).images
    size = {"height": SIDE, "width": SIDE} if masked else {}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    judge = judges(name, "Inpaint" if masked else "Img2Img")
    theirs = judge(prompts, **arguments, **size, generator=generators, output_type="np").images
    assert np.abs(ours - theirs).max() < TOLERANCE
    alone = {key: value[1] if isinstance(value, list) else value for key, value in arguments.items()}
    second = load(name)(prompts[1], **alone, seed=seeds[1], output_type="np", force=True).images
    assert np.abs(ours[1:] - second).max() < TOLERANCE / 10


@pytest.mark.parametrize("name", ["Hyper-SD15-1step-lora", "Hyper-SDXL-2steps-lora"])
@pytest.mark.parametrize("masked", [False, True])
def test_with_a_controlnet(
    name: str,
    masked: bool,
    export_controlled: Callable[[str], Path],
    controlled_reference: Callable[..., Any],
    load_pipeline: Callable[..., Pipeline],
) -> None:
    """Its range of steps is counted from the first one that runs."""
    kind = "ControlNetInpaint" if masked else "ControlNetImg2Img"
    judge = make_pipeline(name, kind, controlled_reference(name, "canny").components)
    arguments = {"image": photo(), "strength": 0.6, "control_guidance_end": 0.5, **settings(name)}
    arguments |= {"controlnet_conditioning_scale": 0.8} | ({"mask_image": MASKS["part"]} if masked else {})
    pipe = load_pipeline(export_controlled(name))
    ours = pipe(PROMPT, **arguments, control_image={"canny": photo(3)}, seed=SEED, output_type="np", force=True).images
    generator = torch.Generator().manual_seed(SEED)
    theirs = judge(
        PROMPT, **arguments, control_image=photo(3), height=SIDE, width=SIDE, generator=generator, output_type="np"
    ).images
    assert np.abs(ours - theirs).max() < TOLERANCE


@pytest.mark.parametrize(("name", "scheduler"), [("Hyper-SD15-1step-lora", "TCD"), ("Hyper-SDXL-1step-Unet", "LCM")])
def test_keep_steps_is_the_strength_of_diffusers_schedulers(
    name: str, scheduler: str, load: Callable[[str], Pipeline], judges: Callable[[str, str], Any]
) -> None:
    """Diffusers' image of the timesteps that its scheduler spreads over the part of the schedule."""
    judge = judges(name, "Img2Img")
    spread = getattr(diffusers, f"{scheduler}Scheduler").from_config(judge.scheduler.config)
    spread.set_timesteps(4, strength=0.6)
    arguments = {key: value for key, value in settings(name).items() if key != "num_inference_steps"}
    result = load(name)(
        PROMPT,
        image=photo(),
        strength=0.6,
        keep_steps=True,
        num_inference_steps=4,
        **arguments,
        seed=SEED,
        output_type="np",
        force=True,
    )
    theirs = judge(
        PROMPT,
        image=photo(),
        strength=1.0,
        timesteps=spread.timesteps.tolist(),
        **arguments,
        generator=torch.Generator().manual_seed(SEED),
        output_type="np",
    ).images
    assert result.request.steps == 4
    assert np.abs(result.images - theirs).max() < TOLERANCE


@pytest.mark.parametrize("size", [(SIDE, SIDE), (150, 110)])
def test_a_crop_around_the_mask_is_put_back(
    size: tuple[int, int], load: Callable[[str], Pipeline], judges: Callable[[str, str], Any]
) -> None:
    """``padding_mask_crop``: the output has the init image's size, and its pixels outside the mask."""
    name = SAMPLERS[0]
    image = photo().resize(size)
    area = Image.new("L", size)
    ImageDraw.Draw(area).ellipse((20, 30, 40, 45), fill=255)
    arguments = {"image": image, "mask_image": area, "padding_mask_crop": 6, "strength": 1.0, **settings(name)}
    ours = load(name)(PROMPT, **arguments, seed=SEED, force=True).images[0]
    generator = torch.Generator().manual_seed(SEED)
    theirs = judges(name, "Inpaint")(PROMPT, **arguments, height=SIDE, width=SIDE, generator=generator).images[0]
    assert ours.size == theirs.size == size
    assert np.abs(np.asarray(ours, np.int64) - np.asarray(theirs, np.int64)).max() <= 1
    outside = np.asarray(area) == 0
    assert np.array_equal(np.asarray(ours)[outside], np.asarray(image)[outside])


REJECTED = [
    ({"mask_image": MASKS["part"]}, "mask_image: expected an image with it"),
    ({"strength": 0.5}, "strength: expected an image with it"),
    ({"keep_steps": True}, "keep_steps: expected an image with it"),
    ({"image": photo(), "mask_blur": 2}, "mask_blur: expected a mask with it"),
    ({"image": photo(), "padding_mask_crop": 2}, "padding_mask_crop: expected a mask with it"),
    ({"image": photo(), "strength": 0}, "strength 0 would give the image back unchanged"),
    ({"image": photo(), "strength": float("nan")}, "expected a number from 1e-06 to 1"),
    ({"image": photo(), "strength": 1.5}, "strength 1.5 is out of range"),
    ({"image": photo(), "strength": "half"}, "strength 'half' is out of range"),
    (
        {"image": photo(), "num_inference_steps": 1},
        "strength 0.8 of 1 step leaves none: expected at least 1, or keep",
    ),
    ({"image": photo(), "num_inference_steps": 4, "strength": 0.2}, "of 4 steps leaves none: expected at least 0.25"),
    ({"image": photo(), "strength": 0.01, "keep_steps": True}, "keep_steps with strength 0.01: num_inference_steps 4"),
    ({"image": [photo(), photo()]}, "image: 2 and 1 prompts: expected one for all, or as many"),
    ({"image": photo(), "mask_image": [MASKS["part"]] * 2}, "mask_image: 2 and 1 prompts"),
    ({"image": "photo.jpg"}, "image: str: expected a PIL image, an array, a tensor"),
    ({"image": np.zeros((32, 64, 3), np.float32)}, "image: 3 channels of 64x32 pixels: expected 3 of 64x64"),
    ({"image": photo(), "mask_image": np.zeros((SIDE, SIDE, 3), np.float32)}, "mask_image: 3 channels of 64x64"),
    ({"image": np.full((SIDE, SIDE, 3), np.nan, np.float32)}, "image: values from nan"),
    ({"image": photo(), "mask_image": MASKS["part"], "padding_mask_crop": -1}, "padding_mask_crop -1"),
    ({"image": photo(), "mask_image": Image.new("L", (SIDE, SIDE)), "padding_mask_crop": 1}, "the mask is black"),
    ({"image": photo(), "mask_image": Image.new("L", (32, 32)), "padding_mask_crop": 1}, "expected the same size"),
    ({"image": [photo()], "mask_image": MASKS["part"], "padding_mask_crop": 1}, "expected one PIL image, one PIL mask"),
    ({"image": photo(), "mask_image": MASKS["part"], "mask_blur": -1}, "mask_blur -1 is out of range"),
    (
        {"image": photo(), "mask_image": np.ones((SIDE, SIDE), np.float32), "mask_blur": 2},
        "mask_blur: expected PIL masks",
    ),
    ({"image": photo(), "mask_image": Image.new("L", (64, 96))}, "expected the same size, or the same aspect"),
    ({"image": photo(), "resize_mode": "default"}, "resize_mode 'default' is not known"),
]


def test_a_mask_of_a_photo_that_lies_on_its_side(load: Callable[[str], Pipeline]) -> None:
    """The aspects of mask and image are compared upright; of a stretched mask they do not matter."""
    lying = photo().resize((96, 64))
    lying.getexif()[0x0112] = 6
    upright = lying.transpose(Image.Transpose.ROTATE_270)
    upright.getexif().clear()
    area = mask((8, 8, 40, 40)).resize((64, 96))
    call = {"mask_image": area, "num_inference_steps": 2, "seed": 1, "output_type": "np"}
    images = [load(SAMPLERS[0])(PROMPT, image=image, **call).images for image in (lying, upright)]
    assert np.array_equal(*images)
    load(SAMPLERS[0])(PROMPT, image=photo(), **call, resize_mode="stretch")


@pytest.mark.parametrize(("arguments", "message"), REJECTED)
def test_bad_input_is_named(arguments: dict[str, Any], message: str, load: Callable[[str], Pipeline]) -> None:
    with pytest.raises(RequestError) as caught:
        load(SAMPLERS[0])(PROMPT, **{"num_inference_steps": 4, **arguments})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


INPAINTING = ["Hyper-SD15-1step-lora", "Hyper-SDXL-1step-lora"]


@pytest.fixture(scope="module")
def inpainting(tiny_repos: Path, export_inpainting: Callable[[str], Path]) -> Callable[[str], tuple[Pipeline, Any]]:
    """``inpainting(name)``: the pipeline of a base with nine channels, and diffusers' own with the same LoRA."""
    from make_tiny_repos import SD15_INPAINT_REPO, SDXL_INPAINT_REPO

    @functools.cache
    def load_both(name: str) -> tuple[Pipeline, Any]:
        repo = SDXL_INPAINT_REPO if "SDXL" in name else SD15_INPAINT_REPO
        judge = diffusers.AutoPipelineForInpainting.from_pretrained(str(tiny_repos / repo))
        judge.load_lora_weights(str(tiny_repos / "ByteDance/Hyper-SD"), weight_name=f"{name}.safetensors")
        judge.fuse_lora()
        judge.scheduler = diffusers.TCDScheduler.from_config(judge.scheduler.config)
        judge.set_progress_bar_config(disable=True)
        return Pipeline.load(export_inpainting(name)), judge

    return load_both


@pytest.mark.parametrize("name", INPAINTING)
@pytest.mark.parametrize("changes", [{"strength": s} for s in STRENGTHS] + [{"num_images_per_prompt": 2}])
def test_a_base_for_inpainting_sees_the_mask(
    name: str, changes: dict[str, Any], inpainting: Callable[[str], tuple[Pipeline, Any]]
) -> None:
    """Mask and masked image are five more channels of the UNet, whose noise is drawn after that of the latents."""
    pipe, judge = inpainting(name)
    arguments = {"image": photo(), "mask_image": MASKS["part"], "strength": 1.0, **settings(name), **changes}
    ours, theirs = both(pipe, judge, **arguments)
    assert np.abs(ours - theirs).max() < TOLERANCE
    assert theirs.std() > 0.05


@pytest.mark.parametrize("name", INPAINTING)
@pytest.mark.parametrize("strength", [0.6, None])
def test_a_base_for_inpainting_without_a_mask(
    name: str, strength: float | None, inpainting: Callable[[str], tuple[Pipeline, Any]]
) -> None:
    """Everything is masked: diffusers' image of a white mask; without an image, that of any image."""
    pipe, judge = inpainting(name)
    given = {"image": photo(), "strength": strength} if strength else {}
    ours = pipe(PROMPT, **given, **settings(name), seed=SEED, output_type="np").images
    arguments = {"image": photo(), "mask_image": MASKS["whole"], "strength": strength or 1.0, **settings(name)}
    theirs = judge(
        PROMPT, **arguments, height=SIDE, width=SIDE, generator=torch.Generator().manual_seed(SEED), output_type="np"
    ).images
    assert np.abs(ours - theirs).max() < TOLERANCE


def test_a_float32_encoder_in_a_half_precision_bundle(sdxl_mixed_bundle: Path, reference: Callable[[str], Any]) -> None:
    """SDXL's own VAE stays float32: its sample is drawn in float32, and becomes latents of half precision."""
    name = "Hyper-SDXL-1step-lora"
    pipe, judge = Pipeline.load(sdxl_mixed_bundle), make_pipeline(name, "Img2Img", reference(name).components)
    assert pipe.engines["vae_encoder"].outputs["latent_parameters"].dtype == "float32"
    call = {"strength": 0.6, "num_inference_steps": 4, "guidance_scale": 0.0, "eta": 0.0}
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)).half()
    ours = pipe(PROMPT, image=photo(), latents=noise, **call, seed=SEED, output_type="latent").images
    generator = torch.Generator().manual_seed(SEED)
    pixels = judge.image_processor.preprocess(photo())
    sample = judge.prepare_latents(pixels, None, 1, 1, torch.float32, "cpu", generator, add_noise=False)
    start = judge.scheduler.add_noise(sample, noise.float(), torch.tensor([499]))
    theirs = judge(PROMPT, image=photo(), latents=start, **call, output_type="latent").images
    error = (ours.float() - theirs).abs()
    assert ours.dtype == torch.float16
    assert error.max() < 0.05 * theirs.abs().max()
    assert error.mean() < 5e-3 * theirs.abs().mean()
