"""Load a target of a bundle: its engines, each of which has run once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ..bundle import Bundle
from ..engine import TORCH_DTYPES, Engine
from ..files import write_whole
from ..image_shapes import extents_of
from ..progress import Progress, Stage
from ..specs import Component
from .activation_memory import ActivationMemory, out_of_memory
from .api import load_api
from .tensorrt_engine import TensorRTEngine


def load_target(
    bundle: Bundle, name: str, components: Mapping[str, Component], device: torch.device, progress: Progress
) -> dict[str, Engine]:
    """Load a target's plans and run each once, so that no call pays for one-time costs.

    TensorRT-RTX compiles its kernels here and keeps them beside the plan for the next load, if that can be written.

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
    stream = torch.cuda.Stream(device)  # TensorRT would wait for the default stream, and so would other threads
    for component, engine in engines.items():
        cache = cache_path(bundle.path(target.plans[component].file), f"{major}.{minor}")
        with Stage(progress, f"{component}: first run") as stage:
            warm_up(engine, stream)
            engine.drop_lanes()  # a pipeline has lanes on a stream of its own
            stage.note = keep_cache(cache, engine.runtime_cache())
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


def cache_path(plan: Path, compute_capability: str) -> Path:
    """The file with a plan's compiled kernels for GPUs of a compute capability."""
    return plan.with_suffix(f".sm{compute_capability.replace('.', '')}.cache")


def keep_cache(path: Path, content: bytes) -> str:
    """Write the compiled kernels unless the file already holds them; returns a note for the user."""
    if not content:
        return ""
    if content == read_cache(path):
        return "compiled at an earlier load"
    return "compiled for this GPU" + ("" if write_cache(path, content) else f"; {path.parent} cannot be written")


def read_cache(path: Path) -> bytes:
    """The file's content; empty if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def write_cache(path: Path, content: bytes) -> bool:
    """Write the file atomically; returns False if its folder is not writable, as a bundle's may be."""
    try:
        write_whole(path, content)
    except OSError:
        return False
    return True
