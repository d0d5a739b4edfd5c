"""What a building process is told, and what it tells: one JSON line each."""

from __future__ import annotations

import msgspec

from ..manifest import TensorRTBackend, TensorSpec

SECONDS_TO_STOP = 5.0  # a build looks up between two steps, and some steps take minutes


class BuildJob(msgspec.Struct, frozen=True, kw_only=True):
    """One plan to build.

    Attributes:
        backend: the flavour of TensorRT.
        component: the network's name, for messages.
        onnx: the ONNX file.
        plan: the file to write.
        inputs: names, types and shapes that the plan has to have, as ``outputs``.
        compute_capabilities: GPUs to build for; none for a portable plan (RTX) or this machine's GPU (TensorRT).
        optimization_level: TensorRT's, 0 to 5; None for its default.
        stripped: leave the weights out of the plan.
        refittable: let them be exchanged.
        timing_cache: file of kernel timings, read and added to.
    """

    backend: TensorRTBackend
    component: str
    onnx: str
    plan: str
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    compute_capabilities: tuple[str, ...] = ()
    optimization_level: int | None = None
    stripped: bool = False
    refittable: bool = False
    timing_cache: str | None = None


class Progress(msgspec.Struct, frozen=True, tag=True):
    """The build is done to this part, 0 to 1, and busy with ``detail``."""

    fraction: float
    detail: str


class Built(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The plan is written; see :class:`..manifest.Plan` for the fields. ``notes`` are for the user."""

    host_memory: int
    weights_memory: int | None
    activation_memory: int | None
    decomposed_attention: tuple[str, ...]
    notes: tuple[str, ...] = ()


class Failed(msgspec.Struct, frozen=True, tag=True):
    """No plan; ``message`` is one line for the user. ``kind`` is ``"user"`` where the user can mend it."""

    message: str
    kind: str


Event = Progress | Built | Failed
