"""The request: params with every decision made, and the settings that follow from it."""

from __future__ import annotations

import dataclasses

from ..engines import Manifest
from ..families import find_family
from .controls import Control


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

    @property
    def is_guided(self) -> bool:
        return self.guidance_scale > 1.0

    @property
    def steps(self) -> int:
        """Number of steps, however they were asked for."""
        return len(self.timesteps) if self.timesteps is not None else self.num_inference_steps or 0

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
    )
