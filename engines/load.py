"""From a bundle to engines that run here."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import RequestError
from .bundle import Bundle
from .engine import Engine
from .null import NullEngine

BACKENDS = ("auto", "onnxruntime", "null")


def load_engines(bundle: Bundle, backend: str = "auto", device: str = "auto") -> Mapping[str, Engine]:
    """Make every network of a bundle ready to run.

    Args:
        bundle: the opened bundle.
        backend: ``"onnxruntime"``; ``"auto"`` for the best that this machine has; ``"null"`` computes nothing and
            shows what the loop around the networks costs.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:N"``, or ``"auto"`` for the first CUDA device if there is one.

    Raises:
        RequestError: the backend or the device is not known.
        EngineError: it cannot run here.
    """
    components = bundle.manifest.components
    if backend == "null":
        return {name: NullEngine(name, component) for name, component in components.items()}
    if backend not in BACKENDS:
        raise RequestError(f"backend {backend!r} is not known: expected one of {', '.join(BACKENDS)}")
    from .onnx_runtime import OnnxRuntimeEngine, resolve_device

    target = resolve_device(device)
    return {
        name: OnnxRuntimeEngine(name, bundle.path(component.onnx), component, target)
        for name, component in components.items()
    }
