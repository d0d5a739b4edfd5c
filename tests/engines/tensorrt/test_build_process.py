"""The build process of a plan: its cost, its leftovers, and its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from waiting import wait_until

from hypersd.engines import worker_process
from hypersd.engines.specs import TensorSpec
from hypersd.engines.tensorrt.build_process import POLYGRAPHY_SWITCH, SECONDS_TO_STOP, BuildJob, run_build
from hypersd.errors import EngineError, UserError

pytest.importorskip("tensorrt_rtx")
WORKER = [sys.executable, "-m", "hypersd.engines.tensorrt.build_process"]
SECONDS_TO_END = SECONDS_TO_STOP + 5


def small_job(folder: Path, operator: str = "MatMul") -> BuildJob:
    """One layer with weights of 2 MB: built in a moment."""
    described = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, [8, 1024]) for name in "xy"]
    weights = numpy_helper.from_array(np.ones((1024, 1024), dtype=np.float16), "w")
    node = helper.make_node(
        operator, ["x", "w"], ["y"], name="the_node", domain="" if operator == "MatMul" else "other"
    )
    graph = helper.make_graph([node], "graph", described[:1], described[1:], [weights])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("other", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), folder / "model.onnx")
    spec = TensorSpec(dtype="float16", shape=(8, 1024))
    return BuildJob(
        backend="tensorrt-rtx",
        component="unet",
        onnx=str(folder / "model.onnx"),
        plan=str(folder / "model.plan"),
        inputs={"x": spec},
        outputs={"y": spec},
    )


def test_the_users_folder_is_not_imported_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker does not import a clone of Polygraphy, or a file called random.py, from there."""
    for name in ("polygraphy", "hypersd", "random", "json"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} of the folder that the user is in')")
    job = small_job(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert run_build(job, lambda fraction, detail: None).host_memory > 0


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen]:
    """The processes that ``run_build`` starts."""
    started = []
    popen = subprocess.Popen

    def start(*args: Any, **kwargs: Any) -> subprocess.Popen:
        started.append(popen(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(worker_process.subprocess, "Popen", start)
    return started


def once(action: Callable[[], object]) -> Callable[[float, str], None]:
    """An ``update`` that acts when the build is under way."""
    done = []

    def update(fraction: float, detail: str) -> None:
        if not done:
            done.append(True)
            action()

    return update


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# a build that goes well


def test_the_build_is_in_another_process(tmp_path: Path, workers: list[subprocess.Popen]) -> None:
    """It tells its progress up to the whole, its figures are its own, and it is gone when the call returns."""
    job = small_job(tmp_path)
    fractions: list[float] = []
    built = run_build(job, lambda fraction, detail: fractions.append(fraction))
    (worker,) = workers
    assert worker.pid != os.getpid()
    assert worker.returncode == 0
    assert Path(job.plan).stat().st_size > 2e6
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert 50e6 < built.host_memory < 4e9
    assert built.weights_memory is not None
    assert 2e6 <= built.weights_memory < 4e6
    assert built.activation_memory is not None


def test_the_caller_stays_clean(tmp_path: Path) -> None:
    """A service that builds has neither TensorRT's memory nor Polygraphy's variable in its own process.

    Nor has it anything of a setting that says otherwise in its environment: the job decides which backend is built.
    """
    (tmp_path / "job.json").write_bytes(msgspec.json.encode(small_job(tmp_path)))
    program = f"""if True:
        import os, sys, msgspec
        from hypersd.engines.tensorrt.build_process import BuildJob, run_build
        before = dict(os.environ)
        job = msgspec.json.decode(open({str(tmp_path / "job.json")!r}, "rb").read(), type=BuildJob)
        run_build(job, lambda fraction, detail: None)
        print(dict(os.environ) == before, {{name.partition(".")[0] for name in sys.modules}}
            & {{"polygraphy", "tensorrt_rtx", "onnx", "torch"}})
    """
    environment = {**os.environ, POLYGRAPHY_SWITCH: "0"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True, env=environment
    )
    assert done.stdout == "True set()\n"
    assert done.stderr == ""


# a build that fails


def test_reasons_of_the_build_reach_the_caller(tmp_path: Path) -> None:
    """TensorRT's reasons are an EngineError here too, and no plan is left."""
    job = small_job(tmp_path, operator="Strange")
    with pytest.raises(EngineError, match=r"^unet: TensorRT-RTX .* cannot parse .*'the_node' \(Strange\)"):
        run_build(job, lambda fraction, detail: None)
    assert not Path(job.plan).exists()


def test_an_error_that_the_user_can_fix_is_a_user_error(tmp_path: Path) -> None:
    """A file that is not the manifest's, and a folder that cannot be written to: exit code 2, not 1."""
    job = small_job(tmp_path)
    with pytest.raises(UserError, match=r"^.*model\.onnx has the inputs \['x'\], the manifest says \['z'\]"):
        run_build(msgspec.structs.replace(job, inputs={"z": job.inputs["x"]}), lambda fraction, detail: None)
    with pytest.raises(UserError, match=r"nowhere/plan cannot be written: No such file or directory$"):
        run_build(msgspec.structs.replace(job, plan=str(tmp_path / "nowhere/plan")), lambda fraction, detail: None)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGKILL, "it was ended by SIGKILL, perhaps out of memory.*; close other programs, or build on .*$"),
        (signal.SIGSEGV, "it was ended by SIGSEGV"),
    ],
)
def test_a_process_that_dies(number: int, message: str, unet_job: BuildJob, workers: list[subprocess.Popen]) -> None:
    """Killed by the system for its memory, or crashed: one line with the component, and half a plan is removed."""
    with pytest.raises(EngineError, match=rf"^unet: the process that built the engine died: {message}") as caught:
        run_build(unet_job, once(lambda: os.kill(workers[0].pid, number)))
    assert "\n" not in str(caught.value)
    assert not Path(unet_job.plan).exists()


