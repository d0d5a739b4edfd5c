"""Verification of a bundle: its images and diffusers' from the same prompts and seeds, compared stage by stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..engines import Manifest
from ..engines.compare import THRESHOLDS, Threshold, peak_signal_to_noise
from ..engines.engine import TORCH_DTYPES
from ..errors import VerifyError
from ..export.libraries import quiet
from ..runtime import Pipeline
from ..runtime.request import Request
from .reference import Reference
from .verify_cases import Case, control_image, init_image


def find_threshold(pipe: Pipeline) -> Threshold:
    """The threshold for the precision in which a pipeline computes."""
    is_bf16 = pipe.choice is not None and pipe.choice.precision == "bf16"
    return THRESHOLDS["bf16" if is_bf16 else pipe.manifest.precision]


@dataclasses.dataclass(frozen=True)
class Difference:
    """Difference between one stage's result and diffusers'.

    Attributes:
        stage: ``text``, ``encode`` (of an init image), ``step 1`` and so on, ``decode`` (of diffusers' own latents) or
            ``image``.
        psnr: peak signal-to-noise ratio in dB; the peak is full scale for images, the reference's span elsewhere.
        ssim: structural similarity; None for arrays without rows and columns.
        mean: mean error, in parts of the peak.
        largest: largest error, in parts of the peak.
    """

    stage: str
    psnr: float
    ssim: float | None
    mean: float
    largest: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One image from both."""

    case: Case
    differences: tuple[Difference, ...]
    ours: Image.Image
    theirs: Image.Image

    @property
    def image(self) -> Difference:
        return self.differences[-1]


def compare(pipe: Pipeline, reference: Reference, case: Case, steps: int | None = None) -> Comparison:
    """Generate one image with both and compare every stage.

    Args:
        pipe: the bundle's pipeline.
        reference: diffusers' pipelines (:func:`load_reference`).
        case: the image.
        steps: number of steps; None for the manifest's.
    """
    differences = list(_compare_text(pipe, reference.plain, case.prompt))
    if case.starts_from != "noise":
        differences.append(_compare_encoders(pipe, reference.plain.vae))
    request, ours, our_steps = _generate_ours(pipe, case, steps)
    theirs, their_steps = _generate_theirs(request, reference, case, pipe.manifest)
    for i, (mine, judged) in enumerate(zip(our_steps, their_steps, strict=True), start=1):
        differences.append(measure_difference(f"step {i}", _rows_last(mine), _rows_last(judged)))
    decoded = (pipe.decode(their_steps[-1].to(pipe.device, pipe.dtype)) * 0.5 + 0.5).clamp(0, 1)
    differences.append(measure_difference("decode", _rows_last(decoded), theirs, peak=1.0))
    differences.append(measure_difference("image", ours, theirs, peak=1.0))
    return Comparison(case, tuple(differences), _image(ours), _image(theirs))


def _compare_text(pipe: Pipeline, reference: Any, prompt: str) -> Iterator[Difference]:
    ours = pipe.encode_prompt([prompt])
    with torch.no_grad():
        theirs = reference.encode_prompt(
            prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    yield measure_difference("text", _array(ours.hidden_states), _array(theirs[0]))
    if ours.text_embeds is not None:
        yield measure_difference("pooled text", _array(ours.text_embeds), _array(theirs[2]))


def _compare_encoders(pipe: Pipeline, vae: Any) -> Difference:
    """The distribution of the init image's latents before anything is drawn, or TAESD's latents."""
    engine, own = pipe.engines["vae_encoder"], vae.dtype
    dtype = TORCH_DTYPES[engine.inputs["sample"].dtype]
    pixels = np.asarray(init_image(pipe.manifest), np.float32).transpose(2, 0, 1)[None] / 127.5 - 1
    sample = torch.from_numpy(pixels).to(dtype).contiguous()
    ours = engine.run({"sample": sample.to(engine.device)})["latent_parameters"]
    with torch.no_grad(), quiet():
        theirs = vae.to(dtype).encode(sample, return_dict=False)[0]  # diffusers encodes SDXL's in float32 too
        vae.to(own)
    theirs = theirs if isinstance(theirs, Tensor) else theirs.parameters
    return measure_difference("encode", _rows_last(ours), _rows_last(theirs))


def _generate_ours(pipe: Pipeline, case: Case, steps: int | None) -> tuple[Request, np.ndarray, list[Tensor]]:
    """The request, the image and the latents after every step."""
    seen: list[Tensor] = []
    sampler = pipe.manifest.sampler
    planned = steps or len(sampler.timesteps or ()) or sampler.num_inference_steps
    result = pipe(
        case.prompt,
        **case.images(pipe.manifest),
        strength=case.strength(planned),
        num_inference_steps=steps,
        seed=case.seed,
        output_type="np",
        control_image=dict.fromkeys(case.controlnets, control_image(pipe.manifest)) or None,
        callback_on_step_end=lambda *step: seen.append(step[3]["latents"].clone()),
    )
    return result.request, result.images[0], seen


def _generate_theirs(
    request: Request, reference: Reference, case: Case, manifest: Manifest
) -> tuple[np.ndarray, list[Tensor]]:
    """diffusers' image of the same request, and its latents after every step."""
    seen: list[Tensor] = []

    def keep(_: Any, i: int, t: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(tensors["latents"].clone())
        return {}

    schedule: dict[str, Any] = {"num_inference_steps": request.num_inference_steps}
    if request.timesteps is not None:
        schedule = {"timesteps": list(request.timesteps)}
    pipe, images = reference.for_case(case, request, manifest)
    with quiet():
        result = pipe(
            request.prompts[0],
            **images,
            **schedule,
            eta=request.eta,
            guidance_scale=request.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(case.seed),
            output_type="np",
            callback_on_step_end=keep,
        )
    return result.images[0], seen


def measure_difference(stage: str, ours: np.ndarray, theirs: np.ndarray, peak: float | None = None) -> Difference:
    """Compare two arrays; only arrays [H, W, C] have a structural similarity."""
    from skimage.metrics import structural_similarity

    peak = peak or float(np.ptp(theirs)) or 1.0
    error = np.abs(ours.astype(np.float64) - theirs) / peak
    ssim = None
    if ours.ndim == 3 and min(ours.shape[:2]) >= 7:  # skimage's window
        ssim = float(cast(Any, structural_similarity(ours, theirs, data_range=peak, channel_axis=-1)))
    return Difference(stage, peak_signal_to_noise(error), ssim, float(error.mean()), float(error.max()))


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()[0]


def _rows_last(tensor: Tensor) -> np.ndarray:
    """The first image of [B, C, H, W] as [H, W, C]."""
    return np.ascontiguousarray(_array(tensor).transpose(1, 2, 0))


def _image(array: np.ndarray) -> Image.Image:
    return Image.fromarray((array * 255).round().astype(np.uint8))


def check_thresholds(comparisons: Sequence[Comparison], threshold: Threshold) -> None:
    """Check that every image is close enough.

    Raises:
        VerifyError: an image is not; the message names its prompt and seed.
    """
    for comparison in comparisons:
        found = comparison.image
        if not (found.psnr >= threshold.psnr and found.largest <= threshold.largest):  # NaN is not close enough
            raise VerifyError(
                f"{comparison.case} is at {found.psnr:.1f} dB with a largest error of {found.largest:.1e}, "
                f"expected {threshold.psnr:g} dB or more and {threshold.largest:.0e} or less: "
                "these are not diffusers' images"
            )


def side_by_side(comparison: Comparison) -> Image.Image:
    """Our image, diffusers' and their difference at full contrast, side by side."""
    ours, theirs = (np.asarray(image, np.int16) for image in (comparison.ours, comparison.theirs))
    error = np.abs(ours - theirs)
    amplified = (error * (255 / max(1, error.max()))).astype(np.uint8)
    row = np.concatenate([ours.astype(np.uint8), theirs.astype(np.uint8), amplified], axis=1)
    return Image.fromarray(row)
