"""The request: params with every decision made, and the settings that follow from it."""

from __future__ import annotations

import dataclasses
from typing import Literal

from ..engines import Manifest
from ..families import find_family
from ..samplers import Plan, Sampler
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
    """The operations that make an image, and their order: with the inputs' shapes, the key of a CUDA graph.

    Numbers are not among them: timesteps, the sampler's coefficients (and with them ``eta`` and ``strength``), guidance
    scale and ControlNets' scales are tensors among the inputs.

    Attributes:
        noisy: for every step that runs, whether it adds fresh noise.
        is_guided: whether the denoiser runs on each image twice.
        output_type: ``"pil"``, ``"np"``, ``"pt"`` or ``"latent"``.
        controls: for every step the names of the ControlNets that act on it.
        starts_from: ``"noise"``, ``"image"`` or ``"mask"``.
        is_inpainting: whether the UNet has channels for a mask.
        starts_as_noise: whether nothing of the init image is in the first latents.
    """

    noisy: tuple[bool, ...]
    is_guided: bool
    output_type: str
    controls: tuple[tuple[str, ...], ...]
    starts_from: StartsFrom
    is_inpainting: bool
    starts_as_noise: bool

    @property
    def encodes_image(self) -> bool:
        """Whether the latents of the whole init image are needed."""
        if self.starts_from == "mask":
            return not (self.is_inpainting and self.starts_as_noise)
        return self.starts_from == "image"

    @property
    def controlnets(self) -> tuple[str, ...]:
        """The ControlNets that act on some step."""
        return tuple(dict.fromkeys(name for names in self.controls for name in names))


def make_plan(sampler: Sampler, request: Request) -> Plan:
    """The steps of a request that run.

    Raises:
        RequestError: the sampler has no such steps.
    """
    spread = request.strength if request.keep_steps else 1.0
    plan = sampler.plan(request.num_inference_steps, request.timesteps, request.eta, spread)
    return plan[request.first_step :]


def make_settings(manifest: Manifest, request: Request, plan: Plan, output_type: str) -> GenerationSettings:
    """The settings of a request; ``plan`` is the one of :func:`make_plan`."""
    return GenerationSettings(
        noisy=tuple(step.noisy for step in plan),
        is_guided=request.is_guided,
        output_type=output_type,
        controls=tuple(
            tuple(control.name for control in request.controls if control.is_active(step, request.steps))
            for step in range(request.steps)
        ),
        starts_from=request.starts_from,
        is_inpainting=manifest.is_inpainting,
        # As in diffusers: its image-to-image pipelines add noise to the image even then.
        starts_as_noise=request.starts_from == "noise" or (request.starts_from == "mask" and request.strength == 1),
    )


def has_zeroed_negatives(manifest: Manifest, request: Request) -> bool:
    """Whether zeros stand for the embeddings of negative prompts: none were given, and the base was trained so."""
    zeroed = find_family(manifest.family).has_zeroed_negatives and manifest.force_zeros_for_empty_prompt
    return request.is_guided and zeroed and request.negative_prompts is None
