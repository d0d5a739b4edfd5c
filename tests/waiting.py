"""Waiting for another thread or process, with a limit that only a fault reaches."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

from preloaded import Process

LONG = 300.0  # seconds; a step that takes one on a quiet machine has taken thirty on a busy one


def wait_until(holds: Callable[[], object], process: Process | subprocess.Popen[str] | None = None) -> None:
    """Return when ``holds()`` is true; fail after `LONG` seconds, or as soon as the process ends without it."""
    end = time.monotonic() + LONG
    while not holds():
        if process is not None and process.poll() is not None:
            assert holds(), process.communicate()[0]
            return
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
