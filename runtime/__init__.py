"""Prompt to picture: tokens, schedules, step math, the loop, the picture."""

from __future__ import annotations

from .pipeline import Pipeline, PipelineOutput
from .samplers import make_sampler

__all__ = ["Pipeline", "PipelineOutput", "make_sampler"]
