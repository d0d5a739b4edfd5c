"""The report of scripts/gpu_check.sh: every failure is reported, and nothing unchecked looks like a pass."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_report
import pytest
from gpu_report import FAILED, NOT_RUN, OK, UNSUPPORTED_GPU, Outcome, verdict


def report(folder: Path, *options: str) -> tuple[int, str, str]:
    """Exit code, output and file of the program itself, without a GPU."""
    out = folder / "report.md"
    command = [sys.executable, str(Path(gpu_report.__file__)), "--out", str(out), "--work", str(folder / "work")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run([*command, *options], capture_output=True, text=True, env=environment, timeout=120)
    return ended.returncode, ended.stdout + ended.stderr, out.read_text()


def arguments(folder: Path, timeout: float = 60) -> argparse.Namespace:
    return argparse.Namespace(work=folder, timeout=timeout)


def test_without_a_gpu_it_fails_and_gives_the_reasons(tmp_path: Path) -> None:
    code, output, text = report(tmp_path)
    assert code == 1, output
    assert "# hypersd on no GPU" in text
    assert "Traceback" not in text + output
    for kind in ("images", "tests"):
        for backend in ("tensorrt-rtx", "tensorrt", "onnxruntime"):
            heading = next(line for line in text.splitlines() if line.startswith(f"## {kind} of {backend}: "))
            assert "not run: " in heading
            assert "CUDA" in heading
    assert "- FAIL: no image was generated on the GPU" in text
    assert "- Not checked: images of tensorrt-rtx: not run: " in text
    assert "unfinished" not in text


def test_parts_that_hang_are_reported(tmp_path: Path) -> None:
    """The machine is then unknown, and every part is tried."""
    code, output, text = report(tmp_path, "--timeout", "0.05", "--only", "images")
    assert code == 1, output
    assert "# hypersd on an unknown GPU" in text
    assert text.count("timed out after 0.05 s") >= 4
    assert "- Not checked: tests of onnxruntime: not run: left out by --only" in text


# Programs


@pytest.mark.parametrize(
    ("code", "seconds", "how", "said"),
    [
        ("import time; print('waiting', flush=True); time.sleep(100)", 3, "timed out after 3 s", "waiting"),
        ("import os; print('aborting', flush=True); os.abort()", 60, "died with signal 6 (SIGABRT)", "aborting"),
        ("raise RuntimeError('two')", 60, "ended with exit code 1", "RuntimeError: two"),
        ("print('done')", 60, "", "done"),
    ],
)
def test_how_a_program_ended(tmp_path: Path, code: str, seconds: float, how: str, said: str) -> None:
    _, ended, output = gpu_report.run_limited([sys.executable, "-c", code], seconds, tmp_path / "log")
    assert ended == how
    assert said in output


def test_a_child_that_outlives_its_program_is_not_waited_for(tmp_path: Path) -> None:
    """It holds the output open, as a hung build would."""
    code = "import subprocess, sys; subprocess.Popen(['sleep', '60']); print('done')"
    _, how, output = gpu_report.run_limited([sys.executable, "-c", code], 20, tmp_path / "log")
    assert (how, output) == ("", "done\n")


@pytest.mark.parametrize(
    ("last", "backend", "state"),
    [
        ("error: UNSUPPORTED_CC", "tensorrt", NOT_RUN),
        ("error: UNSUPPORTED_CC", "onnxruntime", FAILED),
        ("error: PSNR 12 dB", "tensorrt", FAILED),
    ],
)
def test_only_an_unknown_gpu_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str, backend: str, state: str
) -> None:
    monkeypatch.setattr(gpu_report, "run_limited", lambda *_: (1, "ended with exit code 1", f"building\n{last}\n"))
    outcome = gpu_report.check_images(backend, arguments(tmp_path))
    assert (outcome.state, outcome.why) == (state, f"ended with exit code 1: {last}")


def test_a_contender_that_failed_or_differs_fails_the_latency(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [{"name": "hypersd", "failure": None}, {"name": "hypersd-onnxruntime", "failure": "no memory"}]
    rows = [{"contender": "hypersd", "sameness": None}, {"contender": "b", "sameness": {"verdict": "other"}}]

    def bench(command: list[str], *_: object) -> tuple[int, str, str]:
        written = {"contenders": entries, "comparisons": [{"rows": rows}]}
        Path(command[command.index("--json") + 1]).write_text(json.dumps(written))
        return 0, "", "tables"

    monkeypatch.setattr(gpu_report, "run_limited", bench)
    outcome = gpu_report.measure_latency(["hypersd-onnxruntime"], "bundle", arguments(tmp_path))
    assert (outcome.state, outcome.text) == (FAILED, "tables")
    assert outcome.why == "hypersd-onnxruntime: no memory; b: another image"


# Tests


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository whose tests are in ``tests``."""
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    (tmp_path / "tests").mkdir()
    monkeypatch.setattr(gpu_report, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_report, "TEST_SECONDS", 2)
    return tmp_path


def run_tests(root: Path, **bodies: str) -> Outcome:
    for name, body in bodies.items():
        (root / f"tests/test_{name}.py").write_text(f"import os, time, pytest\npytestmark = pytest.mark.gpu\n{body}")
    return gpu_report.run_tests("onnxruntime", arguments(root))


