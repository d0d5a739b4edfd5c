"""The choice of a backend for a bundle on this machine, and the loading of its engines."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from ..errors import BundleError, DeviceError, RequestError
from .bundle import Bundle
from .cuda.streams import claim_stream
from .engine import Engine
from .image_shapes import narrowed
from .late_engine import LATE, LateEngine
from .manifest import Manifest
from .openvino.library import check_device, is_installed, resolve_precision
from .precision import PRECISIONS
from .progress import Progress, Silent
from .specs import Component, EngineTarget
from .staged_engines import StagedEngines
from .tensorrt.api import TITLES, load_api
from .tensorrt.machine import Machine, this_machine, why_not_memory, why_not_target
from .tensorrt.targets import target_name
from .vocabulary import BACKENDS, ONNX_BACKENDS, TENSORRT_BACKENDS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """The backend, and for TensorRT the target, that runs a bundle.

    Attributes:
        backend: ``"onnxruntime"``, ``"openvino"``, ``"tensorrt"`` or ``"tensorrt-rtx"``.
        target: the name of the TensorRT target; None for the other backends.
        manifest: the bundle's, narrowed to the shapes of the target.
        passed_over: the reason for each target that cannot run here.
        precision: the one that OpenVINO computes in, ``"fp32"`` or ``"bf16"``; None for the other backends.
    """

    backend: str
    target: str | None
    manifest: Manifest
    passed_over: Mapping[str, str]
    precision: str | None = None


def choose(
    bundle: Bundle,
    backend: str = "auto",
    device: str = "auto",
    target: str | None = None,
    precision: str | None = None,
    low_memory: bool = False,
) -> Choice:
    """Choose a backend for a bundle.

    Args:
        bundle: the opened bundle.
        backend: one of :data:`BACKENDS`; ``"auto"`` takes TensorRT plans that can run here, else, for a bundle in half
            precision on a CPU, OpenVINO if it is installed, else ONNX Runtime.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:N"``, or ``"auto"`` for the first CUDA device if there is one.
        target: a target of the bundle by its name, or by a part of the name that no other target has.
        precision: the one for OpenVINO, ``"fp32"`` or ``"bf16"``; by default bf16 where the processor has it.
        low_memory: whether one stage's engines will be loaded at a time (:func:`load_choice`).

    Raises:
        RequestError: the backend, the target or the precision is not known, or they do not go together.
        DeviceError: the named backend or target cannot run here; the message says why.
        BundleError: the bundle has no plans for the backend.
    """
    if backend not in BACKENDS:
        raise RequestError(f"backend {backend!r} is not known: expected one of {', '.join(BACKENDS)}")
    if target is not None and backend in ONNX_BACKENDS:
        raise RequestError(f"target {target!r}: only TensorRT has targets, not {backend}: leave one of the two out")
    if backend == "openvino":
        check_device(device)
        return _onnx_choice(bundle, backend, precision)
    if backend != "auto":
        _reject_precision(precision, backend)
    targets, is_cuda = _asked_for(bundle, backend, target), _is_cuda(device)
    if backend == "onnxruntime" or (backend == "auto" and target is None and not (targets and is_cuda)):
        return _onnx_choice(bundle, _onnx_backend(bundle, backend, device), precision)
    if not is_cuda:
        raise RequestError(
            f"device {str(device)!r}: {TITLES.get(backend, 'TensorRT')} runs on CUDA devices; "
            "expected auto, cuda or cuda:N"
        )
    machine = this_machine(device)
    reasons = {name: why_not(bundle, name, machine, low_memory) for name in targets}
    runnable = [name for name, reason in reasons.items() if reason is None]
    passed_over = {name: reason for name, reason in reasons.items() if reason is not None}
    if runnable:
        _reject_precision(precision, "tensorrt")
        best = min(runnable, key=lambda name: _rank(bundle.manifest, targets[name]))
        manifest = narrowed(bundle.manifest, targets[best].shapes)
        return Choice(backend=targets[best].backend, target=best, manifest=manifest, passed_over=passed_over)
    if backend == "auto" and target is None:
        return _onnx_choice(bundle, _onnx_backend(bundle, backend, device), precision, passed_over)
    why = "; ".join(f"{name}: {reason}" for name, reason in passed_over.items())
    raise DeviceError(f"{bundle.root} cannot run here: {why}")


def _onnx_backend(bundle: Bundle, backend: str, device: str) -> str:
    """The backend that runs a bundle's ONNX files where none, or ONNX Runtime, was named.

    Half precision, asked for at the export, runs on a CPU, too: OpenVINO computes in bfloat16 from the float16 weights.
    ONNX Runtime makes copies of them in float32 and takes several times as long.
    """
    is_half = PRECISIONS[bundle.manifest.precision].compute == "float16"
    return "openvino" if backend == "auto" and is_half and is_installed() and _runs_on_cpu(device) else "onnxruntime"


def _runs_on_cpu(device: str) -> bool:
    """Whether ONNX Runtime would run on the CPU for this device."""
    if str(device) != "auto":
        return torch.device(device).type == "cpu"
    if not torch.cuda.is_available():
        return True
    from .onnx_runtime import resolve_device

    return resolve_device(device).type == "cpu"


def _onnx_choice(
    bundle: Bundle, backend: str, precision: str | None, passed_over: Mapping[str, str] = MappingProxyType({})
) -> Choice:
    if backend == "openvino":
        precision = resolve_precision(precision)
    else:
        _reject_precision(precision, backend)
    return Choice(
        backend=backend, target=None, manifest=bundle.manifest, passed_over=dict(passed_over), precision=precision
    )


def _reject_precision(precision: str | None, backend: str) -> None:
    if precision is not None:
        raise RequestError(f"precision {precision!r}: only OpenVINO takes one, not {backend}: leave it out")


def _asked_for(bundle: Bundle, backend: str, target: str | None) -> dict[str, EngineTarget]:
    """The bundle's targets that match the backend and the name."""
    targets = bundle.manifest.engines
    if backend in TENSORRT_BACKENDS:
        load_api(backend)  # first of all report a backend that is not installed
        targets = {name: t for name, t in targets.items() if t.backend == backend}
        if not targets:
            raise BundleError(
                f"{bundle.root} has no {TITLES[backend]} engines: hypersd build {bundle.root} --backend {backend}"
            )
    if target is None:
        return targets
    found = {name: t for name, t in targets.items() if target in name}
    if len(found) != 1:
        raise RequestError(
            f"target {target!r} is {'none' if not found else 'more than one'} of: {', '.join(targets) or 'none'}"
        )
    return found


