"""Samplers of few-step diffusion: schedules, the plan of a run, and the step arithmetic."""

from __future__ import annotations

from .sampler import Sampler, make_sampler

__all__ = ["Sampler", "make_sampler"]
