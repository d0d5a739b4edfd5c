"""One step of a sampler: a pure function of tensors, with the caller's noise.

Every operation stands in diffusers' order, so results are the same to the bit in float32 and float16 alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from .schedule import PredictionType


@dataclass(frozen=True, kw_only=True, eq=False)
class Step(ABC):
    """The step at timestep `t`: its coefficients and its arithmetic.

    A plan's coefficients are 0-dim float32 tensors on the CPU. Those of `Sampler.steps_from` are [1] float32 on the
    latents' device. The arithmetic gives the same numbers with both (`as_number`).

    Attributes:
        coefficients: names of the tensors that depend on the timesteps and on `eta`.
        t: the timestep at which the denoiser is called; a tensor [1] in a plan of `Sampler.steps_from`.
        prediction_type: the meaning of the denoiser's output.
        signal: sqrt(alpha_t), the share of the finished image in the sample.
        spread: sqrt(1 - alpha_t), the share of the noise.
        clip: bound on the predicted image; None for none.
        noisy: whether the step adds fresh noise.
    """

    coefficients: ClassVar[tuple[str, ...]] = ("signal", "spread")

    t: int | Tensor
    prediction_type: PredictionType
    signal: Tensor
    spread: Tensor
    clip: float | None
    noisy: bool

    @abstractmethod
    def __call__(self, model_output: Tensor, sample: Tensor, noise: Tensor | None) -> Tensor:
        """The sample at the next timestep: [B, 4, h, w], a new tensor.

        `model_output` is the denoiser's output for `sample`, both [B, 4, h, w]. `noise` is standard normal, of the
        same shape; None unless the step is `noisy`.
        """

    @staticmethod
    def noise_dtype(latents: torch.dtype, output: torch.dtype) -> torch.dtype:
        """The dtype in which diffusers draws the noise: that of the new sample, the wider of the two."""
        return torch.promote_types(latents, output)

    def predict_x0(self, model_output: Tensor, sample: Tensor) -> Tensor:
        """The finished image as the denoiser predicts it, clipped if the schedule clips: [B, 4, h, w], any float.

        Epsilon: DDIM, arXiv:2010.02502, the bracket of eq. 12. v: arXiv:2202.00512, appendix D.
        """
        if self.prediction_type == "epsilon":
            x0 = divided(sample - scaled(self.spread, model_output), self.signal)
        elif self.prediction_type == "v_prediction":
            x0 = scaled(self.signal, sample) - scaled(self.spread, model_output)
        else:
            x0 = model_output
        return x0 if self.clip is None else x0.clamp(-self.clip, self.clip)

    def predict_epsilon(self, model_output: Tensor, sample: Tensor) -> Tensor:
        """The noise in `sample` as the denoiser predicts it, from the unclipped image as in diffusers: [B, 4, h, w]."""
        if self.prediction_type == "epsilon":
            return model_output
        if self.prediction_type == "v_prediction":
            return scaled(self.signal, model_output) + scaled(self.spread, sample)
        return divided(sample - scaled(self.signal, model_output), self.spread)


def as_number(coefficient: Tensor) -> Tensor:
    """A coefficient [1] or [] as a factor beside a tensor on its device.

    On the CPU it is 0-dim: torch takes it as a plain number there. On a GPU a 0-dim one would be rounded to the
    tensor's dtype first, which a plain number is not; one of shape [1] widens the product to float32 instead.
    """
    return coefficient.reshape(()) if coefficient.device.type == "cpu" and coefficient.ndim else coefficient


def scaled(coefficient: Tensor, tensor: Tensor) -> Tensor:
    """`coefficient * tensor` in the tensor's dtype, rounded as torch does it with a number as coefficient."""
    factor = as_number(coefficient)
    return factor * tensor if factor.ndim == 0 else (factor * tensor).to(tensor.dtype)


def divided(tensor: Tensor, coefficient: Tensor) -> Tensor:
    """`tensor / coefficient`, likewise. Torch divides by a number on a GPU by multiplying with its reciprocal."""
    divisor = as_number(coefficient)
    return tensor / divisor if divisor.ndim == 0 else (tensor * divisor.reciprocal()).to(tensor.dtype)


def add_noise(sample: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    """`sample` at a noise level: DDPM, arXiv:2006.11239, eq. 4.

    `sample` and `noise` are tensors of one shape and dtype; `level` is `Sampler.noise_level`'s, on their device.
    """
    return scaled(level[:1], sample) + scaled(level[1:], noise)


@lru_cache(maxsize=64)
def stacked_coefficients(plan: tuple[Step, ...]) -> Tensor:
    """The coefficients of a plan's steps, [steps, coefficients] float32 on the CPU; do not write to it."""
    return torch.stack([torch.stack([getattr(step, name) for name in step.coefficients]) for step in plan])
