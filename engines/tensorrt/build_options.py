"""Options of a build of TensorRT engines, and the target that they describe."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ...errors import DeviceError, RequestError
from ..manifest import Manifest
from ..precision import PRECISIONS
from ..specs import EngineTarget, ImageShapes
from ..vocabulary import OPTIMIZATION_LEVELS, TENSORRT_BACKENDS, TensorRTBackend
from .api import TensorRTApi, pip_line
from .machine import Machine, why_not_backend
from .targets import this_platform


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Options of a build.

    Attributes:
        compute_capabilities: GPUs such as ``"8.9"``, for RTX; none builds for all of them.
        shapes: the part of the bundle's shapes to build for; None for all of it.
        optimization_level: TensorRT's, 0 (quickest build) to 5 (fastest engine); None for its default.
        stripped: leave the weights out of the plans and take them from the ONNX files at every load.
        timing_cache: file of kernel timings that builds on one GPU share (TensorRT only); None for one in the user's
            cache folder.
    """

    compute_capabilities: tuple[str, ...] = ()
    shapes: ImageShapes | None = None
    optimization_level: int | None = None
    stripped: bool = False
    timing_cache: Path | None = None


def choose_backend(backend: str, machine: Machine) -> TensorRTBackend:
    """The backend to build with.

    Raises:
        RequestError: it is not known.
        DeviceError: ``"auto"``, and none is installed.
    """
    if backend in TENSORRT_BACKENDS:
        return backend  # type: ignore[return-value]  # pyright narrows a tuple's members from 3.11 on only
    if backend != "auto":
        raise RequestError(f"backend {backend!r} is not known: expected auto, {' or '.join(TENSORRT_BACKENDS)}")
    if machine.gpu is not None and why_not_backend("tensorrt", machine) is None:
        return "tensorrt"
    if "tensorrt-rtx" in machine.versions:
        return "tensorrt-rtx"
    if "tensorrt" in machine.versions:
        raise DeviceError(f"TensorRT needs a GPU to build ({machine.no_gpu}): {pip_line('tensorrt-rtx')} needs none")
    raise DeviceError(f"no TensorRT is installed: {pip_line('tensorrt-rtx')} (needs no GPU to build)")


def why_chosen(machine: Machine) -> str:
    if machine.gpu is None:
        return f"which needs no GPU to build ({machine.no_gpu})"
    return f"as installed; this machine has a {machine.gpu.name}"


def check_options(api: TensorRTApi, options: BuildOptions, machine: Machine, precision: str) -> None:
    """Reject options that the backend, this machine or a bundle does not support, before the slow work starts.

    Args:
        api: the backend.
        options: those that were asked for.
        machine: this one.
        precision: the bundle's.

    Raises:
        RequestError: an option is out of range, or not for such a bundle.
        DeviceError: a GPU is needed.
    """
    level = options.optimization_level
    if level is not None and level not in OPTIMIZATION_LEVELS:
        least, most = OPTIMIZATION_LEVELS[0], OPTIMIZATION_LEVELS[-1]
        raise RequestError(f"optimization level {level} is out of range: expected {least} to {most}")
    known = api.compute_capabilities
    for capability in options.compute_capabilities:
        if not known:
            raise RequestError(f"{api} builds for this machine's GPU only: leave the compute capability out")
        if capability not in known:
            raise RequestError(f"compute capability {capability!r} is not known to {api}: expected {', '.join(known)}")
    if api.is_rtx and options.timing_cache is not None:
        raise RequestError(f"{api} times no kernels when it builds: leave the timing cache out")
    if options.stripped and api.is_rtx and PRECISIONS[precision].is_compact:
        raise RequestError(f"{api} keeps {precision} weights in its plans: build them without --strip-weights")
    if machine.gpu is None and not api.is_rtx:
        raise DeviceError(f"{api} needs a GPU to build ({machine.no_gpu}): {pip_line('tensorrt-rtx')} needs none")


def make_target(manifest: Manifest, api: TensorRTApi, options: BuildOptions, machine: Machine) -> EngineTarget:
    """The target that these options describe, still without plans (:func:`.targets.target_name` names it)."""
    capabilities = options.compute_capabilities
    if not api.is_rtx and machine.gpu is not None:
        capabilities = (machine.gpu.compute_capability,)
    return EngineTarget(
        backend=api.backend,
        version=api.version,
        compute_capabilities=tuple(sorted(set(capabilities), key=float)),
        platform=this_platform(api.backend),
        precision=manifest.precision,
        shapes=options.shapes or manifest.shapes,
        optimization_level=options.optimization_level,
        stripped=options.stripped,
        plans={},
    )
