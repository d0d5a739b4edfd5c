"""Noise schedules and timestep lists: pure functions of a frozen configuration, in diffusers' key names."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from ..errors import RequestError, shortened, shown
from .numbers import is_whole

LARGEST_STEPS = 100_000  # models are trained with 1000
LARGEST_FACTOR = 1e6
BetaSchedule = Literal["linear", "scaled_linear"]
PredictionType = Literal["epsilon", "sample", "v_prediction"]
TimestepSpacing = Literal["leading", "trailing", "linspace"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """The constants of a schedule, under diffusers' names and with the defaults of its TCD and LCM schedulers.

    Hashable, so that results computed from it can be cached.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: BetaSchedule = "scaled_linear"
    trained_betas: tuple[float, ...] | None = None
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = True
    steps_offset: int = 0
    prediction_type: PredictionType = "epsilon"
    timestep_spacing: TimestepSpacing = "leading"
    rescale_betas_zero_snr: bool = False
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0

    def __post_init__(self) -> None:
        if self.trained_betas is not None:
            object.__setattr__(self, "trained_betas", _floats(self.trained_betas))
        for name, (accepts, expected) in _RULES.items():
            if not accepts(value := getattr(self, name)):
                raise RequestError(f"scheduler: {name}={shown(value)} is not supported, expected {expected}")
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise RequestError(
                f"scheduler: trained_betas has {len(self.trained_betas)} values, expected num_train_timesteps="
                f"{self.num_train_timesteps}"
            )


def scheduler_config(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> SchedulerConfig:
    """`options` in diffusers' key names over a sampler's defaults.

    Keys that diffusers writes and that change nothing are dropped. Anything else that is unknown is rejected: a setting
    that is ignored gives another image without a word.

    Raises:
        RequestError: a key is not known, or a value is out of range.
    """
    kept = {key: value for key, value in options.items() if key not in _HARMLESS and not key.startswith("_")}
    if kept.pop("thresholding", False):
        raise RequestError("scheduler: thresholding=True is not supported, expected False")
    known = [field.name for field in dataclasses.fields(SchedulerConfig)]
    if unknown := sorted(kept.keys() - known):
        raise RequestError(f"scheduler: unknown {shortened(', '.join(unknown), 80)}; supported are {', '.join(known)}")
    return SchedulerConfig(**{**defaults, **kept})


def alphas_cumprod(config: SchedulerConfig) -> Tensor:
    """The signal's share of the variance at every training timestep: [T] float32 on the CPU, as diffusers to the bit.

    DDPM, arXiv:2006.11239, eq. 4 (its alpha-bar; the DDIM paper calls it alpha).
    """
    betas = _betas(config)
    if config.rescale_betas_zero_snr:
        betas = rescale_zero_terminal_snr(betas)
    return torch.cumprod(1.0 - betas, dim=0)


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """[T] float32 to [T] float32: the same schedule, ending in pure noise. arXiv:2305.08891, algorithm 1."""
    roots = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = roots[0], roots[-1]
    bars = ((roots - last) * (first / (first - last))) ** 2
    return 1 - torch.cat([bars[:1], bars[1:] / bars[:-1]])


def check_timesteps(config: SchedulerConfig, timesteps: Iterable[int]) -> list[int]:
    """The same timesteps, if they can be a schedule: integers in [0, num_train_timesteps), strictly descending."""
    steps = list(timesteps) if isinstance(timesteps, Iterable) else timesteps
    inside = isinstance(steps, list) and all(is_whole(t) and 0 <= t < config.num_train_timesteps for t in steps)
    if not inside or not steps or any(a <= b for a, b in itertools.pairwise(steps)):
        last = config.num_train_timesteps - 1
        raise RequestError(f"timesteps={shown(steps)}: expected strictly descending integers from {last} to 0")
    return [int(t) for t in steps]


def _betas(config: SchedulerConfig) -> Tensor:
    start, end, total = config.beta_start, config.beta_end, config.num_train_timesteps
    if config.trained_betas is not None:
        return torch.tensor(config.trained_betas, dtype=torch.float32, device="cpu")
    if config.beta_schedule == "linear":
        return torch.linspace(start, end, total, dtype=torch.float32, device="cpu")
    return torch.linspace(start**0.5, end**0.5, total, dtype=torch.float32, device="cpu") ** 2


def _is_positive(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < cast(float, value) <= LARGEST_FACTOR


def _is_beta(value: object) -> bool:
    return _is_positive(value) and cast(float, value) < 1


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _floats(values: Iterable[Any]) -> tuple[float, ...]:
    try:
        floats = tuple(float(value) for value in values)
    except (TypeError, ValueError, OverflowError):
        floats = ()
    if not floats or not all(_is_beta(value) for value in floats):
        raise RequestError("scheduler: trained_betas is not supported, expected a list of numbers between 0 and 1")
    return floats


def _one_of(literal: Any) -> tuple[Callable[[Any], bool], str]:
    return get_args(literal).__contains__, " or ".join(get_args(literal))


# The test of each field, and its words in a message.
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "num_train_timesteps": (lambda n: is_whole(n) and 0 < n <= LARGEST_STEPS, f"an integer from 1 to {LARGEST_STEPS}"),
    "original_inference_steps": (
        lambda n: is_whole(n) and 0 < n <= LARGEST_STEPS,
        f"an integer from 1 to {LARGEST_STEPS}",
    ),
    "steps_offset": (lambda n: is_whole(n) and 0 <= n <= LARGEST_STEPS, f"an integer from 0 to {LARGEST_STEPS}"),
    "beta_start": (_is_beta, "a number between 0 and 1"),
    "beta_end": (_is_beta, "a number between 0 and 1"),
    "clip_sample_range": (_is_positive, "a number above 0, at most a million"),
    "timestep_scaling": (_is_positive, "a number above 0, at most a million"),
    "clip_sample": (_is_bool, "true or false"),
    "set_alpha_to_one": (_is_bool, "true or false"),
    "rescale_betas_zero_snr": (_is_bool, "true or false"),
    "beta_schedule": _one_of(BetaSchedule),
    "prediction_type": _one_of(PredictionType),
    "timestep_spacing": _one_of(TimestepSpacing),
}
# Both matter only with thresholding.
_HARMLESS = {"dynamic_thresholding_ratio", "sample_max_value"}
