"""Checks that a plan computes its component, as far as this machine can run it."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import EngineError
from ..bundle import Bundle
from ..compare import TOLERANCES, differences, excess
from ..specs import Component, EngineTarget, Range, TensorSpec
from .api import TensorRTApi
from .machine import Machine, why_not_gpu

if TYPE_CHECKING:
    from torch import Tensor

    from ..engine import Engine

SEED = 0
LARGEST_TOKEN = 255  # in every vocabulary


def validate_plan(
    api: TensorRTApi,
    machine: Machine,
    bundle: Bundle,
    component: str,
    specs: Component,
    target: EngineTarget,
    plan: Path,
) -> float | None:
    """Check a plan before it is recorded.

    Everywhere: it is a plan of this backend and names the manifest's tensors. The ONNX graph was compared with the
    manifest when it was parsed. On a GPU that it was built for: it loads, has the manifest's tensors in name, type and
    shape, and its outputs are ONNX Runtime's for the same ONNX, at both ends of every range.

    Args:
        api: the TensorRT that built it.
        machine: this machine.
        bundle: the bundle, for the ONNX files.
        component: its name.
        specs: its inputs and outputs, narrowed to the shapes of the plan.
        target: the target of the plan.
        plan: the plan's file.

    Returns:
        The maximum error relative to ONNX Runtime's largest value; None without such a GPU.

    Raises:
        EngineError: an output differs, or the file is not such a plan.
    """
    foreign_gpu = _check_file(api, plan, specs)
    if foreign_gpu or machine.gpu is None or why_not_gpu(target, machine) is not None:
        return None
    import torch

    from ..cuda.device import release_cached_memory
    from ..onnx_runtime import PlainEngine
    from .activation_memory import ActivationMemory
    from .tensorrt_engine import TensorRTEngine

    device = torch.device("cuda", machine.gpu.index)
    onnx = bundle.path(specs.onnx)
    engine = TensorRTEngine(
        api, component, plan, specs, device, ActivationMemory(device), onnx=onnx if target.stripped else None
    )
    error = compare_engines(component, engine, PlainEngine(onnx, bundle.manifest.components[component]))
    del engine
    release_cached_memory(device)  # another process times the next component's kernels
    return error


def _check_file(api: TensorRTApi, plan: Path, specs: Component) -> bool:
    """Check the header and the tensors' names; True if the plan is for other GPUs."""
    if plan.stat().st_size == 0:  # an empty file cannot be mapped
        raise EngineError(f"{plan} is empty: build it once more")
    reason = api.why_invalid(plan) or ""
    if "MALFORMED_ENGINE" in reason:
        raise EngineError(f"{plan}: {api} does not know its own plan again: build it once more")
    with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if absent := [name for name in (*specs.inputs, *specs.outputs) if content.find(name.encode()) < 0]:
            raise EngineError(f"{plan} has no tensor {', '.join(absent)}: build it once more")
    return "UNSUPPORTED_CC" in reason


def compare_engines(name: str, engine: Engine, reference: Engine) -> float:
    """Run both on the same random inputs, at both ends of every range.

    Returns:
        The maximum error over all outputs, relative to the reference's largest value.

    Raises:
        EngineError: an output differs by more than :data:`..compare.TOLERANCES` allow.
    """
    worst = 0.0
    for feeds in random_feeds(engine.inputs):
        expected = reference.run({key: tensor.to(reference.device) for key, tensor in feeds.items()})
        actual = engine.run({key: tensor.to(engine.device) for key, tensor in feeds.items()})
        for key, tensor in actual.items():
            largest, rms = differences(tensor.cpu().numpy(), expected[key].cpu().numpy())
            if words := excess(largest, rms, TOLERANCES[engine.outputs[key].dtype]):
                shapes = [list(tensor.shape) for tensor in feeds.values()]
                raise EngineError(f"{name}: output {key} at {shapes} differs from ONNX Runtime {words}")
            worst = max(worst, largest)
    return worst


def random_feeds(specs: Mapping[str, TensorSpec]) -> Iterator[dict[str, Tensor]]:
    """Inputs on the CPU at both ends of every range."""
    import torch

    from ..random_inputs import ends_of_ranges, random_input

    varying = dict.fromkeys(dim.base for spec in specs.values() for dim in spec.shape if isinstance(dim, Range))
    for seed, ends in enumerate(ends_of_ranges(varying), start=SEED):
        generator = torch.Generator().manual_seed(seed)
        feeds = {}
        for name, spec in specs.items():
            shape = [dim if isinstance(dim, int) else getattr(dim, ends[dim.base]) for dim in spec.shape]
            feeds[name] = random_input(name, spec, shape, LARGEST_TOKEN, generator)
            if spec.dtype == "int64":  # the only largest: the first encoders pool where the largest token is
                feeds[name][:, -1] = LARGEST_TOKEN
        yield feeds
