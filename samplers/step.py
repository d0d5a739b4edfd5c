"""One step of a sampler: a pure function of tensors, with the caller's noise.

Every operation stands in diffusers' order, so results are the same to the bit in float32 and float16 alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from .schedule import PredictionType


@dataclass(frozen=True, kw_only=True, eq=False)
class Step(ABC):
    """The step at timestep `t`: its coefficients and its arithmetic.

    Tensors are 0-dim float32 on the CPU: torch hands them to a kernel as plain numbers, on any device, with no copy,
    and they leave the dtype of the latents alone.

    Attributes:
        t: the timestep at which the denoiser is called.
        prediction_type: the meaning of the denoiser's output.
        signal: sqrt(alpha_t), the share of the finished image in the sample.
        spread: sqrt(1 - alpha_t), the share of the noise.
        clip: bound on the predicted image; None for none.
        noisy: whether the step adds fresh noise.
    """

    t: int
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
            x0 = (sample - self.spread * model_output) / self.signal
        elif self.prediction_type == "v_prediction":
            x0 = self.signal * sample - self.spread * model_output
        else:
            x0 = model_output
        return x0 if self.clip is None else x0.clamp(-self.clip, self.clip)

    def predict_epsilon(self, model_output: Tensor, sample: Tensor) -> Tensor:
        """The noise in `sample` as the denoiser predicts it, from the unclipped image as in diffusers: [B, 4, h, w]."""
        if self.prediction_type == "epsilon":
            return model_output
        if self.prediction_type == "v_prediction":
            return self.signal * model_output + self.spread * sample
        return (sample - self.signal * model_output) / self.spread
