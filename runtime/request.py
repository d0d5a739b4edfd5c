"""The request: params with every decision made."""

from __future__ import annotations

import dataclasses

from .controls import Control


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One call, every argument decided (:func:`.params.decide`).

    Attributes:
        prompts: one for each image to draw before ``num_images_per_prompt``.
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
