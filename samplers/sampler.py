"""A sampler: timesteps and coefficients for a number of steps, planned before the first one is run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

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
        defaults: the constants whose defaults in diffusers differ from those of `SchedulerConfig`.
        scheduler_class: diffusers' scheduler.
        scheduler_settings: the constants that Hyper-SD's model card sets for it, whatever the base's are.
    """

    config: SchedulerConfig
    kind: ClassVar[str]
    default_eta: ClassVar[float] = 0.0
    defaults: ClassVar[Mapping[str, Any]] = {}
    scheduler_class: ClassVar[str]
    scheduler_settings: ClassVar[Mapping[str, Any]] = {}

    @abstractmethod
    def spaced_timesteps(self, num_inference_steps: int) -> list[int]:
        """The descending timesteps of so many steps."""

    @abstractmethod
    def steps(self, timesteps: Sequence[int], alphas: Tensor, eta: float) -> Iterable[Step]:
        """The steps at all of a schedule's timesteps; `alphas` [num_train_timesteps] is its `alphas_cumprod`."""

    def custom_timesteps(self, timesteps: Sequence[int]) -> list[int]:
        """The caller's timesteps, if the sampler can take them."""
        return check_timesteps(self.config, timesteps)

    def timesteps(self, num_inference_steps: int | None = None, timesteps: Sequence[int] | None = None) -> list[int]:
        """The timesteps at which the denoiser is called, first to last. Exactly one argument is given.

        `num_inference_steps` is 1 to `num_train_timesteps` for DDIM, to `original_inference_steps` for TCD and LCM.
        `timesteps` are custom ones, strictly descending, for TCD and LCM.
        """
        if num_inference_steps is not None and timesteps is None:
            return self.spaced_timesteps(num_inference_steps)
        if timesteps is not None and num_inference_steps is None:
            return self.custom_timesteps(timesteps)
        raise RequestError("expected exactly one of num_inference_steps and timesteps")

    def plan(
        self,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        eta: float | None = None,
    ) -> Plan:
        """Every step of a run. `eta` is 0 to 1; LCM has none.

        A run that starts later takes the last steps of the plan, `plan[first:]`: coefficients are those of the whole
        schedule, as in diffusers' image-to-image pipelines.
        """
        eta = self.default_eta if eta is None else real_number("eta", eta, 0.0, 1.0)
        return _plan(self, tuple(self.timesteps(num_inference_steps, timesteps)), eta)

    def common(self, t: int, alphas: Tensor) -> dict[str, Any]:
        """The coefficients that every step has."""
        alpha = alphas[t]
        return {
            "t": t,
            "prediction_type": self.config.prediction_type,
            "signal": alpha.sqrt(),
            "spread": (1 - alpha).sqrt(),
        }


@lru_cache(maxsize=128)
def _plan(sampler: Sampler, timesteps: tuple[int, ...], eta: float) -> Plan:
    alphas = alphas_cumprod(sampler.config)
    if sampler.config.prediction_type == "epsilon" and not alphas[timesteps[0]]:
        raise RequestError(
            f"timestep {timesteps[0]} is pure noise with rescale_betas_zero_snr=True, so prediction_type='epsilon' has "
            "no image there: expected v_prediction or sample"
        )
    return tuple(sampler.steps(timesteps, alphas, eta))
