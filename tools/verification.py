"""Does a bundle draw diffusers' images? Both draw the same prompts from the same seeds, compared stage by stage.

The judge is diffusers, in the bundle's precision: it loads what the manifest says the bundle was made of, fuses the
LoRA with peft and runs its own pipeline. Only the reading of the base's weight files is shared with the exporter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..engines import Manifest
from ..engines.component_names import controlnet
from ..engines.manifest import SourceFile
from ..errors import VerifyError, WeightsError
from ..export.checkpoints import find_checkpoint
from ..export.controlnet_sources import ControlNetSource
from ..export.hub import DownloadProgress
from ..export.libraries import quiet
from ..export.models import TORCH_DTYPES, load_controlnet, load_text_encoder, load_unet, load_vae
from ..export.sources import SourceOptions, Sources, find_sources
from ..families import find_family
from ..runtime import Pipeline
from ..runtime.request import Request

PROMPTS = ("a photo of a cat", "a red car in front of a blue house")


@dataclasses.dataclass(frozen=True)
class Threshold:
    """What a bundle's images must reach: ``psnr`` in dB; ``largest`` as a part of full scale."""

    psnr: float
    largest: float


# Measured on tiny and on full-size models: fp32 lies at 100 dB and above; in fp16 diffusers and ONNX Runtime round
# differently, and sampling carries that on from step to step. OpenVINO's bf16 rounds at every layer, to 8 bits.
THRESHOLDS = {
    "fp32": Threshold(psnr=60.0, largest=2e-3),
    "fp16": Threshold(psnr=30.0, largest=0.5),
    "bf16": Threshold(psnr=30.0, largest=0.5),
}


