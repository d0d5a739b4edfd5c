"""OpenVINO, loaded when it is needed: its core, and what it computes in on this processor."""

from __future__ import annotations

import functools
import importlib.util
import re
from typing import TYPE_CHECKING, Any

import torch

from ...errors import DeviceError, RequestError, one_line

if TYPE_CHECKING:
    import openvino as ov

PRECISIONS = {"fp32": "f32", "bf16": "bf16"}  # hypersd's names to OpenVINO's
# Places in OpenVINO's own source, which its messages contain.
PLACES = re.compile(r"(Exception from|Check '.*?' failed at) \S+\s*|Caught exception: |std::exception: ")


def load_library() -> Any:
    """The module ``openvino``, which comes with an extra.

    Raises:
        DeviceError: it is not installed, or cannot be loaded.
    """
    try:
        import openvino
    except ImportError as error:
        hint = "pip install -e '.[openvino]' in hypersd's clone"
        raise DeviceError(f"OpenVINO cannot be imported ({one_line(error)}): {hint}") from error
    return openvino


def is_installed() -> bool:
    """Whether OpenVINO is installed."""
    return importlib.util.find_spec("openvino") is not None


@functools.cache
def core() -> ov.Core:
    """OpenVINO's core, one per process: it holds the plugin and its threads."""
    return load_library().Core()


def openvino_version() -> str:
    """The installed version's year and release, such as ``"2026.4"``."""
    return ".".join(load_library().__version__.split(".")[:2])


def has_native_bf16() -> bool:
    """Whether this processor multiplies in bfloat16; elsewhere OpenVINO emulates it slowly, or computes in float32."""
    return "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def resolve_precision(precision: str | None) -> str:
    """The precision to compute in; None becomes ``"bf16"`` where the processor multiplies in it, else ``"fp32"``.

    Raises:
        RequestError: the precision is not known.
        DeviceError: OpenVINO is missing, or the processor does not multiply in bfloat16.
    """
    if precision is not None and precision not in PRECISIONS:
        raise RequestError(f"precision {precision!r} is not known: expected one of {', '.join(PRECISIONS)}")
    is_native = has_native_bf16()
    if precision == "bf16" and not is_native:
        raise DeviceError("precision 'bf16': this processor does not multiply in bfloat16: expected fp32")
    return precision or ("bf16" if is_native else "fp32")


def check_device(device: str | torch.device) -> None:
    """Reject all devices except the CPU.

    Raises:
        RequestError: it is another.
    """
    if str(device) != "auto" and str(device).partition(":")[0] != "cpu":
        raise RequestError(f"device {str(device)!r}: OpenVINO runs on the CPU here; expected auto or cpu")


def in_short(error: Exception) -> str:
    """OpenVINO's message in one line, without the places in its own source."""
    whole = one_line(error)
    return PLACES.sub("", whole).strip() or whole
