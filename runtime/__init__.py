"""Prompt to image: tokens, schedules, step math, the loop, the image."""

from __future__ import annotations

from ..samplers import make_sampler
from .pipeline import Pipeline, PipelineOutput

__all__ = ["Pipeline", "PipelineOutput", "make_sampler"]
