"""From noise to latents: the loop that calls the network, and the plan that keeps schedule arithmetic out of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Real
from typing import Any, cast, get_args

import torch
from torch import Tensor

from ..errors import RequestError
from . import schedule as schedules
from . import steps
from .noise import Generators, randn
from .schedule import Kind, SchedulerConfig
from .steps import Coefficients, DDIMCoefficients, LCMCoefficients, TCDCoefficients

Denoise = Callable[[Tensor, int], Tensor]
Callback = Callable[[int, int, Tensor], Tensor | None]
Plan = tuple[Coefficients, ...]


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A sampler with its schedule. Immutable, so threads may share it; made by `make_sampler`."""

    kind: Kind
    config: SchedulerConfig

    def timesteps(self, num_inference_steps: int | None = None, timesteps: Sequence[int] | None = None) -> list[int]:
        """The timesteps at which the network is called, first to last. Exactly one argument is given.

        `num_inference_steps` is 1 to `num_train_timesteps` for DDIM, to `original_inference_steps` for TCD and LCM.
        `timesteps` are custom ones, strictly descending, for TCD and LCM.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise RequestError("expected exactly one of num_inference_steps and timesteps")
        if num_inference_steps is not None:
            spaced = schedules.ddim_timesteps if self.kind == "ddim" else schedules.distilled_timesteps
            return spaced(self.config, num_inference_steps)
        if self.kind == "ddim":
            raise RequestError("timesteps: the ddim sampler takes num_inference_steps only; tcd and lcm take timesteps")
        return schedules.check_timesteps(self.config, cast("Sequence[int]", timesteps))

    def plan(
        self,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        eta: float | None = None,
    ) -> Plan:
        """The coefficients of every step. A step draws noise where its `noisy` says so, and only there."""
        eta = DEFAULT_ETA[self.kind] if eta is None else _check_eta(eta)
        return _plan(self.kind, self.config, tuple(self.timesteps(num_inference_steps, timesteps)), eta)

    def sample(
        self,
        denoise: Denoise,
        latents: Tensor,
        *,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        eta: float | None = None,
        generator: Generators = None,
        noises: Sequence[Tensor | None] | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Finished latents [B, 4, h, w] from `latents`, unit-variance noise of that shape, which is left untouched.

        `denoise(sample, t)` returns the network's output, [B, 4, h, w]. It may be the same buffer every time: it is
        read before the next call and never kept. `eta` is 0 to 1, by default 0 for DDIM and 0.3 for TCD; LCM has none.
        `generator` should be the one that drew `latents`: diffusers' images come from one stream of numbers.
        With `noises`, which `draw_noise` made for the same steps, nothing is drawn.
        `callback(i, t, latents)` is called after every step; a tensor that it returns replaces the latents.
        """
        step = _STEPS[self.kind]
        plan = self.plan(num_inference_steps, timesteps, eta)
        if noises is not None and [noise is not None for noise in noises] != [c.noisy for c in plan]:
            raise RequestError(f"noises: expected what draw_noise makes for these {len(plan)} steps")
        for i, c in enumerate(plan):
            model_output = denoise(latents, c.t)
            if noises is not None:
                noise = noises[i]
            elif c.noisy:
                dtype = self._noise_dtype(latents.dtype, model_output.dtype)
                noise = randn(model_output.shape, generator=generator, device=model_output.device, dtype=dtype)
            else:
                noise = None
            latents = step(c, model_output, latents, noise)
            if callback is not None and (replaced := callback(i, c.t, latents)) is not None:
                latents = replaced
        return latents

    def draw_noise(
        self,
        latents: Tensor,
        *,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        eta: float | None = None,
        generator: Generators = None,
        output_dtype: torch.dtype | None = None,
    ) -> list[Tensor | None]:
        """The noise of every step, None where a step takes none: what `sample` would draw, in the same order.

        Of `latents` the shape, the device and the dtype count; the values need not be there yet. `output_dtype` is
        that of the network's output, by default that of `latents`.
        """
        dtype = self._noise_dtype(latents.dtype, output_dtype or latents.dtype)
        return [
            randn(latents.shape, generator=generator, device=latents.device, dtype=dtype) if c.noisy else None
            for c in self.plan(num_inference_steps, timesteps, eta)
        ]

    def _noise_dtype(self, latents: torch.dtype, output: torch.dtype) -> torch.dtype:
        # diffusers' DDIM draws in the dtype of the network's output, the others in that of the new sample, which after
        # the first step is the wider of the two.
        return output if self.kind == "ddim" else torch.promote_types(latents, output)


def make_sampler(kind: str, **config: Any) -> Sampler:
    """A sampler of kind `ddim`, `tcd` or `lcm`; `config` in diffusers' key names, over diffusers' defaults.

    >>> make_sampler("tcd").timesteps(4)
    [999, 759, 499, 259]
    """
    if kind not in get_args(Kind):
        raise RequestError(f"sampler {kind!r} is not known, expected {' or '.join(get_args(Kind))}")
    known = cast(Kind, kind)
    return Sampler(kind=known, config=schedules.scheduler_config(known, config))


