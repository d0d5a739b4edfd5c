"""Pipelines of diffusers, of parts that are loaded already."""

from __future__ import annotations

from typing import Any

import diffusers


def make_pipeline(name: str, kind: str, parts: dict[str, Any]) -> Any:
    """A checkpoint's ``StableDiffusion[XL]{kind}Pipeline``, without safety checker, watermark and progress bar."""
    family, more = ("XL", {"add_watermarker": False}) if "SDXL" in name else ("", {"requires_safety_checker": False})
    pipe = getattr(diffusers, f"StableDiffusion{family}{kind}Pipeline")(**parts, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe
