"""Fixtures of the tests on a GPU. scripts/gpu_check.sh runs them and makes the GPU visible to them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from gpu_report import UNSUPPORTED_GPU

if TYPE_CHECKING:
    import torch

# Both TensorRT packages define the same C++ names: scripts/gpu_report.py tests each in a process of its own.
BACKENDS = os.environ.get("HYPERSD_BACKENDS", "").replace(",", " ").split() or ["tensorrt", "tensorrt-rtx"]


@pytest.fixture(scope="session")
def cuda():
    """The CUDA device; a test that needs one is skipped without."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda", 0)


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request: pytest.FixtureRequest, cuda, fp16_bundle, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Each TensorRT package that is installed, has a driver for it and knows the GPU."""
    from hypersd.engines.tensorrt.machine import this_machine, why_not_backend
    from hypersd.errors import EngineError

    if reason := why_not_backend(request.param, this_machine()):
        pytest.skip(reason)
    try:
        _run_one_plan(request.param, fp16_bundle("Hyper-SD15-1step-lora"), tmp_path_factory.mktemp("probe"), cuda)
    except EngineError as error:
        if UNSUPPORTED_GPU.search(str(error)):
            pytest.skip(" ".join(str(error).split()))
        raise
    return request.param


def _run_one_plan(backend: str, bundle: Path, folder: Path, device: torch.device) -> None:
    """Build, load and run one tiny network, which tells whether the backend knows the GPU."""
    import torch

    from hypersd.engines import Bundle
    from hypersd.engines.tensorrt.activation_memory import ActivationMemory
    from hypersd.engines.tensorrt.api import load_api
    from hypersd.engines.tensorrt.build_process import BuildJob, run_build
    from hypersd.engines.tensorrt.target_loader import warm_up
    from hypersd.engines.tensorrt.tensorrt_engine import TensorRTEngine

    opened, name, plan = Bundle.load(bundle), "text_encoder", folder / "probe.engine"
    component = opened.manifest.components[name]
    job = BuildJob(
        backend=backend,
        component=name,
        onnx=str(opened.path(component.onnx)),
        plan=str(plan),
        inputs=component.inputs,
        outputs=component.outputs,
    )
    run_build(job, lambda fraction, detail: None)
    engine = TensorRTEngine(load_api(backend), name, plan, component, device, ActivationMemory(device))
    warm_up(engine, torch.cuda.Stream(device))


@pytest.fixture(scope="session")
def fp16_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_repos: Path, source_options) -> Callable[[str], Path]:
    """``fp16_bundle(name)``: a tiny checkpoint's fp16 bundle."""
    import functools

    from hypersd.export import ExportOptions, export_bundle

    folder = tmp_path_factory.mktemp("gpu-bundles")

    @functools.cache
    def export(name: str) -> Path:
        changes = {"vae": str(tiny_repos / "madebyollin/sdxl-vae-fp16-fix")} if "SDXL" in name else {}
        options = ExportOptions(sources=source_options(name, **changes), precision="fp16")
        return export_bundle(name, folder / name, options).root

    return export


@pytest.fixture(scope="session")
def built(fp16_bundle, backend: str) -> Callable[[str], Path]:
    """``built(name)``: the same with engines of the backend, checked against ONNX Runtime as they were built."""
    from hypersd.engines import build_engines

    def build(name: str) -> Path:
        return build_engines(fp16_bundle(name), backend).root

    return build
