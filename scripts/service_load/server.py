"""A service of one's own, for the time of a measurement."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

START_SECONDS = 120.0
STOP_SECONDS = 60.0


@contextlib.contextmanager
def serving(bundle: Path, options: Sequence[str] = ()) -> Iterator[str]:
    """``hypersd serve`` of a bundle on a free port of the loopback: its URL. It is ended with SIGTERM.

    Raises:
        RuntimeError: it did not start, or did not end as it should.
    """
    command = [sys.executable, "-m", "hypersd.cli", "serve", str(bundle), "--port", "0", *options]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, text=True)
        try:
            yield _address(process, log)
        finally:
            code = _end(process)
        if code != 0:
            raise RuntimeError(f"the service ended with {code}: {_said(log)}")


def _address(process: subprocess.Popen[str], log: IO[str]) -> str:
    """The address that the service prints."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        if found := re.search(r" on (http://\S+?)/ ", _said(log)):
            return found[1]
        time.sleep(0.1)
    raise RuntimeError(f"the service did not start: {_said(log)}")


def _said(log: IO[str]) -> str:
    log.seek(0)
    return log.read()


def _end(process: subprocess.Popen[str]) -> int:
    process.send_signal(signal.SIGTERM)
    try:
        return process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
