"""Load a target of a bundle: its engines, each of which has run once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ..bundle import Bundle
from ..engine import TORCH_DTYPES, Engine
from ..image_shapes import extents_of
from ..progress import Progress, Stage
from ..specs import Component
from .activation_memory import ActivationMemory, out_of_memory
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
    target = bundle.manifest.engines[name]
    api = load_api(target.backend)
    major, minor = torch.cuda.get_device_capability(device)
    gpu = torch.cuda.get_device_name(device)
    memory = ActivationMemory(device)
    engines: dict[str, TensorRTEngine] = {}
    caches: dict[str, RuntimeCache] = {}
    for component, plan in target.plans.items():
        path, record = check_plan(bundle, plan.file), bundle.manifest.files[plan.file]
        caches[component] = find_runtime_cache(path, record.sha256, target.version, gpu, f"{major}.{minor}")
        with Stage(progress, f"{component}: load engine"):
            engines[component] = TensorRTEngine(
                api,
                component,
                path,
                components[component],
                device,
                memory,
                onnx=bundle.path(components[component].onnx) if target.stripped else None,
                cached=caches[component].contents(),
            )
    stream = torch.cuda.Stream(device)  # TensorRT would wait for the default stream, and so would other threads
    for component, engine in engines.items():
        with Stage(progress, f"{component}: first run") as stage:
            warm_up(engine, stream)
            engine.drop_lanes()  # a pipeline has lanes on a stream of its own
            stage.note = caches[component].keep(engine.runtime_cache())
    memory.drop_blocks()
    return dict(engines)


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
