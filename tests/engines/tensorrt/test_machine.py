"""Why plans cannot run on a machine: every reason in one line, with what was wanted, what is there and what to do."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch

from hypersd.engines.specs import EngineTarget
from hypersd.engines.tensorrt import machine as module
from hypersd.engines.tensorrt.machine import (
    Machine,
    this_machine,
    why_not_backend,
    why_not_memory,
    why_not_target,
)
from hypersd.engines.tensorrt.targets import onnx_hash, this_platform

from .made_by_hand import GIB, gpu, machine, manifest, target, with_plans

BUNDLE = manifest()
NO_GPU = "no CUDA device: there is no NVIDIA driver"


def whole(**changes: Any) -> EngineTarget:
    return with_plans(target(**changes), BUNDLE)


def with_unet(plan_changes: dict[str, Any]) -> EngineTarget:
    """A target whose UNet's plan is another."""
    made = whole()
    plan = msgspec.structs.replace(made.plans["unet"], **plan_changes)
    return msgspec.structs.replace(made, plans={**made.plans, "unet": plan})


def on_gpu(memory: int) -> Machine:
    return machine(gpu=gpu(name="MX450", total_memory=memory))


def without_unet() -> EngineTarget:
    made = whole()
    return msgspec.structs.replace(made, plans={name: made.plans[name] for name in ("text_encoder", "vae_decoder")})


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_nothing_speaks_against_a_machine_that_fits(backend: str) -> None:
    """The other tests each spoil one thing of this."""
    assert why_not_backend(backend, machine()) is None
    assert why_not_target(whole(backend=backend), BUNDLE, machine()) is None


BACKEND_REASONS: dict[str, tuple[Machine, list[str]]] = {
    "not installed": (
        machine(versions={"tensorrt": "10.16"}),
        ["not installed", "pip install -e '.[tensorrt-rtx]'"],
    ),
    "no GPU": (machine(gpu=None, no_gpu=NO_GPU), [NO_GPU]),
    "driver too old": (machine(driver_cuda=(12, 9)), ["TensorRT-RTX", "CUDA 13", "12.9", "update"]),
}


@pytest.mark.parametrize(("here", "parts"), BACKEND_REASONS.values(), ids=BACKEND_REASONS)
def test_a_backend_that_runs_nothing_here(here: Machine, parts: list[str]) -> None:
    """Said of the backend, and the same of every target of it, before anything else."""
    reason = why_not_backend("tensorrt-rtx", here)
    assert reason is not None
    assert "\n" not in reason
    assert [part for part in parts if part not in reason] == []
    assert why_not_target(whole(version="1.0", platform="win32-arm"), BUNDLE, here) == reason


def test_a_driver_of_unknown_age_is_tried() -> None:
    """If the CUDA of wheel or driver is unknown, nothing is rejected on a guess; equal versions are enough."""
    assert why_not_backend("tensorrt", machine(driver_cuda=None)) is None
    assert why_not_backend("tensorrt", machine(driver_cuda=(11, 0), cuda_needed={"tensorrt-rtx": 13})) is None
    assert why_not_backend("tensorrt", machine(driver_cuda=(12, 0), cuda_needed={"tensorrt": 12})) is None


TARGET_REASONS: dict[str, tuple[EngineTarget, Machine, list[str]]] = {
    "version": (whole(version="1.7.0.1"), machine(), ["TensorRT-RTX 1.7.0.1", "1.7.1.116", "hypersd build"]),
    "platform": (
        whole(backend="tensorrt", platform="win32-x86_64"),
        machine(),
        ["win32-x86_64", "linux-x86_64", "hypersd build BUNDLE --backend tensorrt"],
    ),
    "processor": (whole(platform="aarch64"), machine(), ["aarch64", "x86_64", "hypersd build"]),
    "portable, on a GPU that has to be named": (
        whole(),
        machine(gpu=gpu(name="Tesla T4", compute_capability="7.5")),
        ["8.0 or newer", "Tesla T4 has 7.5", "--compute-capability 7.5"],
    ),
    "capability": (
        whole(compute_capabilities=("8.6", "12.0")),
        machine(),
        ["compute capability 8.6, 12.0", "NVIDIA RTX 4090 has 8.9", "hypersd build"],
    ),
    "capability of this machine's GPU": (
        whole(backend="tensorrt"),
        machine(gpu=gpu(name="Orin", compute_capability="8.7")),
        ["8.9", "Orin has 8.7", "hypersd build BUNDLE --backend tensorrt"],
    ),
    "missing plan": (without_unet(), machine(), ["no plan for unet", "hypersd build"]),
    "other ONNX": (
        with_unet({"onnx": "f" * 64}),
        machine(),
        ["unet", "f" * 12, onnx_hash(BUNDLE, "unet")[:12], "hypersd build"],
    ),
}


