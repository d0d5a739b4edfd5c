"""From a bundle's target to engines that are warm."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ..bundle import Bundle
from ..engine import TORCH_DTYPES, Engine
from ..manifest import Component
from ..progress import BuildProgress, Stage
from .activation_memory import ActivationMemory, out_of_memory
from .api import load_api
from .runtime_cache import cache_path, read_cache, write_cache
from .targets import extents_of
from .tensorrt_engine import TensorRTEngine


def load_target(
    bundle: Bundle, name: str, components: Mapping[str, Component], device: torch.device, progress: BuildProgress
) -> dict[str, Engine]:
    """Load a target's plans and run each once, so that no call pays for what happens only once.

    TensorRT-RTX compiles its kernels here and keeps them beside the plan for the next load, if that can be written.

    Args:
        bundle: the bundle.
        name: the target's.
        components: the networks, as narrow as the target's plans.
        device: a CUDA device.
        progress: told of every plan, and whether its kernels had to be compiled.

    Raises:
        BundleError: a plan is missing or shortened.
        EngineError: one cannot be loaded.
    """
    target = bundle.manifest.engines[name]
    api = load_api(target.backend)
    major, minor = torch.cuda.get_device_capability(device)
    memory = ActivationMemory(device)
    engines: dict[str, TensorRTEngine] = {}
    for component, plan in target.plans.items():
        path = check_plan(bundle, plan.file)
        with Stage(progress, f"{component}: load engine"):
            engines[component] = TensorRTEngine(
                api,
                component,
                path,
                components[component],
                device,
                memory,
                onnx=bundle.path(components[component].onnx) if target.stripped else None,
                cache=read_cache(cache_path(path, f"{major}.{minor}")),
            )
    stream = torch.cuda.Stream(device)  # not the default one, for which TensorRT waits, and others with it
    for component, engine in engines.items():
        cache = cache_path(bundle.path(target.plans[component].file), f"{major}.{minor}")
        with Stage(progress, f"{component}: first run") as stage:
            warm_up(engine, stream)
            engine.drop_lanes()  # a pipeline runs on a stream of its own, and has lanes there
            content = engine.runtime_cache()
            if len(content) > len(read_cache(cache)):
                is_kept = write_cache(cache, content)
                stage.note = "compiled for this GPU" + ("" if is_kept else f"; {cache.parent} cannot be written")
            elif content:
                stage.note = "compiled at an earlier load"
    memory.drop_blocks()
    return dict(engines)


def check_plan(bundle: Bundle, file: str) -> Path:
    """The path of a plan that is there, of the size that was recorded.

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
