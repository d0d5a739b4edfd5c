"""The process that builds one plan: reads a :class:`.job.BuildJob` from stdin, writes events to stdout.

It stops when its stdin is closed, which is also what happens when the process that started it dies, and leaves no
plan then.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import IO

import msgspec

from ...errors import HyperSDError, UserError, one_line
from .build_job import SECONDS_TO_STOP, BuildJob, Built, Event, Failed, Progress

CANCELLED = Failed("cancelled", "cancelled")
SECONDS_BETWEEN_REPORTS = 0.05


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
