"""The report of scripts/gpu_check.sh: whatever a part does, it is told, and nothing unchecked looks like a pass."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gpu_report
import pytest
from gpu_report import FAILED, NOT_RUN, OK, Outcome, TestRun, judge_tests, read_results, rivals, run_part, verdict

from hypersd.errors import EngineError

HEADINGS = [
    "## Verdict",
    "## Machine",
    "## Tiny bundles",
    "## Does tensorrt-rtx run here?",
    "## Does tensorrt run here?",
    "## Does onnxruntime run here?",
    "## Tests of tensorrt-rtx",
    "## Tests of tensorrt",
    "## Tests of CUDA graphs and ONNX Runtime",
    "## Latency",
]
MISBEHAVING = """
import os, sys, time
import gpu_report

def hang(args):
    print("about to wait", flush=True)
    time.sleep(100)

def crash(args):
    print("about to abort", flush=True)
    os.abort()

def fail(args):
    raise RuntimeError("two\\nlines")

def crash_late(args):
    import atexit
    atexit.register(os.abort)
    return {"state": "ok", "text": "it drew", "data": {"psnr": 40}}

def leave(args):
    print("leaving", flush=True)
    os._exit(3)

for part in (hang, crash, fail, crash_late, leave):
    gpu_report.PARTS[part.__name__] = part
gpu_report.main()
"""


def report(folder: Path, *options: str) -> tuple[int, str, str]:
    """Exit code, output and the file of the program itself, no GPU in sight."""
    out = folder / "report.md"
    command = [sys.executable, str(Path(gpu_report.__file__)), "--out", str(out), "--work", str(folder / "work")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run([*command, *options], capture_output=True, text=True, env=environment, timeout=120)
    return ended.returncode, ended.stdout + ended.stderr, out.read_text()


# The whole program


def test_without_a_gpu_it_fails_and_says_why_nothing_ran(tmp_path: Path) -> None:
    code, output, text = report(tmp_path, "--skip-tests")
    assert code == 1, output
    assert [line for line in text.splitlines() if line.startswith("## ")] == HEADINGS
    assert "Traceback" not in text + output
    for heading in HEADINGS[2:6]:
        said = text.split(f"{heading}\n\n")[1].split("\n\n##")[0]
        assert said.startswith("not run: "), heading
        assert "CUDA" in said
    assert "- FAIL: nothing drew on the GPU: " in text
    assert "- FAIL: no test passed at all: left out by --skip-tests" in text
    assert "- Not checked: Does tensorrt-rtx run here?: " in text
    assert "unfinished" not in text


def test_when_all_parts_hang_every_one_is_told(tmp_path: Path) -> None:
    """Nothing is known of the machine then, and everything that can be tried is."""
    code, output, text = report(tmp_path, "--timeout", "0.05", "--test-timeout", "0.05")
    assert code == 1, output
    assert [line for line in text.splitlines() if line.startswith("## ")] == HEADINGS
    assert "# hypersd on an unknown GPU" in text
    assert text.count("timed out after 0.05 s") >= 2
    assert "- Not checked: Does onnxruntime run here?: there is no bundle to draw from" in text


# Parts that misbehave


@pytest.fixture
def misbehaving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program with parts that hang, crash and raise."""
    monkeypatch.setenv("PYTHONPATH", str(Path(gpu_report.__file__).parent), prepend=os.pathsep)
    program = tmp_path / "parts.py"
    program.write_text(MISBEHAVING)
    return program


@pytest.mark.parametrize(
    ("part", "seconds", "why", "said"),
    [
        ("hang", 3, "timed out after 3 s", "about to wait"),
        ("crash", 60, "died with signal 6 (SIGABRT)", "about to abort"),
        ("fail", 60, "`RuntimeError: two lines`", 'raise RuntimeError("two\\nlines")'),
        ("crash_late", 60, "died with signal 6 (SIGABRT) after all was done", "it drew"),
        ("leave", 60, "ended with exit code 3", "leaving"),
    ],
)
def test_a_part_that_misbehaves_is_told_as_such(
    misbehaving: Path, tmp_path: Path, part: str, seconds: float, why: str, said: str
) -> None:
    outcome = run_part(part, "A part", tmp_path, seconds, program=misbehaving)
    assert (outcome.state, outcome.why) == (FAILED, why)
    assert said in outcome.text
    assert outcome.shown().startswith(f"**failed**: {why}")


