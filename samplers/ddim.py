"""DDIM (Song et al., "Denoising Diffusion Implicit Models", arXiv:2010.02502)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NoReturn

import numpy as np
import torch
from torch import Tensor

from ..errors import RequestError
from .numbers import whole_number
from .sampler import Sampler
from .step import Step, scaled


@dataclass(frozen=True, kw_only=True, eq=False)
class DDIMStep(Step):
    """From t to the previous timestep: eq. 12."""

    coefficients: ClassVar = (*Step.coefficients, "signal_prev", "direction", "sigma")

    signal_prev: Tensor  # sqrt(alpha_prev)
    direction: Tensor  # sqrt(1 - alpha_prev - sigma^2)
    sigma: Tensor

    def __call__(self, model_output: Tensor, sample: Tensor, noise: Tensor | None) -> Tensor:
        x0, epsilon = self.predict_x0(model_output, sample), self.predict_epsilon(model_output, sample)
        prev = scaled(self.signal_prev, x0) + scaled(self.direction, epsilon)
        return prev if noise is None else prev + scaled(self.sigma, noise)

    @staticmethod
    def noise_dtype(latents: torch.dtype, output: torch.dtype) -> torch.dtype:
        """The dtype of the denoiser's output."""
        return output


class DDIM(Sampler):
    """DDIM with any spacing of its timesteps; Hyper-SD's checkpoints of 2, 4 and 8 steps need trailing ones."""

    kind = "ddim"
    step = DDIMStep
    defaults: ClassVar = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "clip_sample": True}
    scheduler_class = "DDIMScheduler"
    scheduler_settings: ClassVar = {"timestep_spacing": "trailing"}

    def spaced_timesteps(self, num_inference_steps: int, strength: float = 1.0) -> list[int]:
        """Descending timesteps with the configured spacing: arXiv:2305.08891, table 2, rounded as diffusers rounds."""
        config, total = self.config, int(self.config.num_train_timesteps * strength)
        n = whole_number("num_inference_steps", num_inference_steps, 1, total)
        if config.timestep_spacing == "trailing":
            # arange, because another way to the same numbers rounds differently at n = 48. It may add an (n+1)th, -1:
            # the first is at n = 61, where diffusers goes on to ask the denoiser for timestep -1.
            return (np.round(np.arange(total, 0, -total / n))[:n].astype(int) - 1).tolist()
        if config.timestep_spacing == "linspace":
            return np.linspace(0, total - 1, n).round()[::-1].astype(int).tolist()
        steps = [i * (total // n) + config.steps_offset for i in reversed(range(n))]
        if steps[0] >= total:
            raise RequestError(
                f"num_inference_steps={n} with leading spacing and steps_offset={config.steps_offset} starts at "
                f"timestep {steps[0]}, expected at most {total - 1}"
            )
        return steps

    def custom_timesteps(self, timesteps: Sequence[int]) -> NoReturn:
        """No custom timesteps: the stride between them would not be theirs."""
        raise RequestError("timesteps: the ddim sampler takes num_inference_steps only; tcd and lcm take timesteps")

    def steps(self, timesteps: Sequence[int], alphas: Tensor, eta: float, span: int) -> Iterator[DDIMStep]:
        """Eq. 16 for sigma, eq. 12 for the rest."""
        # The previous timestep is a stride away, not the next one listed: the two differ where n does not divide T.
        stride = span // len(timesteps)
        final = torch.tensor(1.0, device="cpu") if self.config.set_alpha_to_one else alphas[0]
        for t in timesteps:
            alpha, prev = alphas[t], alphas[t - stride] if t >= stride else final
            variance = ((1 - prev) / (1 - alpha)) * (1 - alpha / prev)
            sigma = eta * variance.sqrt()
            yield DDIMStep(
                **self.common(t, alphas),
                noisy=eta > 0,
                signal_prev=prev.sqrt(),
                # Zero up to rounding when eta is 1 and alpha 0; below it, diffusers' root is nan.
                direction=(1 - prev - sigma**2).clamp(min=0).sqrt(),
                sigma=sigma,
            )
