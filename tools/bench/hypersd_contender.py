"""The contenders that are this package itself."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from ...engines import Bundle
from ...runtime import Pipeline
from ...runtime.one_graph_function import find_one_graph
from ...runtime.params import Params
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
    "generate": GENERATE,
    "decode": DECODE,
    "convert": CONVERSION,
}
PACKAGES = ("torch", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx")


class Runner:
    """A bundle; ``arguments`` are those of :meth:`hypersd.Pipeline.load`.

    ``is_one_graph``: run the bundle's one-graphs; only the one in use is loaded.
    """

    def __init__(self, bundle: str, is_one_graph: bool = False, **arguments: Any) -> None:
        self._bundle = bundle
        self._arguments = arguments
        self._one_graphs = Bundle.load(bundle).manifest if is_one_graph else None

    def load(self) -> Facts:
        """Load the bundle, or its first one-graph."""
        pipe = self._load(None if self._one_graphs is None else next(iter(self._one_graphs.one_graphs)))
        choice = pipe.choice
        assert choice is not None  # it was loaded
        return Facts(
            precision=choice.precision or pipe.manifest.precision,
            device=device_name(pipe.device),
            how=", ".join(word for word in (choice.target or choice.backend, pipe.one_graph) if word),
            packages=PACKAGES,
        )

    def generate(self, settings: Settings) -> TimedImage:
        """Generate one image; the first one-graph image of another number of steps loads its graph, untimed."""
        params = Params(
            prompt=settings.prompt,
            **settings.schedule,
            eta=settings.eta,
            guidance_scale=settings.guidance_scale,
            height=settings.height,
            width=settings.width,
            seed=settings.seed,
        )
        if self._one_graphs is not None and (name := find_one_graph(self._one_graphs, params)) != self._pipe.one_graph:
            self._load(name)
        began = time.perf_counter()
        result = self._pipe.generate(params)
        seconds = time.perf_counter() - began
        return TimedImage(np.asarray(result.images[0]), seconds, _stages(result.timings))

    def _load(self, one_graph: str | None) -> Pipeline:
        self._pipe = Pipeline.load(self._bundle, one_graph=one_graph, **self._arguments)
        return self._pipe


def _stages(timings: dict[str, float]) -> dict[str, float]:
    """A call's timings under the shared names of stages."""
    steps = [seconds for key, seconds in timings.items() if key.startswith("step_")]
    named = {STAGES[key]: seconds for key, seconds in timings.items() if key in STAGES}
    return named | {step_name(i): seconds for i, seconds in enumerate(steps, start=1)}
