"""This machine's GPU, driver and TensorRT, and the reasons against targets that it cannot run."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.metadata
import sys
from collections.abc import Mapping

from ..manifest import Manifest
from ..memory_needs import need_of_all, need_of_largest_stage, target_needs
from ..specs import EngineTarget
from ..vocabulary import TENSORRT_BACKENDS
from .api import TITLES, installed_version, pip_line
from .targets import onnx_hash, this_platform

PORTABLE_FROM = 8.0  # compute capability; older GPUs have to be named (TensorRT-RTX: "CPU-Only AOT")
_CUDA_WHEELS = {  # distributions by the CUDA that a backend's libraries were built for
    "tensorrt": {"tensorrt-cu13": 13, "tensorrt-cu12": 12},
    "tensorrt-rtx": {"tensorrt-rtx-cu13": 13, "tensorrt-rtx-cu12": 12},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """A CUDA device. Memory in bytes."""

    index: int
    name: str
    compute_capability: str
    free_memory: int
    total_memory: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """Facts that decide which plans run.

    Attributes:
        platforms: the platform tag of each backend's plans, such as ``linux-x86_64``.
        gpu: the CUDA device; None if there is none to use.
        no_gpu: why there is none.
        driver_cuda: the newest CUDA that the driver supports, as (13, 0); None without a driver.
        versions: of the installed backends.
        cuda_needed: the CUDA that their libraries were built for, where that is known.
    """

    platforms: Mapping[str, str]
    gpu: Gpu | None
    no_gpu: str
    driver_cuda: tuple[int, int] | None
    versions: Mapping[str, str]
    cuda_needed: Mapping[str, int]


def this_machine(device: str = "auto") -> Machine:
    """Inspect this machine; ``device`` is a CUDA device, by default the first."""
    import torch

    gpu, driver = None, driver_cuda_version()
    no_gpu = "" if torch.cuda.is_available() else _why_no_gpu(torch.version.cuda, driver)
    index = torch.device(device).index or 0 if device != "auto" else 0
    if not no_gpu and index >= (count := torch.cuda.device_count()):
        no_gpu = f"no CUDA device {index}: this machine has {count}, counted from 0"
    if not no_gpu:
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        gpu = Gpu(
            index=index,
            name=torch.cuda.get_device_name(index),
            compute_capability=f"{major}.{minor}",
            free_memory=free,
            total_memory=total,
        )
    return Machine(
        platforms={backend: this_platform(backend) for backend in TENSORRT_BACKENDS},
        gpu=gpu,
        no_gpu=no_gpu,
        driver_cuda=driver,
        versions={b: v for b in TENSORRT_BACKENDS if (v := installed_version(b)) is not None},
        cuda_needed={b: cuda for b in TENSORRT_BACKENDS if (cuda := _cuda_of_wheel(b)) is not None},
    )


def driver_cuda_version() -> tuple[int, int] | None:
    """The newest CUDA that the installed NVIDIA driver supports; None without a driver."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        version = ctypes.c_int()
        if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return version.value // 1000, version.value % 1000 // 10


def _why_no_gpu(torch_cuda: str | None, driver: tuple[int, int] | None) -> str:
    if driver is None:
        return "no CUDA device: there is no NVIDIA driver"
    has = f"{driver[0]}.{driver[1]}"
    if torch_cuda is None:
        return f"the installed torch is a CPU build: install one for CUDA {has} or older"
    if tuple(map(int, torch_cuda.split(".")[:1])) > driver[:1]:
        return f"the NVIDIA driver supports CUDA {has}, torch was built for {torch_cuda}: update the driver"
    return "no CUDA device: torch finds none (CUDA_VISIBLE_DEVICES may hide it)"


def _cuda_of_wheel(backend: str) -> int | None:
    for distribution, cuda in _CUDA_WHEELS[backend].items():
        try:
            importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        return cuda
    return None


def why_not_backend(backend: str, machine: Machine) -> str | None:
    """The reason why a backend runs nothing here; None if it does."""
    title = TITLES[backend]
    if backend not in machine.versions:
        return f"{title} is not installed: {pip_line(backend)}"
    if machine.gpu is None:
        return machine.no_gpu
    needed, driver = machine.cuda_needed.get(backend), machine.driver_cuda
    if needed is not None and driver is not None and driver[0] < needed:
        return (
            f"{title} needs a driver for CUDA {needed}, the installed one supports {driver[0]}.{driver[1]}: update it"
        )
    return None


def why_not_target(target: EngineTarget, manifest: Manifest, machine: Machine) -> str | None:
    """The reason why a target's plans cannot run here; None if there is none."""
    if reason := why_not_backend(target.backend, machine):
        return reason
    version = machine.versions[target.backend]
    assert machine.gpu is not None  # a backend that can run has one
    build = f"hypersd build BUNDLE --backend {target.backend}"
    if target.version != version:
        return f"built with {TITLES[target.backend]} {target.version}, installed is {version}: {build}"
    if target.platform != machine.platforms[target.backend]:
        return f"built for {target.platform}, this is {machine.platforms[target.backend]}: {build}"
    if reason := why_not_gpu(target, machine):
        named = f" --compute-capability {machine.gpu.compute_capability}" if target.backend == "tensorrt-rtx" else ""
        return f"{reason}: {build}{named}"
    if missing := sorted(manifest.components.keys() - target.plans.keys()):
        return f"has no plan for {', '.join(missing)}: {build}"
    for name, plan in target.plans.items():
        if plan.onnx != (onnx := onnx_hash(manifest, name)):
            return f"{name} was built from ONNX {plan.onnx[:12]}…, the bundle has {onnx[:12]}…: {build}"
    return None


def why_not_memory(target: EngineTarget, machine: Machine, low_memory: bool) -> str | None:
    """The reason why a target's engines do not fit into the GPU's memory; None if they do, or if it is not known.

    Args:
        target: the engines.
        machine: with a GPU.
        low_memory: whether one stage's engines are loaded at a time.
    """
    needs = target_needs(target)
    if not needs:
        return None
    assert machine.gpu is not None
    memory, in_stages = machine.gpu.total_memory, need_of_largest_stage(needs)
    needed = in_stages if low_memory else need_of_all(needs)
    if needed <= memory:
        return None
    remedy = "generate smaller images or fewer at a time"
    if in_stages <= memory:
        remedy += f", or in low memory ({in_stages / 1e9:.1f} GB)"
    return f"needs {needed / 1e9:.1f} GB of device memory, {machine.gpu.name} has {memory / 1e9:.1f} GB: {remedy}"


def why_not_gpu(target: EngineTarget, machine: Machine) -> str | None:
    """The reason why a target was not built for this machine's GPU; None if it was."""
    if reason := why_not_backend(target.backend, machine):
        return reason
    assert machine.gpu is not None  # a backend that can run has one
    has = f"{machine.gpu.name} has {machine.gpu.compute_capability}"
    if target.compute_capabilities and machine.gpu.compute_capability not in target.compute_capabilities:
        return f"built for compute capability {', '.join(target.compute_capabilities)}, {has}"
    if not target.compute_capabilities and float(machine.gpu.compute_capability) < PORTABLE_FROM:
        return f"portable engines run on compute capability {PORTABLE_FROM} or newer, {has}"
    return None
