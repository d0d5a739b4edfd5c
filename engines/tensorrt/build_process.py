"""The process that builds one TensorRT plan: started by :func:`run_build`, it runs :func:`main`.

Its memory is returned to the system when it ends, a crash of TensorRT is an error and not the end of the caller, the
environment variable that selects Polygraphy's TensorRT is set for it alone, and it can be stopped: it ends when its
stdin is closed, which is also what happens when its parent dies, and leaves no plan then. A :class:`BuildJob` goes to
its stdin and events come from its stdout, each a line of JSON.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import msgspec

from ...errors import EngineError, HyperSDError, UserError, one_line
from ..manifest import TensorRTBackend, TensorSpec

SECONDS_TO_STOP = 5.0  # a build checks for a stop between two steps, and some steps take minutes
SECONDS_BETWEEN_REPORTS = 0.05
SHOWN_OUTPUT = 300  # characters of a crashed process's output
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

CANCELLED = Failed("cancelled", "cancelled")


def run_build(job: BuildJob, update: Callable[[float, str], None]) -> Built:
    """Build a plan in a new process. Whatever ends this call early, Ctrl-C included, ends that process too.

    Args:
        job: what to build.
        update: told the part that is done, 0 to 1, and what the build is busy with.

    Raises:
        EngineError: the build failed, or its process died.
        UserError: it failed for a reason that the user can mend.
    """
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            env={**os.environ, POLYGRAPHY_SWITCH: "1" if job.backend == "tensorrt-rtx" else "0"},
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            event = _listen(process.stdin, process.stdout, job, update)
            process.wait()
        except BaseException:
            _stop(process)
            Path(job.plan).unlink(missing_ok=True)
            raise
        if isinstance(event, Built):
            return event
        Path(job.plan).unlink(missing_ok=True)
        if event is None:
            raise EngineError(_last_words(job, process.returncode, output))
        raise (UserError if event.kind == "user" else EngineError)(event.message)


def _listen(
    stdin: IO[bytes], stdout: IO[bytes], job: BuildJob, update: Callable[[float, str], None]
) -> Built | Failed | None:
    """Hand the job over and wait for how it ends; None if the process ends without a word."""
    try:
        stdin.write(msgspec.json.encode(job) + b"\n")
        stdin.flush()
    except BrokenPipeError:
        return None
    for line in stdout:
        event: Event = msgspec.json.decode(line, type=Event)
        if not isinstance(event, Progress):
            return event
        update(event.fraction, event.detail)
    return None


def _stop(process: subprocess.Popen) -> None:
    """Ask the build to stop, and kill it if it is too deep in a kernel to listen."""
    assert process.stdin is not None
    try:
        process.stdin.close()
        process.wait(SECONDS_TO_STOP)
    except (subprocess.TimeoutExpired, OSError):
        process.kill()
        process.wait()


def _last_words(job: BuildJob, returncode: int, output: IO[bytes]) -> str:
    output.seek(0)
    text = " ".join(output.read().decode(errors="replace").split())
    if returncode == -getattr(signal, "SIGKILL", 9):
        why = "it was killed, most likely for want of memory: close what else is running, or build on a larger machine"
    else:
        shown = text if len(text) <= SHOWN_OUTPUT else f"…{text[-SHOWN_OUTPUT:]}"
        why = f"it ended with exit code {returncode}: {shown or 'it said nothing'}"
    return f"{job.component}: the process that built the engine died: {why}"


def main() -> None:
    """Build, and tell how it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which closes stdin
    events = _take_stdout()
    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=BuildJob)
    stop = threading.Event()
    threading.Thread(target=_watch, args=(sys.stdin.buffer, stop, Path(job.plan)), daemon=True).start()
    _write(events, _build(job, events, stop))
    events.flush()
    os._exit(0)  # gigabytes need not be freed one by one


def _take_stdout() -> IO[bytes]:
    """The real stdout for the events alone: what libraries print goes to stderr."""
    events = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return events


def _watch(stdin: IO[bytes], stop: threading.Event, plan: Path) -> None:
    stdin.read()
    stop.set()
    time.sleep(SECONDS_TO_STOP)
    plan.unlink(missing_ok=True)
    os._exit(1)


def _build(job: BuildJob, events: IO[bytes], stop: threading.Event) -> Event:
    from .api import pip_line
    from .plan_builder import BuildCancelledError, build_plan

    reported = 0.0

    def report(fraction: float, detail: str) -> bool:
        nonlocal reported
        if (now := time.monotonic()) - reported >= SECONDS_BETWEEN_REPORTS or fraction == 1.0:
            reported = now
            _write(events, Progress(fraction, detail))
        return not stop.is_set()

    try:
        built: Built = build_plan(job, report)
        return built
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


def _write(events: IO[bytes], event: Event) -> None:
    try:
        events.write(msgspec.json.encode(event) + b"\n")
        events.flush()
    except BrokenPipeError:  # nobody listens any more; stdin says so too
        pass


if __name__ == "__main__":
    main()
