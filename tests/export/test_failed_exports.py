"""Exports that are rejected, killed, fail or fill the disk: nothing half-made stays, and the next run goes on."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import preloaded
import pytest
from make_tiny_repos import SDXL_REPO
from waiting import wait_until

from hypersd.engines.bundle import Bundle
from hypersd.errors import DiskFullError, ExportError, RequestError, UserError
from hypersd.export import ExportOptions, export_bundle
from hypersd.export.checkpoints import HYPER_SD_REPO, find_checkpoint
from hypersd.export.sources import SourceOptions

from .export_runs import ONE, PARTS, UNET, Recorder, Run, left_in, state

# The command line with tracing replaced; each trace is noted in a file of all processes, and takes a while.
SLOW_CLI = """
import sys, time
from pathlib import Path
from hypersd.export import exporter
log, seconds = Path(sys.argv.pop(1)), float(sys.argv.pop(1))
def trace(component, path):
    with log.open("a") as file:
        file.write(path.parent.name + "\\n")
    path.write_bytes(b"half")
    time.sleep(seconds)
    path.write_bytes(b"whole" + path.parent.name.encode())
    return [path]
exporter.trace = trace
exporter.reference_cases = lambda component: []
exporter.check_graph = lambda *_: None
exporter.check_outputs = lambda *_: 0.0
from hypersd.cli import main
sys.exit(main())
"""


def cli_arguments(tiny_repos: Path, name: str, out: Path) -> list[str]:
    entry = find_checkpoint(name)
    return [
        "export", "--ckpt", name, "--precision", "fp32", "--backend", "none", "--out", str(out),
        "--base", str(tiny_repos / entry.base),
        "--lora", str(tiny_repos / HYPER_SD_REPO / entry.filename),
    ]  # fmt: skip


def start(*command: str) -> preloaded.Process:
    return preloaded.start(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@contextlib.contextmanager
def ended(*processes: preloaded.Process) -> Iterator[None]:
    """Processes that end with the block, also after an error."""
    try:
        yield
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.communicate()


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf"), 1e9, 10.5, -10.5])
def test_lora_scales_out_of_range(scale: float, run: Run, tmp_path: Path) -> None:
    """Rejected with the range, before any source is opened."""
    with pytest.raises(RequestError, match="expected -10 to 10") as error:
        run(base="no/such/place", lora_scale=scale)
    assert "\n" not in str(error.value)
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("scale", [0.5, 0.0, -1.0])
def test_a_whole_unet_has_no_lora_scale(scale: float, run: Run, tmp_path: Path) -> None:
    """There is no LoRA to scale: silently leaving the option out would mislead."""
    with pytest.raises(RequestError, match="whole UNet, not a LoRA: leave --lora-scale out"):
        run(UNET, lora_scale=scale)


def test_unknown_precision(run: Run) -> None:
    """From Python no argparse checks the precision first."""
    with pytest.raises(RequestError, match="expected fp16 or fp32"):
        run(precision="bf16")


def test_the_wrong_family_is_reported_before_any_component_is_made(run: Run, tiny_repos: Path, tmp_path: Path) -> None:
    """A LoRA of the other family, a base of the other family: no stage begins, nothing is written."""
    wrong = str(tiny_repos / HYPER_SD_REPO / "Hyper-SDXL-1step-lora.safetensors")
    for changes in ({"lora": wrong}, {"base": str(tiny_repos / SDXL_REPO)}):
        with pytest.raises(UserError, match="SDXL"):
            run(**changes)
    assert left_in(tmp_path) == []


# --- kills and errors ------------------------------------------------------------------------------------------------


def test_kill_resume_and_done(tiny_repos: Path, tmp_path: Path, run: Run) -> None:
    """For real: kill -9 after the first component leaves no bundle; the second run does not trace that one again
    and ends with a whole bundle; the third says that it is done, and touches nothing."""
    out = tmp_path / "out"
    process = start("-m", "hypersd.cli", *cli_arguments(tiny_repos, ONE, out))
    with ended(process):
        wait_until((tmp_path / ".out.partial/progress.json").exists, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not out.exists()
    bundle, second = run()
    assert second.traced == PARTS[1:]
    assert Bundle.load(out, hashes=True).manifest == bundle.manifest
    assert left_in(tmp_path) == ["out"]
    before = state(out)
    _, third = run()
    assert third.started == ["hash the weight files"]
    assert len(third.notes) == 1
    assert "is done already" in third.notes[0]
    assert state(out) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_in_the_middle_of_a_trace(
    number: signal.Signals, tiny_repos: Path, tmp_path: Path, run: Run, cheap: Any
) -> None:
    """Stopped while the first component is half written: no bundle, after Ctrl-C nothing; the next run is whole."""
    out, log = tmp_path / "out", tmp_path / "log"
    process = start("-c", SLOW_CLI, str(log), "30", *cli_arguments(tiny_repos, ONE, out))
    with ended(process):
        wait_until((tmp_path / ".out.partial/text_encoder/model.onnx").exists, process)
        process.send_signal(number)
        output = process.communicate(timeout=60)[0]
    assert not out.exists()
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert "Traceback" not in output
        assert left_in(tmp_path) == ["log"]
    else:
        assert process.returncode != 0
    _, second = run()
    assert second.traced == PARTS
    Bundle.load(out, hashes=True)
    assert (out / "text_encoder/model.onnx").read_bytes() == b"graph of text_encoder"
    assert left_in(tmp_path) == ["log", "out"]


def test_two_at_once(tiny_repos: Path, tmp_path: Path) -> None:
    """Two processes on one output: both end well, one says that it waits, and each component is traced once."""
    out, log = tmp_path / "out", tmp_path / "log"
    command = ("-c", SLOW_CLI, str(log), "0.5", *cli_arguments(tiny_repos, ONE, out))
    processes = [start(*command), start(*command)]
    with ended(*processes):
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert log.read_text().split() == PARTS
    assert sum("waiting for another export" in output for output in outputs) == 1
    assert sum("is done already" in output for output in outputs) == 1
    Bundle.load(out, hashes=True)
    assert left_in(tmp_path) == ["log", "out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ExportError, MemoryError])
@pytest.mark.parametrize("at", PARTS)
def test_an_error_in_the_middle(at: str, error: type[BaseException], run: Run, cheap: Any, tmp_path: Path) -> None:
    """After Ctrl-C or a failure while a component is written only whole ones stay; the next run begins with them."""

    def fail(name: str) -> None:
        if name == at:
            raise error("stop")

    cheap(fail)
    with pytest.raises(error):
        run()
    done = PARTS[: PARTS.index(at)]
    assert left_in(tmp_path) == ([".out.partial"] if done else [])
    if done:
        assert left_in(tmp_path / ".out.partial") == sorted(["progress.json", "tokenizer", *done])
    cheap(lambda name: None)
    bundle, second = run()
    assert second.traced == PARTS[PARTS.index(at) :]
    assert second.failed == []
    Bundle.load(bundle.root, hashes=True)
    assert left_in(tmp_path) == ["out"]


def test_a_component_that_fails_its_check_is_not_kept(
    source_options: Callable[..., SourceOptions], cheap: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The export fails if ONNX Runtime's output differs: no bundle, no file of that component, and a message."""

    def differs(path: Path, cases: object, precision: object) -> float:
        raise ExportError(f"{path}: differs")

    monkeypatch.setattr("hypersd.export.exporter.check_outputs", differs)
    recorder = Recorder()
    with pytest.raises(ExportError, match="text_encoder"):
        export_bundle(ONE, tmp_path / "out", ExportOptions(sources=source_options(ONE), precision="fp32"), recorder)
    assert recorder.failed == ["text_encoder: check on ONNX Runtime"]
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("earlier", [{"name": "Hyper-SDXL-1step-lora"}, {"precision": "fp16"}], ids=["sdxl", "fp16"])
def test_components_of_an_earlier_run_with_other_inputs_are_left_out(
    earlier: dict[str, Any], run: Run, cheap: Any, tmp_path: Path
) -> None:
    """A run was stopped, then the command was changed: none of the first one's components gets into the bundle."""

    def stop(name: str) -> None:
        if name == "vae_decoder":
            raise KeyboardInterrupt

    cheap(stop)
    with pytest.raises(KeyboardInterrupt):
        run(**earlier)
    cheap(lambda name: None)
    bundle, second = run()
    assert second.traced == PARTS
    assert {name.split("/")[0] for name in bundle.manifest.files} == {*PARTS, "tokenizer"}
    there = {path.relative_to(bundle.root).as_posix() for path in bundle.root.rglob("*") if path.is_file()}
    assert there == {*bundle.manifest.files, "bundle.json"}
    Bundle.load(bundle.root, hashes=True)