def find_threshold(pipe: Pipeline) -> Threshold:
    """What a bundle's images must reach in the precision that they are computed in."""
    is_bf16 = pipe.choice is not None and pipe.choice.precision == "bf16"
    return THRESHOLDS["bf16" if is_bf16 else pipe.manifest.precision]


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far one stage's result is from diffusers'.

    Attributes:
        stage: ``text``, ``step 1`` and so on, ``decode`` (of diffusers' own latents) or ``image``.
        psnr: peak signal-to-noise ratio in dB; the peak is full scale for images, the reference's span elsewhere.
        ssim: structural similarity, of what has rows and columns.
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
    """One prompt and seed, with the ControlNets that were used."""

    prompt: str
    seed: int
    differences: tuple[Difference, ...]
    ours: Image.Image
    theirs: Image.Image
    controlnets: tuple[str, ...] = ()

    @property
    def image(self) -> Difference:
        return self.differences[-1]


@dataclasses.dataclass(frozen=True)
class Reference:
    """diffusers' pipelines of what a bundle was made of: without ControlNets, and with all of the bundle's."""

    plain: Any
    controlled: Any | None


def load_reference(manifest: Manifest, progress: DownloadProgress | None = None) -> Reference:
    """Load a bundle's sources with diffusers.

    Raises:
        WeightsError: a source has changed since the export.
        DownloadError: a source cannot be had any more.
    """
    sources = find_reference_sources(manifest, progress)
    pipe = load_pipeline(manifest, sources)
    if not manifest.controlnets:
        return Reference(pipe, None)
    with quiet():
        dtype = TORCH_DTYPES[manifest.precision]
        nets = [load_controlnet(sources.parts[controlnet(name)], dtype) for name in manifest.controlnets]
        controlled = _with_controlnets(manifest, pipe, nets)
    controlled.set_progress_bar_config(disable=True)
    return Reference(pipe, controlled)


def find_reference_sources(manifest: Manifest, progress: DownloadProgress | None = None) -> Sources:
    """Find what a bundle was made of and see that it is still the same; raises as :func:`load_reference`."""
    if manifest.random_weights and not Path(manifest.origin.base).is_dir():
        again = f"the same command, hypersd export --ckpt {manifest.checkpoint} --random-weights ..., writes them again"
        raise WeightsError(f"the bundle's random weights in {manifest.origin.base} are gone: {again}")
    with quiet():
        checkpoint = find_checkpoint(manifest.checkpoint)
        sources = find_sources(checkpoint, _source_options(manifest), manifest.precision, progress)
        _check_unchanged(manifest, sources)
    return sources


def load_pipeline(manifest: Manifest, sources: Sources) -> Any:
    """diffusers' own pipeline of these sources, in the bundle's precision and without ControlNets."""
    with quiet():
        import diffusers
        from transformers import CLIPTokenizer

        family, dtype = find_family(manifest.family), TORCH_DTYPES[manifest.precision]
        modules: dict[str, Any] = {
            encoder.component: load_text_encoder(sources.parts[encoder.component], encoder.class_name, dtype)
            for encoder in family.text_encoders
        }
        modules |= {name: CLIPTokenizer.from_pretrained(str(path)) for name, path in sources.tokenizers.items()}
        # The base without the LoRA, for diffusers to fuse; in float32, because it is to be rounded once.
        modules["unet"] = load_unet(sources.parts["unet"], None, manifest.family, 1.0, torch.float32)
        modules["vae"] = load_vae(sources.parts["vae"], dtype)
        modules["scheduler"] = _scheduler(manifest, sources)
        settings = _pipeline_settings(manifest)
        pipe: Any = getattr(diffusers, family.pipeline_class)(**modules, **family.pipeline_parts, **settings)
        if sources.lora is not None:
            pipe.load_lora_weights(str(sources.lora.path.parent), weight_name=sources.lora.path.name)
            pipe.fuse_lora(lora_scale=manifest.origin.lora_scale)
            pipe.unload_lora_weights()
        pipe.unet.to(dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _pipeline_settings(manifest: Manifest) -> dict[str, Any]:
    """Settings of diffusers' pipelines that are not components."""
    family = find_family(manifest.family)
    zeros = {"force_zeros_for_empty_prompt": manifest.force_zeros_for_empty_prompt}
    return {**family.pipeline_settings, **(zeros if family.has_zeroed_negatives else {})}


def _with_controlnets(manifest: Manifest, pipe: Any, nets: Sequence[Any]) -> Any:
    """The same networks in a pipeline that ControlNets act in."""
    import diffusers

    parts = {**pipe.components, "controlnet": list(nets) if len(nets) > 1 else nets[0]}
    pipeline_class = getattr(diffusers, find_family(manifest.family).controlnet_pipeline_class)
    return pipeline_class(**parts, **_pipeline_settings(manifest))


def _source_options(manifest: Manifest) -> SourceOptions:
    origin = manifest.origin
    hyper_file = origin.weights["lora" if "lora" in origin.weights else "unet"][0]
    return SourceOptions(
        base=origin.base,
        revision=origin.revision,
        variant=origin.variant,
        lora=hyper_file.path,
        lora_revision=hyper_file.revision,
        vae=origin.vae,
        vae_revision=origin.vae_revision,
        controlnets=tuple(
            ControlNetSource(name=name, location=place.location, revision=place.revision)
            for name, place in origin.controlnets.items()
        ),
    )


def _check_unchanged(manifest: Manifest, sources: Sources) -> None:
    for part, files in sources.weights.items():
        recorded: Sequence[SourceFile] = manifest.origin.weights.get(part, ())
        if [file.record().sha256 for file in files] != [record.sha256 for record in recorded]:
            names = ", ".join(str(file.path) for file in files)
            raise WeightsError(f"{names} changed since the bundle was exported: export it again")


def _scheduler(manifest: Manifest, sources: Sources) -> Any:
    """The scheduler that the model card makes, from the base's configuration and not from the manifest's constants."""
    from diffusers import DDIMScheduler, LCMScheduler, TCDScheduler

    config = dict(sources.scheduler_config)
    if manifest.sampler.kind == "ddim":
        return DDIMScheduler.from_config(config, timestep_spacing="trailing")
    return {"tcd": TCDScheduler, "lcm": LCMScheduler}[manifest.sampler.kind].from_config(config)


def compare(
    pipe: Pipeline,
    reference: Reference,
    prompt: str,
    seed: int,
    steps: int | None = None,
    images: Mapping[str, Image.Image] | None = None,
) -> Comparison:
    """Draw one image with both and compare every stage.

    Args:
        pipe: the bundle's pipeline.
        reference: diffusers' pipelines (:func:`load_reference`).
        prompt: what to draw.
        seed: of the noise.
        steps: number of steps; the manifest's if not given.
        images: control images of the usual size, by the ControlNet's name; without any no ControlNet runs.
    """
    differences = list(_compare_text(pipe, reference.plain, prompt))
    request, ours, our_steps = _draw_ours(pipe, prompt, seed, steps, images or None)
    theirs, their_steps = _draw_theirs(request, reference, seed, images or {}, list(pipe.manifest.controlnets))
    for i, (mine, judged) in enumerate(zip(our_steps, their_steps, strict=True), start=1):
        differences.append(measure_difference(f"step {i}", _rows_last(mine), _rows_last(judged)))
    decoded = (pipe.decode(their_steps[-1].to(pipe.device, pipe.dtype)) * 0.5 + 0.5).clamp(0, 1)
    differences.append(measure_difference("decode", _rows_last(decoded), theirs, peak=1.0))
    differences.append(measure_difference("image", ours, theirs, peak=1.0))
    names = tuple(control.name for control in request.controls)
    return Comparison(prompt, seed, tuple(differences), _image(ours), _image(theirs), names)


def control_image(manifest: Manifest) -> Image.Image:
    """White lines on black, of the bundle's usual size: an image that ControlNets of any kind can be given."""
    width, height = manifest.shapes.width.opt, manifest.shapes.height.opt
    image = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(image)
    stroke = max(1, min(width, height) // 64)
    draw.ellipse((width // 8, height // 8, width // 2, height // 2), outline="white", width=stroke)
    draw.rectangle((width // 3, height // 3, width * 7 // 8, height * 3 // 4), outline="white", width=stroke)
    return image


def _compare_text(pipe: Pipeline, reference: Any, prompt: str) -> Iterator[Difference]:
    ours = pipe.encode_prompt([prompt])
    with torch.no_grad():
        theirs = reference.encode_prompt(
            prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    yield measure_difference("text", _array(ours.hidden_states), _array(theirs[0]))
    if ours.text_embeds is not None:
        yield measure_difference("pooled text", _array(ours.text_embeds), _array(theirs[2]))


def _draw_ours(
    pipe: Pipeline, prompt: str, seed: int, steps: int | None, images: Mapping[str, Image.Image] | None
) -> tuple[Request, np.ndarray, list[Tensor]]:
    seen: list[Tensor] = []

    def keep(_: Any, i: int, t: int, tensors: dict[str, Tensor]) -> None:
        seen.append(tensors["latents"].clone())

    result = pipe(
        prompt, num_inference_steps=steps, seed=seed, output_type="np", control_image=images, callback_on_step_end=keep
    )
    return result.request, result.images[0], seen


def _draw_theirs(
    request: Request, reference: Reference, seed: int, images: Mapping[str, Image.Image], names: Sequence[str]
) -> tuple[np.ndarray, list[Tensor]]:
    seen: list[Tensor] = []

    def keep(_: Any, i: int, t: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(tensors["latents"].clone())
        return {}

    schedule: dict[str, Any] = {"num_inference_steps": request.num_inference_steps}
    if request.timesteps is not None:
        schedule = {"timesteps": list(request.timesteps)}
    pipe: Any = reference.plain
    control: dict[str, Any] = {}
    if images:  # diffusers runs all ControlNets: one without an image is given another's, at strength 0
        some = next(iter(images.values()))
        used = {control.name: control.conditioning_scale for control in request.controls}
        sources, scales = [images.get(name, some) for name in names], [used.get(name, 0.0) for name in names]
        is_one = len(names) == 1  # which diffusers takes without a list
        pipe = reference.controlled
        control = {
            "image": sources[0] if is_one else sources,
            "controlnet_conditioning_scale": scales[0] if is_one else scales,
        }
    result = pipe(
        request.prompts[0],
        **control,
        **schedule,
        eta=request.eta,
        guidance_scale=request.guidance_scale,
        height=request.height,
        width=request.width,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type="np",
        callback_on_step_end=keep,
    )
    return result.images[0], seen


def measure_difference(stage: str, ours: np.ndarray, theirs: np.ndarray, peak: float | None = None) -> Difference:
    """Compare two arrays [H, W, C], or others, which then have no structural similarity."""
    from skimage.metrics import structural_similarity

    peak = peak or float(np.ptp(theirs)) or 1.0
    error = np.abs(ours.astype(np.float64) - theirs) / peak
    power = float(np.mean(error**2))
    ssim = None
    if ours.ndim == 3 and min(ours.shape[:2]) >= 7:  # skimage's window
        ssim = float(cast(Any, structural_similarity(ours, theirs, data_range=peak, channel_axis=-1)))
    psnr = float("inf") if power == 0 else -10 * float(np.log10(power))
    return Difference(stage, psnr, ssim, float(error.mean()), float(error.max()))


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()[0]


def _rows_last(tensor: Tensor) -> np.ndarray:
    """The first image of [B, C, H, W] as [H, W, C]."""
    return np.ascontiguousarray(_array(tensor).transpose(1, 2, 0))


def _image(array: np.ndarray) -> Image.Image:
    return Image.fromarray((array * 255).round().astype(np.uint8))


def check_thresholds(comparisons: Sequence[Comparison], threshold: Threshold) -> None:
    """See that every image is close enough.

    Raises:
        VerifyError: one is not; the message names its seed.
    """
    for comparison in comparisons:
        found = comparison.image
        if not (found.psnr >= threshold.psnr and found.largest <= threshold.largest):  # NaN is not close enough
            raise VerifyError(
                f"seed {comparison.seed} is at {found.psnr:.1f} dB with a largest error of {found.largest:.1e}, "
                f"expected {threshold.psnr:g} dB or more and {threshold.largest:.0e} or less: "
                "these are not diffusers' images"
            )


def side_by_side(comparison: Comparison) -> Image.Image:
    """Ours, diffusers' and their difference, brought up to full contrast, in one image."""
    ours, theirs = (np.asarray(image, np.int16) for image in (comparison.ours, comparison.theirs))
    error = np.abs(ours - theirs)
    amplified = (error * (255 / max(1, error.max()))).astype(np.uint8)
    row = np.concatenate([ours.astype(np.uint8), theirs.astype(np.uint8), amplified], axis=1)
    return Image.fromarray(row)
