"""LCM (Luo et al., "Latent Consistency Models", arXiv:2310.04378)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .distilled import DistilledSampler
from .step import Step, scaled

SIGMA_DATA = 0.5  # arXiv:2303.01469, appendix C


@dataclass(frozen=True, kw_only=True, eq=False)
class LCMStep(Step):
    """From t to the finished image, then to the next timestep with fresh noise: arXiv:2303.01469, eq. 5.

    Without noise the denoised image itself is the result.
    """

    coefficients: ClassVar = (*Step.coefficients, "skip", "out", "signal_prev", "spread_prev")

    skip: Tensor  # c_skip(t)
    out: Tensor  # c_out(t)
    signal_prev: Tensor  # sqrt(alpha_prev)
    spread_prev: Tensor  # sqrt(1 - alpha_prev)

    def __call__(self, model_output: Tensor, sample: Tensor, noise: Tensor | None) -> Tensor:
        denoised = scaled(self.out, self.predict_x0(model_output, sample)) + scaled(self.skip, sample)
        if noise is None:
            return denoised
        return scaled(self.signal_prev, denoised) + scaled(self.spread_prev, noise)


class LCM(DistilledSampler):
    """Multistep consistency sampling, arXiv:2303.01469, algorithm 1, in latent space. It has no `eta`."""

    kind = "lcm"
    step = LCMStep
    scheduler_class = "LCMScheduler"

    def steps(self, timesteps: Sequence[int], alphas: Tensor, eta: float, span: int) -> Iterator[LCMStep]:
        """The two boundary scalings are those of arXiv:2303.01469, appendix C."""
        for t, prev in zip(timesteps, [*timesteps[1:], timesteps[-1]], strict=True):
            scaled = torch.tensor(t, device="cpu") * self.config.timestep_scaling
            yield LCMStep(
                **self.common(t, alphas),
                noisy=t != timesteps[-1],
                skip=SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2),
                out=scaled / (scaled**2 + SIGMA_DATA**2) ** 0.5,
                signal_prev=alphas[prev].sqrt(),
                spread_prev=(1 - alphas[prev]).sqrt(),
            )
