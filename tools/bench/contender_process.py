"""A contender's process, seen from the bench."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import HyperSDError, RequestError, one_line

PACKAGE = Path(__file__).resolve().parents[2]
PATIENCE = 5.0  # seconds that a process has to end by itself
LOG_TAIL = 4000  # bytes
START = """import sys

from hypersd.tools.bench.contender_worker import main

if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
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
        self._log = log
        reading, writing = os.pipe()
        began = time.perf_counter()
        try:
            with log.open("wb") as output:
                self._process = subprocess.Popen(
                    [python, str(program), str(writing), module, json.dumps(options)],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    pass_fds=(writing,),
                    start_new_session=True,  # Ctrl-C reaches only the parent, which then ends the group
                )
        except OSError as error:
            os.close(reading)
            raise ContenderError(f"{python} cannot be run: {one_line(error)}") from error
        finally:
            os.close(writing)
        self._answers = os.fdopen(reading, encoding="utf-8")
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
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died: the missing answer says so
            self._process.stdin.write((json.dumps({"do": command, **arguments}) + "\n").encode())
            self._process.stdin.flush()
        line = self._answers.readline()
        if not line.endswith("\n"):
            raise ContenderError(self._last_words())
        answer = json.loads(line)
        if "error" in answer:
            raise ContenderError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process and its children."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(PATIENCE)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._answers.close()

    def _last_words(self) -> str:
        """The exit status of the process and the last line that it printed, in words."""
        code = self._process.wait()
        ended = f"ended with exit code {code}"
        if code < 0:
            ended = f"was ended by {signal.Signals(-code).name}"
            ended += ", perhaps out of memory" if -code == signal.SIGKILL else ""
        printed = self._log.read_bytes()[-LOG_TAIL:].decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(printed) if line.strip()), "")
        return f"its process {ended}{f': {last}' if last else ''}"