def _is_cuda(device: str | torch.device) -> bool:
    """Whether a device is or may be a CUDA device, here or elsewhere."""
    try:
        return str(device) == "auto" or torch.device(device).type == "cuda"
    except (RuntimeError, TypeError) as error:
        raise RequestError(f"device {device!r} is not known: expected auto, cpu, cuda or cuda:N") from error


def why_not(bundle: Bundle, name: str, machine: Machine, low_memory: bool = False) -> str | None:
    """All reasons why a target of a bundle cannot run here; None if it can."""
    target = bundle.manifest.engines[name]
    broken = [plan.file for plan in target.plans.values() if not bundle.is_whole(plan)]
    reasons = [why_not_target(target, bundle.manifest, machine)]
    fits = reasons[0] is None
    if fits:
        reasons.append(why_not_memory(target, machine, low_memory))
    if name != target_name(target, bundle.manifest):
        reasons.append("its name does not match its entry in the manifest, which was changed by hand")
    if fits:
        whole = {component: plan.file for component, plan in target.plans.items() if plan.file not in broken}
        reasons.append(_why_not_plans(bundle, target.backend, whole, machine))
    if broken:
        reasons.append(f"{broken[0]} is missing or shortened: build it again with `hypersd build`")
    return "; ".join(reason for reason in reasons if reason is not None) or None


def _why_not_plans(bundle: Bundle, backend: str, plans: Mapping[str, str], machine: Machine) -> str | None:
    """TensorRT's own reason against plans that seem to fit, because it knows the limits of each GPU."""
    assert machine.gpu is not None  # without one no target fits
    for name, file in plans.items():
        if reason := load_api(backend).why_invalid(bundle.path(file)):
            return f"{name}: TensorRT says {reason} of {machine.gpu.name}"
    return None