# --- full disks ------------------------------------------------------------------------------------------------------


def test_a_too_small_disk_is_reported_first(
    run: Run, cheap: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is loaded, the message says the space needed, the space free and a remedy; nothing is written."""
    free = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr("hypersd.export.workspace.shutil.disk_usage", lambda path: free)
    with pytest.raises(DiskFullError, match=r"needs about 4 MB, .* has 1 MB free: .*--out") as error:
        run()
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2
    assert left_in(tmp_path) == []


def test_finished_ones_need_no_space(run: Run, cheap: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only missing components are counted: a neighbour's components and a finished bundle cost nothing."""
    run(ONE, "one")
    free = shutil.disk_usage(tmp_path)._replace(free=1)
    monkeypatch.setattr("hypersd.export.workspace.shutil.disk_usage", lambda path: free)
    run(ONE, "one")
    run(ONE, "same")
    Bundle.load(tmp_path / "same", hashes=True)


@pytest.mark.parametrize("kilobytes", [96, 360])
def test_the_disk_fills_up_for_real(
    kilobytes: int, mount_disk: Callable[[str], Path], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real tracing onto a tmpfs that fills up at the first or the second component: one line, and nothing is left."""
    disk = mount_disk(f"{kilobytes}k")
    monkeypatch.setattr("hypersd.export.exporter.check_space", lambda *_: None)
    with pytest.raises(DiskFullError) as error:
        run(out=f"{disk.name}/out")
    message = str(error.value)
    assert "\n" not in message
    assert str(disk) in message
    assert "--out" in message
    assert left_in(disk) == []
