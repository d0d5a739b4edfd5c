"""A sampler: timesteps and coefficients for a number of steps, planned before the first one is run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import RequestError
from .numbers import real_number
from .schedule import SchedulerConfig, alphas_cumprod, check_timesteps
from .step import Step

Plan = tuple[Step, ...]


@dataclass(frozen=True)
class Sampler(ABC):
    """A sampler with its schedule. Immutable, so threads may share it; `make_sampler` makes one.

    Attributes:
        config: the constants of the schedule.
        kind: its name in manifests.
        default_eta: its `eta` where none is given.
        step: the class of its steps.
        defaults: the constants whose defaults in diffusers differ from those of `SchedulerConfig`.
        scheduler_class: diffusers' scheduler.
        scheduler_settings: the constants that Hyper-SD's model card sets for it, whatever the base's are.
    """

    config: SchedulerConfig
    kind: ClassVar[str]
    default_eta: ClassVar[float] = 0.0
    step: ClassVar[type[Step]]
    defaults: ClassVar[Mapping[str, Any]] = {}
    scheduler_class: ClassVar[str]
    scheduler_settings: ClassVar[Mapping[str, Any]] = {}

    @abstractmethod
    def spaced_timesteps(self, num_inference_steps: int, strength: float = 1.0) -> list[int]:
        """The descending timesteps of so many steps, over the part `strength` of the schedule."""

    @abstractmethod
    def steps(self, timesteps: Sequence[int], alphas: Tensor, eta: float, span: int) -> Iterable[Step]:
        """The steps at all of a schedule's timesteps.

        `alphas` [num_train_timesteps] is its `alphas_cumprod`. `span` is the number of training timesteps over which
        `timesteps` are spread.
        """

    def custom_timesteps(self, timesteps: Sequence[int]) -> list[int]:
        """The caller's timesteps, if the sampler can take them."""
        return check_timesteps(self.config, timesteps)

    def timesteps(
        self,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        strength: float = 1.0,
    ) -> list[int]:
        """The timesteps at which the denoiser is called, first to last. Exactly one of the first two is given.

        `num_inference_steps` is 1 to `num_train_timesteps` for DDIM, to `original_inference_steps` for TCD and LCM.
        `timesteps` are custom ones, strictly descending, for TCD and LCM. `strength`, above 0 to 1, is the part of the
        schedule that the steps are spread over, as in `set_timesteps` of diffusers' TCD and LCM schedulers; custom
        timesteps shrink by it.
        """
        if num_inference_steps is not None and timesteps is None:
            return self.spaced_timesteps(num_inference_steps, strength)
        if timesteps is not None and num_inference_steps is None:
            scaled = timesteps if strength == 1 else [int((t + 1) * strength) - 1 for t in timesteps]
            return self.custom_timesteps(scaled)
        raise RequestError("expected exactly one of num_inference_steps and timesteps")

    def plan(
        self,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        eta: float | None = None,
        strength: float = 1.0,
    ) -> Plan:
        """Every step of a run; see `timesteps` for the arguments. `eta` is 0 to 1; LCM has none.

        A run that starts later takes the last steps of the plan, `plan[first:]`: coefficients are those of the whole
        schedule, as in diffusers' image-to-image pipelines.
        """
        eta = self.default_eta if eta is None else real_number("eta", eta, 0.0, 1.0)
        span = int(self.config.num_train_timesteps * strength)
        return _plan(self, tuple(self.timesteps(num_inference_steps, timesteps, strength)), eta, span)

    def steps_from(self, timesteps: Sequence[Tensor], coefficients: Tensor, noisy: Sequence[bool]) -> Plan:
        """A plan whose numbers are tensors, so that one recording of its arithmetic serves every plan of its form.

        Args:
            timesteps: [1] float32 for each step.
            coefficients: those of a plan (`stacked_coefficients`), on the device of the latents.
            noisy: whether each step adds fresh noise.
        """
        return tuple(
            self.step(
                t=t,
                prediction_type=self.config.prediction_type,
                clip=self.clip,
                noisy=adds_noise,
                **dict(zip(self.step.coefficients, row.split(1), strict=True)),
            )
            for t, row, adds_noise in zip(timesteps, coefficients, noisy, strict=True)
        )

    @property
    def clip(self) -> float | None:
        """Bound on the predicted image; None for none."""
        return self.config.clip_sample_range if self.config.clip_sample else None

    def noise_level(self, t: int, dtype: torch.dtype) -> Tensor:
        """The shares of image and noise at timestep `t`, [2] float32 on the CPU, for `add_noise` to latents of `dtype`.

        They are rounded to that dtype, as in diffusers. Do not write to the result.
        """
        return _noise_level(self.config, t, dtype)

    def common(self, t: int, alphas: Tensor) -> dict[str, Any]:
        """The fields that every step has, but for `noisy`."""
        alpha = alphas[t]
        return {
            "t": t,
            "prediction_type": self.config.prediction_type,
            "clip": self.clip,
            "signal": alpha.sqrt(),
            "spread": (1 - alpha).sqrt(),
        }


@lru_cache(maxsize=128)
def _plan(sampler: Sampler, timesteps: tuple[int, ...], eta: float, span: int) -> Plan:
    alphas = _alphas(sampler.config)
    if sampler.config.prediction_type == "epsilon" and not alphas[timesteps[0]]:
        raise RequestError(
            f"timestep {timesteps[0]} is pure noise with rescale_betas_zero_snr=True, so prediction_type='epsilon' has "
            "no image there: expected v_prediction or sample"
        )
    return tuple(sampler.steps(timesteps, alphas, eta, span))


_alphas = lru_cache(maxsize=32)(alphas_cumprod)


@lru_cache(maxsize=1024)  # timesteps of a schedule
def _noise_level(config: SchedulerConfig, t: int, dtype: torch.dtype) -> Tensor:
    alpha = _alphas(config)[t].to(dtype)
    return torch.stack([alpha**0.5, (1 - alpha) ** 0.5]).float()
