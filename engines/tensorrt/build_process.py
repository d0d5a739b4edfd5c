"""The process that builds one TensorRT plan: started by :func:`run_build`, it runs :func:`main`.

Its memory is returned to the system when it ends, a crash of TensorRT is an error and not the end of the caller, the
environment variable that selects Polygraphy's TensorRT is set for it alone, and a build can be stopped: the process
ends when its input is closed or its parent dies, and leaves no plan then. It receives a :class:`BuildJob` and sends
events, each as a line of JSON (:mod:`..worker_process`).
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from ...errors import EngineError, HyperSDError, UserError, one_line
from ..specs import TensorSpec
from ..vocabulary import TensorRTBackend
from ..worker_process import WorkerChannel, WorkerDiedError, WorkerProcess

SECONDS_TO_STOP = 5.0  # a build checks for a stop between two steps, and some steps take minutes
SECONDS_BETWEEN_REPORTS = 0.05
POLYGRAPHY_SWITCH = "POLYGRAPHY_USE_TENSORRT_RTX"

# Not -m, which would import from the folder that the user happens to be in (-P forbids it from Python 3.11 on).
WORKER = f"import sys; sys.path[:] = filter(None, sys.path); from {__name__} import main; main()"


class BuildJob(msgspec.Struct, frozen=True, kw_only=True):
    """One plan to build.

    Attributes:
        backend: ``"tensorrt"`` or ``"tensorrt-rtx"``.
        component: its name, for messages.
        onnx: the ONNX file.
        plan: the file to write.
        inputs: names, types and shapes that the plan has to have, as ``outputs``.
        compute_capabilities: GPUs to build for; none for a portable plan (RTX) or this machine's GPU (TensorRT).
        optimization_level: TensorRT's, 0 to 5; None for its default.
        stripped: leave the weights out of the plan.
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
    timing_cache: str | None = None


class Progress(msgspec.Struct, frozen=True, tag=True):
    """The build is done to this part, 0 to 1, and busy with ``detail``."""

    fraction: float
    detail: str


class Built(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The plan is written; see :class:`..specs.Plan` for the fields. ``notes`` are for the user."""

    host_memory: int
    weights_memory: int | None
    activation_memory: int | None
    decomposed_attention: tuple[str, ...]
    notes: tuple[str, ...] = ()


class Failed(msgspec.Struct, frozen=True, tag=True):
    """No plan; ``message`` is one line for the user. ``kind`` is ``"user"`` if the user can fix it."""

    message: str
    kind: str


Event = Progress | Built | Failed

CANCELLED = Failed("cancelled", "cancelled")


def run_build(job: BuildJob, update: Callable[[float, str], None]) -> Built:
    """Build a plan in a new process. Whatever ends this call early, Ctrl-C included, ends that process too.

    Args:
        job: the plan's description.
        update: called with the part that is done, 0 to 1, and the name of the current phase.

    Raises:
        EngineError: the build failed, or its process died.
        UserError: it failed for a reason that the user can fix.
    """
    environment = {**os.environ, POLYGRAPHY_SWITCH: "1" if job.backend == "tensorrt-rtx" else "0"}
    worker = WorkerProcess([sys.executable, "-c", WORKER], env=environment)
    event: Event | None = None
    try:
        worker.send(msgspec.json.encode(job))
        while isinstance(event := msgspec.json.decode(worker.receive(), type=Event), Progress):
            update(event.fraction, event.detail)
    except WorkerDiedError as error:
        hint = "; close other programs, or build on a larger machine" if error.was_killed else ""
        message = f"{job.component}: the process that built the engine died: it {error}{hint}"
        raise EngineError(message) from error
    finally:
        worker.close(SECONDS_TO_STOP)
        if not isinstance(event, Built):
            Path(job.plan).unlink(missing_ok=True)
    if isinstance(event, Built):
        return event
    assert isinstance(event, Failed)  # one of the two ends the loop
    raise (UserError if event.kind == "user" else EngineError)(event.message)


def main() -> None:
    """Build one plan, report progress and the result."""
    stop = threading.Event()

    def give_up() -> None:
        stop.set()
        time.sleep(SECONDS_TO_STOP)
        Path(job.plan).unlink(missing_ok=True)
        os._exit(1)

    channel = WorkerChannel(give_up)
    job = msgspec.json.decode(channel.receive(), type=BuildJob)
    channel.send(msgspec.json.encode(_build(job, channel, stop)))
    os._exit(0)  # gigabytes need not be freed one by one


def _build(job: BuildJob, channel: WorkerChannel, stop: threading.Event) -> Event:
    from .api import pip_line
    from .plan_builder import BuildCancelledError, build_plan

    reported = 0.0

    def report(fraction: float, detail: str) -> bool:
        nonlocal reported
        if (now := time.monotonic()) - reported >= SECONDS_BETWEEN_REPORTS or fraction == 1.0:
            reported = now
            channel.send(msgspec.json.encode(Progress(fraction, detail)))
        return not stop.is_set()

    try:
        return build_plan(job, report)
    except BuildCancelledError:
        return CANCELLED
    except HyperSDError as error:
        return Failed(str(error), "user" if isinstance(error, UserError) else "engine")
    except ModuleNotFoundError as error:
        return Failed(f"{error.name} is not installed: {pip_line(job.backend)}", "user")
    except OSError as error:
        return Failed(f"{error.filename or job.plan} cannot be written: {error.strerror or error}", "user")
    except Exception as error:
        return Failed(f"{type(error).__name__}: {one_line(error)} (a bug?)", "engine")


if __name__ == "__main__":
    main()
