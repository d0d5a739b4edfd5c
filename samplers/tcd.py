"""TCD (Zheng et al., "Trajectory Consistency Distillation", arXiv:2402.19159): strategic stochastic sampling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .distilled import DistilledSampler
from .step import Step, scaled


@dataclass(frozen=True, kw_only=True, eq=False)
class TCDStep(Step):
    """From t down to s, then back up to the next timestep with fresh noise."""

    coefficients: ClassVar = (*Step.coefficients, "signal_s", "spread_s", "keep", "sigma")

    signal_s: Tensor  # sqrt(alpha_s)
    spread_s: Tensor  # sqrt(1 - alpha_s)
    keep: Tensor  # sqrt(alpha_prev / alpha_s)
    sigma: Tensor  # sqrt(1 - alpha_prev / alpha_s)

    def __call__(self, model_output: Tensor, sample: Tensor, noise: Tensor | None) -> Tensor:
        x0, epsilon = self.predict_x0(model_output, sample), self.predict_epsilon(model_output, sample)
        at_s = scaled(self.signal_s, x0) + scaled(self.spread_s, epsilon)
        return at_s if noise is None else scaled(self.keep, at_s) + scaled(self.sigma, noise)


class TCD(DistilledSampler):
    """TCD; `eta` is the paper's gamma."""

    kind = "tcd"
    step = TCDStep
    default_eta = 0.3
    scheduler_class = "TCDScheduler"

    @property
    def clip(self) -> None:
        """No bound: diffusers' TCD has the setting and does not use it."""

    def steps(self, timesteps: Sequence[int], alphas: Tensor, eta: float, span: int) -> Iterator[TCDStep]:
        for t, prev in zip(timesteps, [*timesteps[1:], 0], strict=True):
            # In float32, as diffusers: the floor of a float64 product may be the next timestep.
            s = int(torch.floor((1 - eta) * torch.tensor(prev, device="cpu")))
            ratio = alphas[prev] / alphas[s]
            yield TCDStep(
                **self.common(t, alphas),
                noisy=eta > 0 and t != timesteps[-1],
                signal_s=alphas[s].sqrt(),
                spread_s=(1 - alphas[s]).sqrt(),
                keep=ratio.sqrt(),
                sigma=(1 - ratio).sqrt(),
            )