def test_a_process_that_a_part_leaves_behind_keeps_nobody_waiting(tmp_path: Path) -> None:
    """It holds the output open, as a hung build would."""
    code = "import subprocess, sys; subprocess.Popen(['sleep', '60']); print('done')"
    ended = gpu_report.run_limited([sys.executable, "-c", code], 20, tmp_path / "log")
    assert (ended.how, ended.output) == ("", "done\n")


# Tests


def test_a_crash_and_a_hang_in_a_test_do_not_keep_others_from_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tests" / "test_some.py"
    file.parent.mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    file.write_text(
        "import os, time, pytest\npytestmark = pytest.mark.gpu\n"
        "def test_good(): pass\n"
        "def test_crash(): os.abort()\n"
        "@pytest.mark.parametrize('x', [1, 2])\n"
        "def test_skip(x): pytest.skip('no such (GPU) here')\n"
        "def test_bad(): assert 1 == 2\n"
        "def test_hang(): time.sleep(100)\n"
        "def test_last(): pass\n"
    )
    monkeypatch.setattr(gpu_report, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_report, "TEST_SECONDS", 2)
    run = gpu_report.run_tests(["tests"], tmp_path / "log", 60, "tensorrt-rtx")
    outcome = judge_tests(run, "Tests", ["tensorrt-rtx"])
    assert outcome.data["passed"] == 2
    assert outcome.data["failed"] == 3
    assert outcome.data["skips"] == {"no such (GPU) here": 2}
    assert outcome.state == FAILED
    assert "died with signal 6 (SIGABRT) in tests/test_some.py::test_crash" in outcome.why
    assert "in tests/test_some.py::test_hang" in outcome.why
    assert "FAILED: tests/test_some.py::test_bad" in outcome.why
    assert "assert 1 == 2" in outcome.text
    assert "2 passed, 3 failed, 2 skipped" in outcome.text


def test_no_pytest_is_a_failure() -> None:
    run = TestRun(output="No module named pytest", broken=["ended with exit code 1"])
    outcome = judge_tests(run, "Tests", ["onnxruntime"])
    assert (outcome.state, outcome.why) == (FAILED, "ended with exit code 1")
    assert "No module named pytest" in outcome.text


def test_tests_that_were_all_skipped_are_not_run() -> None:
    run = TestRun()
    output = "tests/a.py::test_a[x] SKIPPED (no CUDA device)     [ 50%]\ntests/a.py::test_b SKIPPED (too old) [100%]\n"
    assert read_results(output, run) is None
    outcome = judge_tests(run, "Tests", ["tensorrt"])
    assert (outcome.state, outcome.why) == (NOT_RUN, "all were skipped: no CUDA device; too old")


def test_an_error_in_teardown_is_not_hidden_by_a_pass() -> None:
    run = TestRun()
    read_results("tests/a.py::test_a PASSED [100%]\ntests/a.py::test_a ERROR [100%]\n", run)
    assert run.results == {"tests/a.py::test_a": "ERROR"}
    assert judge_tests(run, "Tests", []).state == FAILED


def test_a_file_that_cannot_be_imported_is_a_failure() -> None:
    run = TestRun(results={"tests/a.py::test_a": "PASSED"}, output="ERROR tests/b.py - ImportError: no such module\n")
    outcome = judge_tests(run, "Tests", [])
    assert (outcome.state, outcome.why) == (FAILED, "ERROR tests/b.py - ImportError: no such module")


# The verdict


def draw(backend: str, state: str = OK, why: str = "") -> Outcome:
    return Outcome(kind="draw", title=f"Does {backend} run here?", state=state, why=why, data={"backend": backend})


def checked(backend: str, passed: int, skips: dict[str, int] | None = None, state: str = OK, why: str = "") -> Outcome:
    data = {"backends": [backend], "passed": passed, "skips": skips or {}}
    return Outcome(kind="tests", title=f"Tests of {backend}", state=state, why=why, data=data)


