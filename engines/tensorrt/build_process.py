"""A build in a process of its own.

So its memory is the system's again when it ends, a crash of TensorRT is an error and not the end of the caller, the
environment variable that tells Polygraphy which flavour to drive stays there, and it can be stopped.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import msgspec

from ...errors import EngineError, UserError
from .build_job import SECONDS_TO_STOP, BuildJob, Built, Event, Failed, Progress

SHOWN_OUTPUT = 300  # characters of a crashed process's last words
POLYGRAPHY_FLAVOUR = "POLYGRAPHY_USE_TENSORRT_RTX"


# Not -m, which would import from the folder that the user happens to be in (-P forbids it from Python 3.11 on).
WORKER = f"import sys; sys.path[:] = filter(None, sys.path); from {__package__}.build_worker import main; main()"


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
            env={**os.environ, POLYGRAPHY_FLAVOUR: "1" if job.backend == "tensorrt-rtx" else "0"},
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