def test_a_crash_a_hang_and_a_broken_file_keep_no_other_file_from_running(root: Path) -> None:
    outcome = run_tests(
        root,
        some="def test_good(): pass\n"
        "@pytest.mark.parametrize('x', [1, 2])\n"
        "def test_skip(x): pytest.skip('no such (GPU) here')\n"
        "def test_bad(): assert 1 == 2\n"
        "@pytest.fixture\ndef broken():\n    yield\n    raise RuntimeError\n"
        "def test_teardown(broken): pass\n",
        crash="def test_crash(): os.abort()\n",
        hang="def test_hang(): time.sleep(100)\n",
        imports="import no_such_module\n",
        last="def test_last(): pass\n",
        tensorrt="def test_of_another_backend(): pass\n",
    )
    assert outcome.state == FAILED
    assert outcome.data == {"passed": 2, "skips": {"no such (GPU) here": 2}}
    for why in (
        "test_crash.py: died with signal 6 (SIGABRT)",
        "test_hang.py: ",
        "test_some.py::test_bad failed",
        "test_some.py::test_teardown failed",
        "test_imports.py",
    ):
        assert why in outcome.why
    assert "assert 1 == 2" in outcome.text
    assert "2 passed, 6 failed, 2 skipped" in outcome.text


def test_tests_that_were_all_skipped_are_not_run(root: Path) -> None:
    outcome = run_tests(root, a="def test_a(): pytest.skip('no CUDA device')\n")
    assert (outcome.state, outcome.why) == (NOT_RUN, "all were skipped: no CUDA device")


# The verdict


def images(backend: str, state: str = OK, why: str = "") -> Outcome:
    return Outcome(kind="images", subject=backend, state=state, why=why)


def checked(backend: str, passed: int, skips: dict[str, int] | None = None, state: str = OK, why: str = "") -> Outcome:
    data = {"passed": passed, "skips": skips or {}}
    return Outcome(kind="tests", subject=backend, state=state, why=why, data=data)


def test_it_passes_where_a_backend_generated_and_its_tests_passed() -> None:
    """As on compute capability 9.0: TensorRT-RTX does not support it and TensorRT is not installed."""
    passed, lines = verdict(
        [
            images("tensorrt-rtx", NOT_RUN, "UNSUPPORTED_CC"),
            images("tensorrt", NOT_RUN, "TensorRT is not installed"),
            images("onnxruntime"),
            checked("tensorrt-rtx", 0, {"UNSUPPORTED_CC": 9}, NOT_RUN, "all were skipped: UNSUPPORTED_CC"),
            checked("onnxruntime", 12, {"too little memory": 1}),
        ]
    )
    assert passed
    assert lines == [
        "PASS: onnxruntime; tests passed: 12",
        "Not checked: images of tensorrt-rtx: not run: UNSUPPORTED_CC",
        "Not checked: images of tensorrt: not run: TensorRT is not installed",
        "Not checked: tests of tensorrt-rtx: not run: all were skipped: UNSUPPORTED_CC",
        "Not checked: 1 tests of onnxruntime: too little memory",
    ]


@pytest.mark.parametrize(
    ("outcomes", "fail"),
    [
        ([], "FAIL: no image was generated on the GPU"),
        ([images("onnxruntime", NOT_RUN), checked("onnxruntime", 3)], "FAIL: no image was generated on the GPU"),
        ([images("tensorrt", FAILED, "boom"), checked("onnxruntime", 3)], "FAIL: images of tensorrt: failed: boom"),
        ([images("onnxruntime"), checked("onnxruntime", 0, state=NOT_RUN)], "FAIL: no test passed of onnxruntime"),
        (
            [images("tensorrt"), checked("tensorrt", 0, {}, NOT_RUN, "left out"), checked("onnxruntime", 5)],
            "FAIL: no test passed of tensorrt",
        ),
        (
            [images("onnxruntime"), checked("onnxruntime", 5, state=FAILED, why="one")],
            "FAIL: tests of onnxruntime: failed: one",
        ),
        (
            [
                images("onnxruntime"),
                checked("onnxruntime", 5),
                Outcome(kind="latency", subject="tiny", state=FAILED, why="slow"),
            ],
            "FAIL: latency of tiny: failed: slow",
        ),
    ],
)
def test_failures(outcomes: list[Outcome], fail: str) -> None:
    passed, lines = verdict(outcomes)
    assert not passed
    assert fail in lines
    assert not any(line.startswith("PASS") for line in lines)


@pytest.mark.parametrize(
    ("message", "is_unsupported"),
    [
        ("TensorRT-RTX cannot load p on NVIDIA H100 (compute capability 9.0): UNSUPPORTED_CC", True),
        ("unet: Target GPU SM 70 is not supported by this TensorRT release.", True),
        ("compute capability 9.0 is not supported", True),
        ("on NVIDIA H100 (compute capability 9.0): Attention operation was not supported by a ker", False),
        ("on H100 (compute capability 9.0): layer Slice is not supported", False),
        ("out of device memory: GPU is full", False),
    ],
)
def test_messages_about_an_unknown_gpu(message: str, is_unsupported: bool) -> None:
    assert (UNSUPPORTED_GPU.search(message) is not None) == is_unsupported
