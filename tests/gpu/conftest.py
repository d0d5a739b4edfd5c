"""What the tests on a GPU share. Run them with scripts/gpu_check.sh, which shows the GPU to them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cuda():
    """The CUDA device; a test that needs one is skipped without."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda", 0)


@pytest.fixture(scope="session", params=["tensorrt", "tensorrt-rtx"])
def backend(request: pytest.FixtureRequest, cuda) -> str:
    """Each flavour of TensorRT that is installed and has a driver for it."""
    from hypersd.engines.tensorrt.machine import this_machine, why_not_backend

    if reason := why_not_backend(request.param, this_machine()):
        pytest.skip(reason)
    return request.param


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
    """``built(name)``: the same with engines of the flavour, checked against ONNX Runtime as they were built."""
    from hypersd.engines import build_engines

    def build(name: str) -> Path:
        return build_engines(fp16_bundle(name), backend).root

    return build
