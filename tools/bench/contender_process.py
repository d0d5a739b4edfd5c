"""A contender's process, seen from the bench."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...engines.worker_process import WorkerDiedError, WorkerProcess
from ...errors import HyperSDError, RequestError, one_line

PACKAGE = Path(__file__).resolve().parents[2]
PATIENCE = 5.0  # seconds that a process has to end by itself
START = """import sys

from hypersd.tools.bench.contender_worker import main

if __name__ == "__main__":
    main(*sys.argv[1:])
"""


class ContenderError(HyperSDError):
    """A contender failed; the message says why in one line."""


def write_start(folder: Path) -> Path:
    """Make a folder with a program for any interpreter, beside a link to this package; return the program."""
    folder.mkdir()
    (folder / "hypersd").symlink_to(PACKAGE, target_is_directory=True)
    program = folder / "start.py"
    program.write_text(START, encoding="utf-8")
    return program


def check_python(name: str, python: str) -> None:
    """Check that an interpreter runs and is new enough for this package.

    Raises:
        RequestError: it does not run or is too old.
    """
    program = "import sys; print(sys.version_info >= (3, 10))"
    try:
        done = subprocess.run([python, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise RequestError(f"--python {name}={python} cannot be run ({one_line(error)}): expected a Python") from error
    if done.stdout.strip() != "True":
        raise RequestError(f"--python {name}={python}: expected a Python of version 3.10 or newer")


class ContenderProcess:
    """A contender's process. It ends when this object is closed or this process dies.

    Attributes:
        seconds: from its start to its first answer.
    """

    def __init__(self, program: Path, python: str, module: str, options: Mapping[str, Any], log: Path) -> None:
        began = time.perf_counter()
        try:
            self._worker = WorkerProcess([python, str(program), module, json.dumps(options)], log)
        except OSError as error:
            raise ContenderError(f"{python} cannot be run: {one_line(error)}") from error
        try:
            self.ask("hello")
        except BaseException:
            self.close()
            raise
        self.seconds = time.perf_counter() - began

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Send a command and wait for its answer.

        Raises:
            ContenderError: the command failed, or the process died.
        """
        self._worker.send(json.dumps({"do": command, **arguments}).encode())
        try:
            answer = json.loads(self._worker.receive())
        except WorkerDiedError as error:
            raise ContenderError(f"its process {error}") from error
        if "error" in answer:
            raise ContenderError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process and its children."""
        self._worker.close(PATIENCE)
