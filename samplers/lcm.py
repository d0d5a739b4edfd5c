"""LCM (Luo et al., "Latent Consistency Models", arXiv:2310.04378)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .distilled import DistilledSampler
from .step import Step

SIGMA_DATA = 0.5  # arXiv:2303.01469, appendix C


class LCM(DistilledSampler):
    """Multistep consistency sampling, arXiv:2303.01469, algorithm 1, in latent space. It has no `eta`."""

    kind = "lcm"
    scheduler_class = "LCMScheduler"

    def steps(self, timesteps: Sequence[int], alphas: Tensor, eta: float, span: int) -> Iterator[LCMStep]:
        """The two boundary scalings are those of arXiv:2303.01469, appendix C."""
        for t, prev in zip(timesteps, [*timesteps[1:], timesteps[-1]], strict=True):
            scaled = torch.tensor(t, device="cpu") * self.config.timestep_scaling
            yield LCMStep(
                **self.common(t, alphas),
                clip=self.config.clip_sample_range if self.config.clip_sample else None,
                noisy=t != timesteps[-1],
                skip=SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2),
                out=scaled / (scaled**2 + SIGMA_DATA**2) ** 0.5,
                signal_prev=alphas[prev].sqrt(),
                spread_prev=(1 - alphas[prev]).sqrt(),
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class LCMStep(Step):
    """From t to the finished image, then to the next timestep with fresh noise: arXiv:2303.01469, eq. 5.

    Without noise the denoised image itself is the result.
    """

    skip: Tensor  # c_skip(t)
    out: Tensor  # c_out(t)
    signal_prev: Tensor  # sqrt(alpha_prev)
    spread_prev: Tensor  # sqrt(1 - alpha_prev)

    def __call__(self, model_output: Tensor, sample: Tensor, noise: Tensor | None) -> Tensor:
        denoised = self.out * self.predict_x0(model_output, sample) + self.skip * sample
        return denoised if noise is None else self.signal_prev * denoised + self.spread_prev * noise
