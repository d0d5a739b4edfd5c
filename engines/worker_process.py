"""Worker processes that exchange lines of JSON with their parent: the parent's end and the worker's.

Imports the standard library alone: another interpreter, without this package's dependencies, may be the worker.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

LOG_TAIL = 4000  # bytes


class WorkerDiedError(Exception):
    """A worker ended without an answer; the message says how it ended, and the last line that it printed."""

    def __init__(self, code: int, last: str) -> None:
        self.was_killed = code == -getattr(signal, "SIGKILL", 9)
        ended = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        memory = ", perhaps out of memory" if self.was_killed else ""
        super().__init__(f"{ended}{memory}{f': {last}' if last else ''}")


class WorkerProcess:
    """A process whose program opens a :class:`WorkerChannel`. It ends when it is closed or this process dies.

    Args:
        command: the program and its arguments.
        log: file for all that the program and its libraries print; None for a temporary one.
        env: its environment; None for this process's.

    Raises:
        OSError: the program cannot be run.
    """

    def __init__(self, command: Sequence[str], log: Path | None = None, env: Mapping[str, str] | None = None) -> None:
        self._log = tempfile.TemporaryFile() if log is None else log.open("w+b")  # noqa: SIM115 # until close()
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=env,
                start_new_session=True,  # Ctrl-C reaches only the parent, which then ends the group
            )
        except BaseException:
            self._log.close()
            raise
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout

    def send(self, message: bytes) -> None:
        """Send one line. A worker that died is reported by :meth:`receive`."""
        with contextlib.suppress(BrokenPipeError):
            self._input.write(message + b"\n")
            self._input.flush()

    def receive(self) -> bytes:
        """Wait for the next line.

        Raises:
            WorkerDiedError: there is none, because the process ended.
        """
        line = self._output.readline()
        if not line.endswith(b"\n"):
            raise WorkerDiedError(self._process.wait(), self._last_line())
        return line

    def close(self, patience: float) -> None:
        """Ask the worker to end by closing its input; after ``patience`` seconds kill it. Its children are killed."""
        with contextlib.suppress(OSError):
            self._input.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL) if hasattr(os, "killpg") else self._process.kill()
        self._process.wait()
        self._output.close()
        self._log.close()

    def _last_line(self) -> str:
        self._log.seek(0)
        lines = self._log.read()[-LOG_TAIL:].decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


class WorkerChannel:
    """The worker's end.

    Lines come by standard input and go by standard output, which are moved away: libraries' output goes to stderr, and
    children do not read the lines. Ctrl-C is left to the parent.

    Args:
        on_close: called in a thread when the parent closes the input or dies; ends the process.
    """

    def __init__(self, on_close: Callable[[], object]) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._input, self._output = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        os.dup2(2, 1)
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(on_close,), daemon=True).start()

    def receive(self) -> bytes:
        """Wait for the next line."""
        return self._lines.get()

    def send(self, message: bytes) -> None:
        """Send one line; nobody may be listening any more."""
        with contextlib.suppress(BrokenPipeError):
            self._output.write(message + b"\n")
            self._output.flush()

    def _read(self, on_close: Callable[[], object]) -> None:
        for line in self._input:
            self._lines.put(line)
        on_close()
