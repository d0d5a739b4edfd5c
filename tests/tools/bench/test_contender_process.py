"""A contender's process may not corrupt, hang or outlive the bench."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hypersd.errors import RequestError
from hypersd.tools.bench.contender_process import PATIENCE, ContenderError, ContenderProcess, check_python, write_start

SETTINGS = {
    "prompt": "a cat",
    "seed": 3,
    "num_inference_steps": 1,
    "timesteps": None,
    "eta": 0.0,
    "guidance_scale": 0.0,
    "height": 16,
    "width": 16,
}


@pytest.fixture
def start(tmp_path: Path, stand_in, diary: Path) -> Iterator[Callable[..., ContenderProcess]]:
    """``start(**behaviour)``: a stand-in's process."""
    program, started = write_start(tmp_path / "program"), []

    def begin(python: str = sys.executable, **behaviour: Any) -> ContenderProcess:
        options = {"diary": str(diary), "name": "it", **behaviour}
        started.append(ContenderProcess(program, python, "stand_in", options, tmp_path / "log"))
        return started[-1]

    yield begin
    for process in started:
        process.close()


def ask_in_vain(worker: ContenderProcess) -> None:
    """Ask for an image that is never finished."""
    with pytest.raises(ContenderError):
        worker.ask("generate", settings=SETTINGS)


def test_nothing_that_a_library_prints_gets_into_the_answers(start, tmp_path: Path) -> None:
    """Lines on stdout and stderr, even such that look like answers, go to the log, and answers stay answers."""
    worker = start()
    loaded = worker.ask("load")
    assert loaded["how"] == "stand-in"
    assert set(loaded["versions"]) == {"python", "numpy"}
    made = worker.ask("generate", settings=SETTINGS, save=str(tmp_path / "pixels.npy"))
    assert (made["seconds"], made["stages"]) == (0.25, {"tokens": 0.05, "step 1": 0.1})
    assert (tmp_path / "pixels.npy").exists()
    assert "not by a library" in (tmp_path / "log").read_text()


def test_peak_memory_is_the_process_own(start) -> None:
    """A worker that has not loaded torch has not got the memory of this process, which has."""
    memory = start().ask("load")["host_memory"]
    if memory is not None:  # Linux
        own = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        assert 1e6 < memory < own


def test_an_exception_is_one_line_and_not_the_end(start) -> None:
    """The contender's error comes back in one line with its kind; the process still answers."""
    worker = start(raises_at=1)
    worker.ask("load")
    with pytest.raises(ContenderError, match=r"^ValueError: first line second line$"):
        worker.ask("generate", settings=SETTINGS)
    assert worker.ask("generate", settings=SETTINGS)["seconds"] == 0.25


def test_the_cause_of_a_death_is_reported(start) -> None:
    """A process that the system killed, for instance out of memory, is an error with the signal and its last words."""
    worker = start(kills_itself_at=1)
    worker.ask("load")
    with pytest.raises(ContenderError, match=r"was ended by SIGKILL, perhaps out of memory: about to go$"):
        worker.ask("generate", settings=SETTINGS)


def test_a_missing_module(start, tmp_path: Path) -> None:
    """A missing module is reported at load."""
    worker = ContenderProcess(tmp_path / "program/start.py", sys.executable, "no_such_module", {}, tmp_path / "other")
    try:
        with pytest.raises(ContenderError, match="No module named 'no_such_module'"):
            worker.ask("load")
    finally:
        worker.close()


def test_it_ends_when_its_input_is_closed_however_busy(start) -> None:
    """A parent that dies leaves no orphans: a worker in the middle of an image goes as well."""
    worker = start(hangs=True)
    worker.ask("load")
    asking = threading.Thread(target=ask_in_vain, args=(worker,))
    asking.start()
    time.sleep(0.3)
    assert asking.is_alive()
    began = time.monotonic()
    worker.close()
    assert time.monotonic() - began < PATIENCE, "it was not killed"
    asking.join(10)
    assert not asking.is_alive()


def test_no_worker_outlives_a_parent_that_is_killed(tmp_path: Path, stand_in, diary: Path) -> None:
    """SIGKILL leaves the parent no time to tidy up; its workers end all the same."""
    program = f"""if True:
        import sys, time
        from pathlib import Path
        from hypersd.tools.bench.contender_process import ContenderProcess, write_start
        folder = Path({str(tmp_path)!r})
        options = {{"diary": {str(diary)!r}, "name": "it"}}
        worker = ContenderProcess(write_start(folder / "p"), sys.executable, "stand_in", options, folder / "log")
        print(worker.ask("hello")["pid"], flush=True)
        time.sleep(60)
    """
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    os.kill(pid, 0)  # it is there
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text():
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the worker outlived its parent")


def test_another_python_needs_no_hypersd(stand_in, diary: Path, tmp_path: Path) -> None:
    """An environment that has neither this package nor what it needs runs a contender."""
    bare = getattr(sys, "_base_executable", sys.executable)
    found = subprocess.run([bare, "-c", "import msgspec"], cwd=tmp_path, capture_output=True, check=False)
    if found.returncode == 0:
        pytest.skip("no interpreter without this package's dependencies here")
    program = write_start(tmp_path / "bare")
    options = {"diary": str(diary), "name": "it", "grey": None}
    worker = ContenderProcess(program, bare, "stand_in", options, tmp_path / "log-bare")
    try:
        worker.ask("load")
        assert worker.ask("generate", settings=SETTINGS)["seconds"] == 0.25
    finally:
        worker.close()


@pytest.mark.parametrize("python", ["/no/such/python", "/", "false"])
def test_an_interpreter_that_does_not_run(python: str) -> None:
    """A file that does not run, or is no Python, is rejected before anything starts."""
    with pytest.raises(RequestError, match="expected a Python") as error:
        check_python("optimum", python)
    assert "\n" not in str(error.value)