@lru_cache(maxsize=128)
def _plan(kind: Kind, config: SchedulerConfig, timesteps: tuple[int, ...], eta: float) -> Plan:
    alphas = schedules.alphas_cumprod(config)
    if config.prediction_type == "epsilon" and not alphas[timesteps[0]]:
        raise RequestError(
            f"timestep {timesteps[0]} is pure noise with rescale_betas_zero_snr=True, so prediction_type='epsilon' has "
            "no image there: expected v_prediction or sample"
        )
    return _PLANS[kind](config, alphas, timesteps, eta)


def _ddim_plan(config: SchedulerConfig, alphas: Tensor, timesteps: Sequence[int], eta: float) -> Plan:
    # The previous timestep is a stride away, not the next one listed: the two differ where n does not divide T.
    stride = config.num_train_timesteps // len(timesteps)
    final = torch.tensor(1.0, device="cpu") if config.set_alpha_to_one else alphas[0]
    return tuple(
        _ddim_coefficients(config, t, alphas[t], alphas[t - stride] if t >= stride else final, eta) for t in timesteps
    )


def _ddim_coefficients(config: SchedulerConfig, t: int, alpha: Tensor, prev: Tensor, eta: float) -> DDIMCoefficients:
    """arXiv:2010.02502: eq. 16 for sigma, eq. 12 for the rest."""
    variance = ((1 - prev) / (1 - alpha)) * (1 - alpha / prev)
    sigma = eta * variance.sqrt()
    return DDIMCoefficients(
        **_common(config, t, alpha),
        clip=config.clip_sample_range if config.clip_sample else None,
        noisy=eta > 0,
        signal_prev=prev.sqrt(),
        # Zero up to rounding when eta is 1 and alpha 0; below it, diffusers' root is nan.
        direction=(1 - prev - sigma**2).clamp(min=0).sqrt(),
        sigma=sigma,
    )


def _tcd_plan(config: SchedulerConfig, alphas: Tensor, timesteps: Sequence[int], eta: float) -> Plan:
    coefficients = []
    for t, prev in zip(timesteps, [*timesteps[1:], 0], strict=True):
        # In float32, as diffusers: the floor of a float64 product may be the next timestep.
        s = int(torch.floor((1 - eta) * torch.tensor(prev, device="cpu")))
        ratio = alphas[prev] / alphas[s]
        coefficients.append(
            TCDCoefficients(
                **_common(config, t, alphas[t]),
                clip=None,  # diffusers' TCD has the setting and does not use it
                noisy=eta > 0 and t != timesteps[-1],
                signal_s=alphas[s].sqrt(),
                spread_s=(1 - alphas[s]).sqrt(),
                keep=ratio.sqrt(),
                sigma=(1 - ratio).sqrt(),
            )
        )
    return tuple(coefficients)


def _lcm_plan(config: SchedulerConfig, alphas: Tensor, timesteps: Sequence[int], eta: float) -> Plan:
    """arXiv:2303.01469, appendix C, for the two boundary scalings, with sigma_data 0.5; LCM has no eta."""
    coefficients = []
    for t, prev in zip(timesteps, [*timesteps[1:], timesteps[-1]], strict=True):
        scaled = torch.tensor(t, device="cpu") * config.timestep_scaling
        coefficients.append(
            LCMCoefficients(
                **_common(config, t, alphas[t]),
                clip=config.clip_sample_range if config.clip_sample else None,
                noisy=t != timesteps[-1],
                skip=0.5**2 / (scaled**2 + 0.5**2),
                out=scaled / (scaled**2 + 0.5**2) ** 0.5,
                signal_prev=alphas[prev].sqrt(),
                spread_prev=(1 - alphas[prev]).sqrt(),
            )
        )
    return tuple(coefficients)


def _common(config: SchedulerConfig, t: int, alpha: Tensor) -> dict[str, Any]:
    return {"t": t, "prediction_type": config.prediction_type, "signal": alpha.sqrt(), "spread": (1 - alpha).sqrt()}


def _check_eta(eta: float) -> float:
    # A nan fails both comparisons.
    if not isinstance(eta, Real) or isinstance(eta, bool) or not 0 <= float(eta) <= 1:
        raise RequestError(f"eta={eta!r}: expected a number from 0 to 1")
    return float(eta)


DEFAULT_ETA: dict[Kind, float] = {"ddim": 0.0, "tcd": 0.3, "lcm": 0.0}
_PLANS: dict[Kind, Callable[[SchedulerConfig, Tensor, Sequence[int], float], Plan]] = {
    "ddim": _ddim_plan,
    "tcd": _tcd_plan,
    "lcm": _lcm_plan,
}
_STEPS: dict[Kind, Callable[[Any, Tensor, Tensor, Tensor | None], Tensor]] = {
    "ddim": steps.ddim_step,
    "tcd": steps.tcd_step,
    "lcm": steps.lcm_step,
}