def test_a_process_that_cannot_even_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last words, the end of its traceback, are in the message."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "msgspec.py").write_text("raise RuntimeError('a broken installation')")
    with pytest.raises(EngineError, match=r"died: it ended with exit code 1: RuntimeError: a broken installation$"):
        run_build(small_job(tmp_path), lambda fraction, detail: None)


# a build that is stopped


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_exception_of_the_caller_ends_the_build(
    error: type[BaseException], unet_job: BuildJob, workers: list[subprocess.Popen]
) -> None:
    """Ctrl-C, or a bug in what shows the progress: it comes out, the process is gone, and there is no plan."""

    def fail() -> None:
        raise error

    with pytest.raises(error):
        run_build(unet_job, once(fail))
    assert workers[0].returncode is not None
    assert not is_alive(workers[0].pid)
    assert not Path(unet_job.plan).exists()


def start_worker(job: BuildJob, program: Sequence[str] = WORKER) -> subprocess.Popen:
    """The program alone, with a job and a first event."""
    worker = subprocess.Popen(
        program,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, POLYGRAPHY_SWITCH: "1"},
    )
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(msgspec.json.encode(job) + b"\n")
    worker.stdin.flush()
    assert b'"Progress"' in worker.stdout.readline()
    return worker


def test_closing_stdin_stops_the_build(unet_job: BuildJob) -> None:
    """It ends by itself in seconds, says that it was cancelled if it came to that, and takes its half plan with it."""
    worker = start_worker(unet_job)
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.close()
    events = worker.stdout.read().splitlines()
    assert worker.wait(SECONDS_TO_END) in (0, 1)
    assert not any(b'"Built"' in event for event in events)
    assert not Path(unet_job.plan).exists()


def test_ctrl_c_is_the_parents_to_handle(tmp_path: Path) -> None:
    """The terminal sends it to both: the worker goes on, and would print no traceback into the command's output."""
    worker = start_worker(small_job(tmp_path))
    assert worker.stdout is not None
    worker.send_signal(signal.SIGINT)
    assert any(b'"Built"' in event for event in worker.stdout)
    assert worker.wait(SECONDS_TO_END) == 0


def test_a_worker_does_not_outlive_its_parent(unet_job: BuildJob, tmp_path: Path) -> None:
    """A parent that is killed cannot say anything: the build must not run on, holding gigabytes."""
    (tmp_path / "job.json").write_bytes(msgspec.json.encode(unet_job))
    program = f"""if True:
        import msgspec, subprocess
        from hypersd.engines.tensorrt.build_process import BuildJob, run_build
        started = []
        popen = subprocess.Popen
        subprocess.Popen = lambda *args, **kwargs: started.append(popen(*args, **kwargs)) or started[-1]
        job = msgspec.json.decode(open({str(tmp_path / "job.json")!r}, "rb").read(), type=BuildJob)
        run_build(job, lambda fraction, detail: print(started[0].pid, flush=True))
    """
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    assert is_alive(worker)
    parent.kill()
    parent.wait()
    wait_until(lambda: not is_alive(worker))
    assert not Path(unet_job.plan).exists()


def test_a_build_too_deep_to_listen_is_ended(tmp_path: Path) -> None:
    """A step of TensorRT may take minutes. After a grace the process ends all the same, and removes what it wrote."""
    program = """if True:
        import pathlib, time
        from hypersd.engines.tensorrt import build_process, plan_builder
        build_process.SECONDS_TO_STOP = 0.5
        def build_plan(job, report):
            pathlib.Path(job.plan).write_text("half a plan")
            report(0.5, "deep")
            time.sleep(60)
        plan_builder.build_plan = build_plan
        build_process.main()
    """
    job = small_job(tmp_path)
    deep = start_worker(job, [sys.executable, "-c", program])
    assert Path(job.plan).exists()
    assert deep.stdin is not None
    deep.stdin.close()
    assert deep.wait(5) == 1
    assert not Path(job.plan).exists()