@pytest.mark.parametrize(("made", "here", "parts"), TARGET_REASONS.values(), ids=TARGET_REASONS)
def test_a_target_that_cannot_run_here(made: EngineTarget, here: Machine, parts: list[str]) -> None:
    """Refused before it is loaded, where TensorRT's own words would be a code."""
    reason = why_not_target(made, BUNDLE, here)
    assert reason is not None
    assert "\n" not in reason
    assert [part for part in parts if part not in reason] == []


def test_one_of_several_capabilities_is_enough() -> None:
    """A plan for two kinds of GPU runs on either, a portable one on any."""
    either = whole(compute_capabilities=("8.6", "8.9"))
    assert why_not_target(either, BUNDLE, machine()) is None
    assert why_not_target(whole(), BUNDLE, machine(gpu=gpu(compute_capability="12.1"))) is None


def test_memory_is_all_weights_and_one_block_of_activations() -> None:
    """The engines share the activations' block; where TensorRT did not say, nothing is rejected on a guess."""
    large = with_unet({"activation_memory": 7 * GIB})
    for made, needed in ((whole(), 3 * GIB + 2 * GIB), (large, 3 * GIB + 7 * GIB)):
        assert why_not_memory(made, on_gpu(needed), low_memory=False) is None
        assert why_not_memory(made, on_gpu(needed - 1), low_memory=False) is not None
    for made in (target(), with_unet({"weights_memory": None})):
        assert why_not_memory(made, on_gpu(1), low_memory=False) is None


def test_in_low_memory_the_largest_stage_has_to_fit() -> None:
    """A GPU that is too small for all engines at once is named, with the memory that they need one after another."""
    reason = why_not_memory(whole(), on_gpu(3 * GIB), low_memory=False)
    assert reason == (
        "needs 5.4 GB of device memory, MX450 has 3.2 GB: generate smaller images or fewer at a time, "
        "or in low memory (3.2 GB)"
    )
    assert why_not_memory(whole(), on_gpu(3 * GIB), low_memory=True) is None
    reason = why_not_memory(whole(), on_gpu(3 * GIB - 1), low_memory=True)
    assert reason is not None
    assert reason.endswith("generate smaller images or fewer at a time")


@pytest.mark.parametrize(
    ("torch_cuda", "driver", "parts"),
    [
        (None, None, ["no CUDA device", "driver"]),
        ("13.0", None, ["no CUDA device", "driver"]),
        (None, (12, 8), ["CPU build", "12.8", "install"]),
        ("13.0", (12, 8), ["12.8", "13.0", "update the driver"]),
        ("12.8", (12, 4), ["no CUDA device", "CUDA_VISIBLE_DEVICES"]),
        ("12.8", (13, 0), ["no CUDA device", "CUDA_VISIBLE_DEVICES"]),
    ],
)
def test_why_torch_finds_no_gpu(torch_cuda: str | None, driver: tuple[int, int] | None, parts: list[str]) -> None:
    """The four ways to have no GPU are mended in four ways. Within one major version drivers are compatible."""
    reason = module._why_no_gpu(torch_cuda, driver)
    assert "\n" not in reason
    assert [part for part in parts if part not in reason] == []


def test_this_machine_is_looked_at() -> None:
    """On any machine: what is there agrees with what torch and pip say, and a GPU or the reason for none is there."""
    from importlib.metadata import version

    here = this_machine()
    assert here.platforms == {backend: this_platform(backend) for backend in ("tensorrt", "tensorrt-rtx")}
    assert (here.gpu is None) == bool(here.no_gpu) == (not torch.cuda.is_available())
    assert here.versions.get("tensorrt-rtx") == version("tensorrt-rtx")
    assert here.cuda_needed["tensorrt-rtx"] in (12, 13)


def test_a_gpu_that_is_not_there_is_said_with_how_many_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """``cuda:7`` on a machine of one GPU, the GPU being a fake."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (GIB, 2 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (12, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    first = this_machine("cuda").gpu
    assert first == gpu(name="GPU 0", compute_capability="12.0", free_memory=GIB, total_memory=2 * GIB)
    absent = this_machine("cuda:7")
    assert absent.gpu is None
    assert absent.no_gpu == "no CUDA device 7: this machine has 1, counted from 0"
    assert this_machine("cuda:0").gpu == this_machine(torch.device("cuda", 0)).gpu == first
