"""The request: params with every decision made, and the settings that follow from it."""

from __future__ import annotations

import dataclasses
from typing import Literal

from ..engines import Manifest
from ..families import find_family
from .adapters import ChosenAdapter
from .controls import Control

StartsFrom = Literal["noise", "image", "mask"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One call, every argument decided (:func:`.params.decide`).

    Attributes:
        prompts: one for each image, before ``num_images_per_prompt``.
        negative_prompts: as many, or None if none were given.
        num_inference_steps: steps of the sampler's own schedule; None with ``timesteps``.
        timesteps: custom ones; None with ``num_inference_steps``.
        guidance_scale: above 1 for classifier-free guidance.
        seeds: one, or one for each image.
        controls: the ControlNets that take part.
        adapters: the LoRAs that take part, by name.
        starts_from: ``"noise"``, an init ``"image"``, or ``"mask"`` for one with a mask.
        strength: above 0 to 1, how far the init image is turned into noise.
        keep_steps: whether the steps are spread over the part of the schedule that ``strength`` leaves.
        first_step: number of steps that are left out at the beginning.
    """

    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...] | None
    num_inference_steps: int | None
    timesteps: tuple[int, ...] | None
    eta: float
    guidance_scale: float
    height: int
    width: int
    num_images_per_prompt: int
    seeds: tuple[int, ...] | None
    controls: tuple[Control, ...] = ()
    adapters: tuple[ChosenAdapter, ...] = ()
    starts_from: StartsFrom = "noise"
    strength: float = 1.0
    keep_steps: bool = False
    first_step: int = 0

    @property
    def is_guided(self) -> bool:
        return self.guidance_scale > 1.0

    @property
    def steps(self) -> int:
        """Number of steps that run, however they were asked for."""
        planned = len(self.timesteps) if self.timesteps is not None else self.num_inference_steps or 0
        return planned - self.first_step

    @property
    def batch(self) -> int:
        """Number of images."""
        return len(self.prompts) * self.num_images_per_prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """All that decides how images are computed, besides the inputs and their shapes: the key of a CUDA graph.

    Attributes:
        prompts: their number; each makes ``images_per_prompt`` images.
        guidance_scale: 0 without guidance, else above 1.
        zeroed_negatives: zeros instead of the embeddings of negative prompts.
        num_inference_steps: None with ``timesteps``, and the other way round.
        output_type: ``"pil"``, ``"np"``, ``"pt"`` or ``"latent"``.
        controls: for every step the names of the ControlNets that act on it.
        starts_from: ``"noise"``, ``"image"`` or ``"mask"``.
        is_inpainting: whether the UNet has channels for a mask.
        starts_as_noise: whether nothing of the init image is in the first latents.
        spread: the part of the schedule that the steps are spread over, above 0 to 1.
        first_step: number of steps that are left out at the beginning.
    """

    prompts: int
    images_per_prompt: int
    guidance_scale: float
    zeroed_negatives: bool
    num_inference_steps: int | None
    timesteps: tuple[int, ...] | None
    eta: float
    output_type: str
    controls: tuple[tuple[str, ...], ...]
    starts_from: StartsFrom
    is_inpainting: bool
    starts_as_noise: bool
    spread: float
    first_step: int

    @property
    def encodes_image(self) -> bool:
        """Whether the latents of the whole init image are needed."""
        if self.starts_from == "mask":
            return not (self.is_inpainting and self.starts_as_noise)
        return self.starts_from == "image"

    @property
    def is_guided(self) -> bool:
        return self.guidance_scale > 0

    @property
    def controlnets(self) -> tuple[str, ...]:
        """The ControlNets that act on some step."""
        return tuple(dict.fromkeys(name for names in self.controls for name in names))


def make_settings(manifest: Manifest, request: Request, output_type: str) -> GenerationSettings:
    """The settings of a request; its other values are inputs."""
    # Zeros stand for no negative prompt where the base was trained with them.
    zeroed = find_family(manifest.family).has_zeroed_negatives and manifest.force_zeros_for_empty_prompt
    return GenerationSettings(
        prompts=len(request.prompts),
        images_per_prompt=request.num_images_per_prompt,
        guidance_scale=request.guidance_scale if request.is_guided else 0.0,
        zeroed_negatives=request.is_guided and zeroed and request.negative_prompts is None,
        num_inference_steps=request.num_inference_steps,
        timesteps=request.timesteps,
        eta=request.eta,
        output_type=output_type,
        controls=tuple(
            tuple(control.name for control in request.controls if control.is_active(step, request.steps))
            for step in range(request.steps)
        ),
        starts_from=request.starts_from,
        is_inpainting=manifest.is_inpainting,
        # As in diffusers: its image-to-image pipelines add noise to the image even then.
        starts_as_noise=request.starts_from == "noise" or (request.starts_from == "mask" and request.strength == 1),
        spread=request.strength if request.keep_steps else 1.0,
        first_step=request.first_step,
    )