def test_it_passes_where_a_backend_drew_and_its_tests_passed() -> None:
    """As on compute capability 9.0: one flavour cannot, one is not there, and that is said."""
    passed, lines = verdict(
        [
            draw("tensorrt-rtx", NOT_RUN, "this GPU is not supported: UNSUPPORTED_CC"),
            draw("tensorrt", NOT_RUN, "TensorRT is not installed"),
            draw("onnxruntime"),
            checked("tensorrt-rtx", 0, {"UNSUPPORTED_CC": 9}, NOT_RUN, "all were skipped: UNSUPPORTED_CC"),
            checked("onnxruntime", 12, {"too little memory": 1}),
        ]
    )
    assert passed
    assert lines == [
        "PASS: drew on the GPU: onnxruntime; tests passed: 12",
        "Not checked: Does tensorrt-rtx run here?: this GPU is not supported: UNSUPPORTED_CC",
        "Not checked: Does tensorrt run here?: TensorRT is not installed",
        "Not checked: Tests of tensorrt-rtx: all were skipped: UNSUPPORTED_CC",
        "Not checked: Tests of onnxruntime: 1 skipped: too little memory",
    ]


@pytest.mark.parametrize(
    ("outcomes", "fail"),
    [
        ([], "FAIL: nothing drew on the GPU: none was run"),
        ([draw("onnxruntime", NOT_RUN, "no GPU"), checked("onnxruntime", 3)], "FAIL: nothing drew on the GPU: no GPU"),
        ([draw("tensorrt", FAILED, "boom"), checked("onnxruntime", 3)], "FAIL: Does tensorrt run here?: boom"),
        (
            [draw("onnxruntime"), checked("onnxruntime", 0, {"no CUDA": 8}, NOT_RUN, "all were skipped: no CUDA")],
            "FAIL: no test passed at all: all were skipped: no CUDA",
        ),
        (
            [draw("tensorrt"), checked("tensorrt", 0, {}, NOT_RUN, "left out"), checked("onnxruntime", 5)],
            "FAIL: no test passed of what drew on the GPU (tensorrt): left out",
        ),
        ([draw("onnxruntime"), checked("onnxruntime", 5, state=FAILED, why="one")], "FAIL: Tests of onnxruntime: one"),
        (
            [
                draw("onnxruntime"),
                checked("onnxruntime", 5),
                Outcome(kind="latency", title="Latency", state=FAILED, why="slow"),
            ],
            "FAIL: Latency: slow",
        ),
    ],
)
def test_what_fails(outcomes: list[Outcome], fail: str) -> None:
    passed, lines = verdict(outcomes)
    assert not passed
    assert fail in lines
    assert not any(line.startswith("PASS") for line in lines)


def test_two_flavours_of_tensorrt_are_never_timed_in_one_process() -> None:
    every = [draw("tensorrt-rtx"), draw("tensorrt"), draw("onnxruntime")]
    assert rivals(every) == [["tensorrt-rtx", "onnxruntime"], ["tensorrt", "onnxruntime"]]
    assert rivals(every[:1]) == [["tensorrt-rtx"]]
    assert rivals(every[2:]) == [["onnxruntime"]]
    assert rivals([draw("tensorrt", FAILED)]) == []


@pytest.mark.parametrize(
    ("error", "is_unsupported"),
    [
        (EngineError("TensorRT-RTX cannot load p on NVIDIA H100 (compute capability 9.0): UNSUPPORTED_CC"), True),
        (EngineError("unet: Target GPU SM 70 is not supported by this TensorRT release."), True),
        (EngineError("compute capability 9.0 is not supported"), True),
        (EngineError("on NVIDIA H100 (compute capability 9.0): Attention operation was not supported by a ker"), False),
        (EngineError("on H100 (compute capability 9.0): layer Slice is not supported"), False),
        (EngineError("out of device memory: GPU is full"), False),
        (RuntimeError("UNSUPPORTED_CC"), False),
    ],
)
def test_only_the_words_for_an_unknown_gpu_are_taken_for_it(error: Exception, is_unsupported: bool) -> None:
    assert gpu_report.is_unsupported_gpu(error) == is_unsupported
