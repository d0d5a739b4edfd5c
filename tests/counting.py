"""Engines of a bundle for tests: as a pipeline loads them, counting their runs, or computing nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from hypersd import Pipeline
from hypersd.engines import Bundle, Engine
from hypersd.engines.engine import NullEngine
from hypersd.engines.load import choose, load_choice
from hypersd.runtime.text import load_tokenizers


def load_engines(bundle: Bundle, backend: str = "auto", device: str = "auto") -> Mapping[str, Engine]:
    """A bundle's engines; the backend "null" computes nothing."""
    if backend == "null":
        return {name: NullEngine(name, component) for name, component in bundle.manifest.components.items()}
    return load_choice(bundle, choose(bundle, backend, device), device)


def null_pipe(root: Path) -> Pipeline:
    """A pipeline whose engines compute nothing."""
    bundle = Bundle.load(root)
    return Pipeline(bundle.manifest, load_engines(bundle, "null"), load_tokenizers(bundle))


class Counting:
    """An engine that notes the shapes that it is run with."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.inputs, self.outputs, self.device = engine.inputs, engine.outputs, engine.device
        self.capturable = engine.capturable
        self.rows: list[int] = []
        self.timesteps: list[float] = []

    def run(self, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        self.rows.append(len(next(tensor for name, tensor in feeds.items() if name != "timestep")))
        if "timestep" in feeds:
            self.timesteps.append(feeds["timestep"].item())
        return self.engine.run(feeds)


def counting_pipe(root: Path, backend: str = "onnxruntime") -> tuple[Pipeline, dict[str, Counting]]:
    """A pipeline whose engines count."""
    bundle = Bundle.load(root)
    engines = {name: Counting(engine) for name, engine in load_engines(bundle, backend).items()}
    tokenizers = load_tokenizers(bundle)
    return Pipeline(bundle.manifest, engines, tokenizers), engines
