"""Load a target of a bundle: its engines, each of which has run once."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import torch

from ..bundle import Bundle
from ..cuda.device import out_of_memory, release_cached_memory
from ..cuda.streams import claim_stream
from ..engine import TORCH_DTYPES, Engine
from ..image_shapes import extents_of
from ..late_engine import LateEngine
from ..progress import Progress, Stage
from ..specs import Component
from .activation_memory import ActivationMemory
from .api import load_api
from .runtime_cache import RuntimeCache, find_runtime_cache
from .tensorrt_engine import TensorRTEngine


def load_target(
    bundle: Bundle, name: str, components: Mapping[str, Component], device: torch.device, progress: Progress
) -> dict[str, Engine]:
    """Load a target's plans and run each once, so that no call pays for one-time costs.

    TensorRT-RTX compiles its kernels here and keeps them for the next load (:mod:`.runtime_cache`).

    Args:
        bundle: the bundle.
        name: the target's.
        components: the bundle's, narrowed to the target's shapes.
        device: a CUDA device.
        progress: receives a stage for every plan, and whether its kernels were compiled.

    Raises:
        BundleError: a plan is missing or shortened.
        EngineError: one cannot be loaded.
    """
    plans, memory = _Plans(bundle, name, components, device), ActivationMemory(device)
    engines: dict[str, TensorRTEngine] = {}
    for component in plans.caches:
        with Stage(progress, f"{component}: load engine"):
            engines[component] = plans.load(component, memory)
    for component, engine in engines.items():
        with Stage(progress, f"{component}: first run") as stage:
            stage.note = plans.run_first(engine)
    memory.drop_blocks()
    release_cached_memory(device)
    return dict(engines)


def late_target(
    bundle: Bundle, name: str, components: Mapping[str, Component], device: torch.device
) -> dict[str, LateEngine]:
    """A target's engines, none of them loaded yet. Each has activation memory of its own, which goes with it.

    A load runs the engine once only where TensorRT-RTX has kernels to compile: they are kept for the next load.

    Raises:
        BundleError: a plan is missing or shortened.
    """
    plans = _Plans(bundle, name, components, device)

    def load(component: str) -> TensorRTEngine:
        memory = ActivationMemory(device)
        engine = plans.load(component, memory)
        if engine.api.is_rtx and engine.runtime_cache() not in plans.caches[component].contents():
            plans.run_first(engine)
            memory.drop_blocks()
            release_cached_memory(device)
        return engine

    return {
        component: LateEngine(components[component], functools.partial(load, component), device)
        for component in plans.caches
    }


class _Plans:
    """A target's plans, whose files are there, and the places of their compiled kernels by component."""

    def __init__(self, bundle: Bundle, name: str, components: Mapping[str, Component], device: torch.device) -> None:
        self._bundle, self._components, self._device = bundle, components, device
        self._target = target = bundle.manifest.engines[name]
        self._api = load_api(target.backend)
        # TensorRT would wait for the default stream, and so would other threads
        self._stream = claim_stream(device)
        major, minor = torch.cuda.get_device_capability(device)
        gpu = torch.cuda.get_device_name(device)
        self.caches: dict[str, RuntimeCache] = {}
        for component, plan in target.plans.items():
            path, record = check_plan(bundle, plan.file), bundle.manifest.files[plan.file]
            self.caches[component] = find_runtime_cache(path, record.sha256, target.version, gpu, f"{major}.{minor}")

    def load(self, component: str, memory: ActivationMemory) -> TensorRTEngine:
        """Load a component's plan, with the kernels that earlier loads compiled."""
        onnx = self._bundle.path(self._components[component].onnx) if self._target.stripped else None
        return TensorRTEngine(
            self._api,
            component,
            self._bundle.path(self._target.plans[component].file),
            self._components[component],
            self._device,
            memory,
            onnx=onnx,
            cached=self.caches[component].contents(),
        )

    def run_first(self, engine: TensorRTEngine) -> str:
        """Run an engine once, and keep the kernels that were compiled for it; returns a note for the user."""
        warm_up(engine, self._stream)
        engine.drop_lanes()  # a pipeline has lanes on a stream of its own
        return self.caches[engine.name].keep(engine.runtime_cache())


def check_plan(bundle: Bundle, file: str) -> Path:
    """The path of a plan, after a check of its size.

    Raises:
        BundleError: it is missing or shortened.
    """
    bundle.check_file(file)
    return bundle.path(file)


def warm_up(engine: TensorRTEngine, stream: torch.cuda.Stream) -> None:
    """Run an engine once at its usual shapes, on zeros and on ``stream``, and wait for it."""
    try:
        feeds = {
            name: torch.zeros(extents_of(spec)[1], dtype=TORCH_DTYPES[spec.dtype], device=engine.device)
            for name, spec in engine.inputs.items()
        }
    except torch.OutOfMemoryError as error:
        raise out_of_memory(f"{engine.name}'s inputs did not fit", engine.device) from error
    stream.wait_stream(torch.cuda.current_stream(engine.device))
    with torch.cuda.stream(stream):
        engine.run(feeds)
    stream.synchronize()
