"""A bundle's graph of the whole image, in this package's own environment."""

from __future__ import annotations

import time

import numpy as np

from ...engines import Bundle
from ...runtime.one_graph import OneGraphPipeline, find_one_graph
from ...runtime.params import Params
from .protocol import CONVERSION, GENERATE, TOKENS, Facts, Settings, TimedImage, device_name

STAGES = {"tokenize": TOKENS, "draw": GENERATE, "convert": CONVERSION}
PACKAGES = ("torch", "onnxruntime", "onnxruntime-gpu")


class Runner:
    """The one-graphs of a bundle, of which the one that draws is loaded."""

    def __init__(self, bundle: str, device: str) -> None:
        self._bundle = bundle
        self._device = device

    def load(self) -> Facts:
        """Load the bundle's first one-graph."""
        self._manifest = Bundle.load(self._bundle).manifest
        self._pipe = OneGraphPipeline.load(self._bundle, device=self._device)
        how = f"onnxruntime, {', '.join(self._manifest.one_graphs)}"
        device = device_name(self._pipe.device)
        return Facts(precision=self._manifest.precision, device=device, how=how, packages=PACKAGES)

    def generate(self, settings: Settings) -> TimedImage:
        """Generate one image; the first of other steps loads their graph."""
        params = Params(
            prompt=settings.prompt,
            **settings.schedule,
            eta=settings.eta,
            height=settings.height,
            width=settings.width,
            seed=settings.seed,
        )
        name = find_one_graph(self._manifest, params)
        if name != self._pipe.name:
            self._pipe = OneGraphPipeline.load(self._bundle, name, device=self._device)
        began = time.perf_counter()
        result = self._pipe.generate(params)
        seconds = time.perf_counter() - began
        stages = {STAGES[key]: took for key, took in result.timings.items() if key in STAGES}
        return TimedImage(np.asarray(result.images[0]), seconds, stages)
