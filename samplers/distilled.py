"""The schedule of samplers for distilled models, TCD and LCM."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass

from ..errors import RequestError
from .numbers import whole_number
from .sampler import Sampler


@dataclass(frozen=True)
class DistilledSampler(Sampler, ABC):
    """A sampler whose timesteps are evenly spaced indices into the schedule that was distilled.

    `timestep_spacing` and `steps_offset` play no part, as in diffusers: 4 steps are 999, 759, 499, 259.
    """

    def __post_init__(self) -> None:
        original, total = self.config.original_inference_steps, self.config.num_train_timesteps
        if original > total:
            raise RequestError(
                f"scheduler: original_inference_steps={original} is too large, expected at most "
                f"num_train_timesteps={total}"
            )

    def spaced_timesteps(self, num_inference_steps: int, strength: float = 1.0) -> list[int]:
        stride = self.config.num_train_timesteps // self.config.original_inference_steps
        original = int(self.config.original_inference_steps * strength)
        n = whole_number("num_inference_steps", num_inference_steps, 1, original)
        return [(original - int(i * (original / n))) * stride - 1 for i in range(n)]