def _rank(manifest: Manifest, target: EngineTarget) -> tuple[bool, ...]:
    """Smaller is better: the bundle's usual size, TensorRT, fixed shapes, built for this GPU, weights in the plans."""
    extents = target.shapes.extents
    return (
        [extent.opt for extent in extents] != [extent.opt for extent in manifest.shapes.extents],
        target.backend != "tensorrt",
        any(extent.min < extent.max for extent in extents),
        not target.compute_capabilities,
        target.stripped,
    )


def load_choice(
    bundle: Bundle,
    choice: Choice,
    device: str = "auto",
    progress: Progress | None = None,
    one_graph: str | None = None,
    low_memory: bool = False,
) -> Mapping[str, Engine]:
    """Make every component of a bundle, or its one-graph of that name, ready to run.

    Args:
        bundle: the opened bundle.
        choice: made by :func:`choose` or :func:`choose_one_graph`.
        device: as for :func:`choose`.
        progress: receives stages that take long: TensorRT-RTX compiles its kernels at the first load.
        one_graph: the name of a one-graph, which is loaded instead of the components.
        low_memory: load nothing yet: the result loads one stage's engines at a time, without ``progress``.

    Raises:
        BundleError: the bundle's engines are damaged.
        EngineError: an engine cannot be loaded here.
    """
    components = choice.manifest.components
    if one_graph is not None:
        components = {one_graph: choice.manifest.one_graphs[one_graph].network}
    if choice.target is not None:
        from .tensorrt.target_loader import late_target, load_target

        cuda = torch.device("cuda", 0 if device == "auto" else torch.device(device).index or 0)
        if low_memory:
            return StagedEngines(late_target(bundle, choice.target, components, cuda))
        return load_target(bundle, choice.target, components, cuda, progress or Silent())
    load, resolved = _onnx_loader(choice, device)
    loads = {
        name: functools.partial(load, name, bundle.path(component.onnx), component)
        for name, component in components.items()
    }
    if low_memory:
        return StagedEngines({name: LateEngine(components[name], make, resolved) for name, make in loads.items()})
    late = LATE if resolved.type == "cpu" else ()
    engines: dict[str, Engine] = {}
    # The largest comes first: a load takes up to twice what it leaves, and then nothing lies beside it.
    for name in sorted(components, key=lambda name: bundle.manifest.component_bytes(components[name]), reverse=True):
        engines[name] = LateEngine(components[name], loads[name]) if name in late else loads[name]()
    return {name: engines[name] for name in components}


def _onnx_loader(choice: Choice, device: str) -> tuple[Callable[[str, Path, Component], Engine], torch.device]:
    """The function that loads a component's ONNX file, and the device that its engines run on."""
    if choice.precision is not None:
        from .openvino.openvino_engine import OpenVinoEngine

        return functools.partial(OpenVinoEngine, precision=choice.precision), torch.device("cpu")
    from .onnx_runtime import OnnxRuntimeEngine, resolve_device

    resolved = resolve_device(device)
    stream = claim_stream(resolved) if resolved.type == "cuda" else None  # torch has few: one for all networks
    return functools.partial(OnnxRuntimeEngine, device=resolved, stream=stream), resolved


def choose_one_graph(bundle: Bundle, name: str, backend: str = "auto", device: str = "auto") -> Choice:
    """Choose a backend for the graph of a whole image: ONNX Runtime or OpenVINO.

    OpenVINO computes in float32: bfloat16 would be too coarse for the sampler's arithmetic.

    Raises:
        RequestError: the bundle has no one-graph of that name, or the backend does not run it.
        DeviceError: the device cannot be used here.
    """
    if name not in bundle.manifest.one_graphs:
        has = ", ".join(bundle.manifest.one_graphs) or "none"
        raise RequestError(
            f"{bundle.root} has no one-graph {name!r}, it has {has}; add one with `hypersd export --one-graph`"
        )
    if backend not in ("auto", *ONNX_BACKENDS):
        raise RequestError(f"backend {backend!r} runs no one-graph: expected auto, onnxruntime or openvino")
    backend = "onnxruntime" if backend == "auto" else backend
    return choose(bundle, backend, device, precision="fp32" if backend == "openvino" else None)
