"""This package itself."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from ...runtime import Pipeline
from .protocol import (
    CONVERSION,
    DECODE,
    GENERATE,
    TEXT_ENCODERS,
    TOKENS,
    Facts,
    Settings,
    TimedImage,
    device_name,
    step_name,
)

STAGES = {
    "tokenize": TOKENS,
    "encode": TEXT_ENCODERS,
    "draw": GENERATE,
    "generate": GENERATE,
    "decode": DECODE,
    "convert": CONVERSION,
}
PACKAGES = ("torch", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx")


class Runner:
    """A bundle; ``arguments`` are those of :meth:`hypersd.Pipeline.load`."""

    def __init__(self, bundle: str, **arguments: Any) -> None:
        self._bundle = bundle
        self._arguments = arguments

    def load(self) -> Facts:
        """Load the bundle."""
        self._pipe = pipe = Pipeline.load(self._bundle, **self._arguments)
        choice = pipe.choice
        assert choice is not None  # it was loaded
        return Facts(
            precision=getattr(choice, "precision", None) or pipe.manifest.precision,
            device=device_name(pipe.device),
            how=choice.target or choice.backend,
            packages=PACKAGES,
        )

    def generate(self, settings: Settings) -> TimedImage:
        """Generate one image."""
        began = time.perf_counter()
        result = self._pipe(
            settings.prompt,
            **settings.schedule,
            eta=settings.eta,
            guidance_scale=settings.guidance_scale,
            height=settings.height,
            width=settings.width,
            seed=settings.seed,
        )
        seconds = time.perf_counter() - began
        return TimedImage(np.asarray(result.images[0]), seconds, _stages(result.timings))


def _stages(timings: dict[str, float]) -> dict[str, float]:
    """A call's timings under the names that all contenders share."""
    steps = [seconds for key, seconds in timings.items() if key.startswith("step_")]
    named = {STAGES[key]: seconds for key, seconds in timings.items() if key in STAGES}
    return named | {step_name(i): seconds for i, seconds in enumerate(steps, start=1)}
