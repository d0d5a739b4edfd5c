"""Samplers of few-step diffusion: one file for each, its schedule, its plan of a run and its step."""

from __future__ import annotations

from typing import Any

from ..errors import RequestError, shown
from .ddim import DDIM
from .lcm import LCM
from .sampler import Plan, Sampler
from .schedule import scheduler_config
from .tcd import TCD

__all__ = ["DDIM", "LCM", "SAMPLERS", "TCD", "Plan", "Sampler", "find_sampler", "make_sampler"]

SAMPLERS: dict[str, type[Sampler]] = {sampler.kind: sampler for sampler in (DDIM, TCD, LCM)}


def find_sampler(kind: str) -> type[Sampler]:
    """Look a sampler up by its name.

    Raises:
        RequestError: the name is not known.
    """
    if kind not in SAMPLERS:
        raise RequestError(f"sampler {shown(kind)} is not known: expected {' or '.join(SAMPLERS)}")
    return SAMPLERS[kind]


def make_sampler(kind: str, /, **config: Any) -> Sampler:
    """A sampler of kind `ddim`, `tcd` or `lcm`; `config` in diffusers' key names, over diffusers' defaults.

    Raises:
        RequestError: the kind or a key is not known, or a value is out of range.

    Examples:
        >>> make_sampler("tcd").timesteps(4)
        [999, 759, 499, 259]
    """
    sampler = find_sampler(kind)
    return sampler(scheduler_config(config, sampler.defaults))
