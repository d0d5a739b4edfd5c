"""Whole exports: kills, resuming, two at once, other inputs, full disks, reuse, and the manifest.

Where tracing is not what is tested it is replaced by a file with a few bytes; loading and fusing always run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import preloaded
import pytest
import torch
from make_tiny_repos import SD15_REPO, SDXL_REPO
from safetensors.torch import load_file, save_file
from waiting import wait_until

from hypersd.engines.bundle import Bundle
from hypersd.errors import DiskFullError, ExportError, RequestError, UserError
from hypersd.export import ExportOptions, export_bundle
from hypersd.export.checkpoints import HYPER_SD_REPO, find_checkpoint
from hypersd.export.component_exports import component_exports, tool_versions
from hypersd.export.components import ComponentModule
from hypersd.export.shapes import ShapeOptions, image_shapes
from hypersd.export.sources import SourceOptions, find_sources

ONE, TWO, UNET = "Hyper-SD15-1step-lora", "Hyper-SD15-2steps-lora", "Hyper-SDXL-1step-Unet"
PARTS = ["text_encoder", "vae_encoder", "vae_decoder", "unet"]  # in the order in which they are made

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


@dataclasses.dataclass
class Recorder:
    """An export's progress."""

    started: list[str] = dataclasses.field(default_factory=list)
    failed: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    downloads: None = None

    def start(self, stage: str) -> None:
        self.started.append(stage)

    def finish(self, stage: str, seconds: float, note: str, ok: bool) -> None:
        assert self.started[-1] == stage
        assert seconds >= 0
        if not ok:
            self.failed.append(stage)

    def note(self, text: str) -> None:
        if not text.startswith("fuses "):  # which every export with a local LoRA says
            self.notes.append(text)

    @property
    def traced(self) -> list[str]:
        return [stage.split(":")[0] for stage in self.started if stage.endswith("trace to ONNX")]


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str], object]], None]:
    """Tracing and checks replaced. ``cheap(action)``: ``action(name)`` runs in the middle of each trace."""
    action: list[Callable[[str], object]] = [lambda name: None]

    def trace(component: ComponentModule, path: Path) -> list[Path]:
        data = path.with_name("model.onnx_data")
        path.write_bytes(b"graph of " + path.parent.name.encode())
        action[0](path.parent.name)
        data.write_bytes(torch.cat([p.flatten()[:4].float() for p in component.module.parameters()]).numpy().tobytes())
        return [path, data]

    monkeypatch.setattr("hypersd.export.exporter.trace", trace)
    monkeypatch.setattr("hypersd.export.exporter.reference_cases", lambda component: [])
    monkeypatch.setattr("hypersd.export.exporter.check_graph", lambda *_: None)
    monkeypatch.setattr("hypersd.export.exporter.check_outputs", lambda *_: 0.0)
    return lambda new: action.__setitem__(0, new)


Run = Callable[..., tuple[Bundle, Recorder]]


@pytest.fixture
def run(source_options: Callable[..., SourceOptions], tmp_path: Path) -> Run:
    """``run(name, out=..., base=..., precision=...)``: an fp32 export below tmp_path, and what it told."""

    def export(name: str = ONE, out: str = "out", lora: str | None = None, **options: Any) -> tuple[Bundle, Recorder]:
        changes = {key: options.pop(key) for key in ("base", "vae", "variant") if key in options}
        sources = source_options(name, **changes, **({"checkpoint_file": lora} if lora else {}))
        recorder = Recorder()
        settings = ExportOptions(**{"precision": "fp32", "sources": sources, **options})
        return export_bundle(name, tmp_path / out, settings, recorder), recorder

    return export


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


def left_in(folder: Path) -> list[str]:
    """The folder's contents besides locks' empty files."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def state(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Place, size and time of every file."""
    stats = {path.relative_to(folder).as_posix(): path.stat() for path in [folder, *folder.rglob("*")]}
    return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


# --- kills -----------------------------------------------------------------------------------------------------------


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
    command = ("-c", SLOW_CLI, str(log), "1.5", *cli_arguments(tiny_repos, ONE, out))
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


# --- what is there already -------------------------------------------------------------------------------------------


OTHERS: dict[str, dict[str, Any]] = {
    "lora scale": {"lora_scale": 0.75},
    "precision": {"precision": "fp16"},
    "checkpoint": {"name": TWO},
    "size": {"shapes": ShapeOptions(height=128)},
    "ranges": {"shapes": ShapeOptions(dynamic={"batch": (1, 1, 2)})},
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_inputs_need_replace(what: str, run: Run, cheap: Any, tmp_path: Path) -> None:
    """A bundle of other inputs is never overwritten unasked: the refusal names --replace, which then works."""
    run()
    before = state(tmp_path / "out")
    with pytest.raises(UserError, match="--replace") as error:
        run(**OTHERS[what])
    assert "\n" not in str(error.value)
    assert state(tmp_path / "out") == before
    assert left_in(tmp_path) == ["out"]
    bundle, _ = run(**OTHERS[what], replace=True)
    assert state(tmp_path / "out") != before
    assert Bundle.load(tmp_path / "out", hashes=True).manifest == bundle.manifest
    assert left_in(tmp_path) == ["out"]
    _, again = run(**OTHERS[what])
    assert "is done already" in again.notes[0]


def test_replace_of_the_same_inputs_changes_nothing(run: Run, cheap: Any, tmp_path: Path) -> None:
    """--replace replaces a bundle of other inputs; one that is right already stays."""
    run()
    before = state(tmp_path / "out")
    _, again = run(replace=True)
    assert again.started == ["hash the weight files"]
    assert state(tmp_path / "out") == before


@pytest.mark.parametrize("weights", ["base", "lora", "config"])
def test_changed_source_files_are_seen(weights: str, run: Run, cheap: Any, tiny_repos: Path, tmp_path: Path) -> None:
    """The same paths with other contents are other inputs."""
    base = Path(shutil.copytree(tiny_repos / SD15_REPO, tmp_path / "base"))
    lora = Path(shutil.copy(tiny_repos / HYPER_SD_REPO / f"{ONE}.safetensors", tmp_path / "lora.safetensors"))
    run(base=str(base), lora=str(lora))
    if weights == "config":
        path = base / "vae/config.json"
        path.write_text(path.read_text().replace("0.18215", "0.5"))
    else:
        path = lora if weights == "lora" else base / "unet/diffusion_pytorch_model.safetensors"
        tensors = load_file(path)
        name = next(name for name in sorted(tensors) if name.endswith("conv1.weight") or "lora_up" in name)
        tensors[name] = tensors[name] + 1
        save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="--replace"):
        run(base=str(base), lora=str(lora))


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_other_folders_and_files_are_not_touched(
    kind: str, replace: bool, run: Run, cheap: Any, tmp_path: Path
) -> None:
    """A folder with someone's files, or a file: refused in one line, --replace or not, and left as it was."""
    out = tmp_path / "out"
    if kind == "folder":
        (out / "holidays").mkdir(parents=True)
        (out / "holidays/image.png").write_bytes(b"precious")
    else:
        out.write_bytes(b"precious")
    before = state(tmp_path)
    with pytest.raises(UserError, match="is not a bundle: choose another --out") as error:
        run(replace=replace)
    assert "\n" not in str(error.value)
    after = state(tmp_path)
    assert {name: after[name] for name in before if name != "."} == {n: s for n, s in before.items() if n != "."}
    assert left_in(tmp_path) == ["out"]


def test_an_empty_folder_may_be_the_output(run: Run, cheap: Any, tmp_path: Path) -> None:
    """mkdir out; export --out out."""
    (tmp_path / "out").mkdir()
    run()
    Bundle.load(tmp_path / "out", hashes=True)


def test_the_current_folder_may_be_the_output(
    cheap: Any, source_options: Callable[..., SourceOptions], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mkdir out; cd out; export --out . works as --out ../out does."""
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    export_bundle(ONE, ".", ExportOptions(sources=source_options(ONE), precision="fp32"))
    Bundle.load(tmp_path / "out", hashes=True)
    assert left_in(tmp_path) == ["out"]


@pytest.mark.parametrize("damage", ["shortened", "missing", "manifest"])
def test_a_damaged_bundle_is_not_taken_for_done(damage: str, run: Run, cheap: Any, tmp_path: Path) -> None:
    """It is refused with the reason, and --replace makes it anew."""
    run()
    if damage == "manifest":
        (tmp_path / "out/bundle.json").write_text("{")
    else:
        path = tmp_path / "out/unet/model.onnx"
        path.unlink() if damage == "missing" else path.write_bytes(b"x")
    with pytest.raises(UserError) as error:
        run()
    assert "\n" not in str(error.value)
    run(replace=True)
    Bundle.load(tmp_path / "out", hashes=True)


def test_the_default_output_is_named_after_the_checkpoint(
    cheap: Any, source_options: Callable[..., SourceOptions], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bundles/NAME in the current folder, with the table's spelling."""
    monkeypatch.chdir(tmp_path)
    export_bundle(ONE.lower(), None, ExportOptions(sources=source_options(ONE), precision="fp32"))
    Bundle.load(tmp_path / "bundles" / ONE, hashes=True)


# --- reuse -----------------------------------------------------------------------------------------------------------


def test_components_of_a_neighbour_are_linked(run: Run, cheap: Any, tmp_path: Path) -> None:
    """Beside another checkpoint of the same base only the UNet differs: the rest is linked, with a message."""
    run(ONE, "one")
    _, second = run(TWO, "two")
    assert second.traced == ["unet"]
    assert [note.split()[0] for note in second.notes] == PARTS[:3]
    for name in PARTS:
        pairs = [tmp_path / bundle / name / "model.onnx_data" for bundle in ("one", "two")]
        assert os.path.samefile(*pairs) == (name != "unet")
    Bundle.load(tmp_path / "two", hashes=True)


def test_a_bundle_for_text_alone_lacks_one_component(run: Run, cheap: Any, tmp_path: Path) -> None:
    """With --text-only the rest is that of a whole bundle; one does not pass for the other."""
    whole, _ = run(out="whole")
    bundle, second = run(out="text", text_only=True)
    assert second.traced == []
    assert set(whole.manifest.components) - set(bundle.manifest.components) == {"vae_encoder"}
    assert not (bundle.root / "vae_encoder").exists()
    with pytest.raises(UserError, match="--replace"):
        run(out="text")
    replaced, third = run(out="text", replace=True)
    assert third.traced == []
    assert replaced.manifest == whole.manifest


def test_an_interrupted_export_takes_components_of_a_neighbour(run: Run, cheap: Any, tmp_path: Path) -> None:
    """Reuse and resume together: a half-finished bundle is completed with components of its neighbour."""

    def fail(name: str) -> None:
        if name == "vae_decoder":
            raise KeyboardInterrupt

    cheap(fail)
    with pytest.raises(KeyboardInterrupt):
        run(TWO, "two")
    cheap(lambda name: None)
    run(ONE, "one")
    _, again = run(TWO, "two")
    assert again.traced == ["unet"]
    Bundle.load(tmp_path / "two", hashes=True)


def _other_text_weights(base: Path) -> None:
    path = base / "text_encoder/model.safetensors"
    tensors = {name: tensor + 0.5 for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def _other_text_config(base: Path) -> None:
    path = base / "text_encoder/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": "gelu"}))


NOT_REUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "precision": ({"precision": "fp16"}, PARTS),
    "batch": ({"shapes": ShapeOptions(batch=2)}, PARTS),
    "height": ({"shapes": ShapeOptions(height=72)}, ["vae_encoder", "vae_decoder", "unet"]),
    "range": ({"shapes": ShapeOptions(dynamic={"width": (64, 64, 128)})}, ["vae_encoder", "vae_decoder", "unet"]),
    "lora scale": ({"lora_scale": 0.5}, ["unet"]),
    "lora": ({"name": TWO}, ["unet"]),
    "guidance": ({"name": "Hyper-SD15-8steps-CFG-lora"}, ["unet"]),
}


@pytest.mark.parametrize("what", NOT_REUSED)
def test_components_of_other_inputs_are_not_reused(what: str, run: Run, cheap: Any) -> None:
    """Only the components that depend on the difference are made again."""
    changes, remade = NOT_REUSED[what]
    first, _ = run(out="first")
    bundle, second = run(out="second", **changes)
    assert second.traced == remade
    pairs = {name: (first.manifest.components[name], bundle.manifest.components[name]) for name in remade}
    differs = {one.graph != other.graph for one, other in pairs.values()}
    assert differs == {"lora" not in what}, "a LoRA changes weights alone"


@pytest.mark.parametrize("change", [_other_text_weights, _other_text_config], ids=["weights", "configuration"])
def test_other_contents_are_not_reused(
    change: Callable[[Path], None], run: Run, cheap: Any, tiny_repos: Path, tmp_path: Path
) -> None:
    """Weights and configurations count by content, not by path: a changed text encoder is made again, and only that."""
    base = Path(shutil.copytree(tiny_repos / SD15_REPO, tmp_path / "models/base"))
    run(out="first", base=str(base))
    change(base)
    _, second = run(out="second", base=str(base))
    assert second.traced == ["text_encoder"]
    _, elsewhere = run(out="third", base=str(shutil.copytree(base, tmp_path / "models/moved")))
    assert elsewhere.traced == []


def test_other_tools_are_not_reused(run: Run, cheap: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version of torch may make another graph: everything is made again."""
    run(out="first")
    versions = tool_versions() | {"torch": "99.0"}
    monkeypatch.setattr("hypersd.export.component_exports.tool_versions", lambda: versions)
    monkeypatch.setattr("hypersd.export.exporter.tool_versions", lambda: versions)
    with pytest.raises(UserError, match="--replace"):
        run(out="first")
    _, second = run(out="second")
    assert second.traced == PARTS


def test_the_unets_key_holds_its_latent_size(tiny_repos: Path, tmp_path: Path, source_options: Any) -> None:
    """A VAE with another number of levels makes other latents of the same image: the UNet's graph is another one."""
    base = Path(shutil.copytree(tiny_repos / SD15_REPO, tmp_path / "base"))
    keys = []
    for _ in range(2):
        sources = find_sources(find_checkpoint(ONE), source_options(ONE, base=str(base)), "fp32")
        records = {name: tuple(f.record() for f in files) for name, files in sources.weights.items()}
        shapes = image_shapes(ShapeOptions(height=64, width=64), 64)
        exports = component_exports(find_checkpoint(ONE), sources, records, shapes, "fp32")
        keys.append(next(export.key for export in exports if export.name == "unet"))
        config = base / "vae/config.json"
        values = json.loads(config.read_text())
        for name in ("block_out_channels", "up_block_types", "down_block_types"):
            values[name] = values[name][:3]
        config.write_text(json.dumps(values))
    assert keys[0] != keys[1]


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


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """``mount(kilobytes)``: a file system of that size."""
    disks: list[Path] = []

    def make(kilobytes: int) -> Path:
        disk = tmp_path / f"disk{len(disks)}"
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(disk)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mounting a tmpfs is not permitted here: {done.stderr.strip()}")
        disks.append(disk)
        return disk

    yield make
    for disk in disks:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("kilobytes", [96, 360])
def test_the_disk_fills_up_for_real(
    kilobytes: int, mount: Callable[[int], Path], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real tracing onto a tmpfs that fills up at the first or the second component: one line, and nothing is left."""
    disk = mount(kilobytes)
    monkeypatch.setattr("hypersd.export.exporter.check_space", lambda *_: None)
    with pytest.raises(DiskFullError) as error:
        run(out=f"{disk.name}/out")
    message = str(error.value)
    assert "\n" not in message
    assert str(disk) in message
    assert "--out" in message
    assert left_in(disk) == []


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


# --- the manifest ----------------------------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("which", ["sd15_bundle", "sdxl_bundle"])
def test_every_file_is_recorded_and_harmless(which: str, request: pytest.FixtureRequest) -> None:
    """The manifest lists every file with its size and hash; none is executable, pickled or of an unknown kind."""
    root = request.getfixturevalue(which)
    files = Bundle.load(root).manifest.files
    there = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if not path.is_dir()}
    assert there.keys() - {"bundle.json"} == files.keys()
    for name, record in files.items():
        assert (record.size, record.sha256) == (there[name].stat().st_size, sha256(there[name]))
    for name, path in there.items():
        assert path.suffix in (".onnx", ".onnx_data", ".json"), name
        assert not path.is_symlink()
        assert path.stat().st_mode & 0o111 == 0
        # Pickle's protocols 2 to 5: a float32 may begin with 0x80 by chance.
        pickles = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
        assert not path.read_bytes().startswith((*pickles, b"PK", b"\x7fELF", b"#!"))


@pytest.mark.parametrize("which", ["sd15_bundle", "sdxl_bundle"])
def test_sources_are_recorded(which: str, request: pytest.FixtureRequest, tiny_repos: Path) -> None:
    """Size, hash and place of every weight file that went in, and nothing else."""
    manifest = Bundle.load(request.getfixturevalue(which)).manifest
    is_sdxl = manifest.family == "sdxl"
    base = tiny_repos / (SDXL_REPO if is_sdxl else SD15_REPO)
    expected = {
        "text_encoder": base / "text_encoder/model.safetensors",
        "unet": base / "unet/diffusion_pytorch_model.safetensors",
        "vae": base / "vae/diffusion_pytorch_model.safetensors",
        "lora": tiny_repos / HYPER_SD_REPO / f"{manifest.checkpoint}.safetensors",
    }
    if is_sdxl:
        expected["text_encoder_2"] = base / "text_encoder_2/model.safetensors"
    assert manifest.origin.weights.keys() == expected.keys()
    for name, path in expected.items():
        (record,) = manifest.origin.weights[name]
        assert (record.size, record.sha256) == (path.stat().st_size, sha256(path))
        assert record.path == str(path.resolve())
        assert record.repo is None
    assert manifest.origin.base == str(base.resolve())
    assert manifest.origin.lora_scale == 1.0


@pytest.mark.parametrize("which", ["sd15_bundle", "sdxl_bundle"])
def test_versions_are_recorded(which: str, request: pytest.FixtureRequest) -> None:
    """The versions of the packages that wrote the bundle, as the packages themselves say."""
    import diffusers
    import onnx
    import onnxruntime
    import onnxscript
    import transformers

    import hypersd

    libraries = (torch, diffusers, transformers, onnx, onnxscript, onnxruntime, hypersd)
    expected = {library.__name__: library.__version__.split("+")[0] for library in libraries}
    versions = Bundle.load(request.getfixturevalue(which)).manifest.versions
    assert {name: version.split("+")[0] for name, version in versions.items()} == expected


SCHEDULERS = {"tcd": "TCDScheduler", "ddim": "DDIMScheduler", "lcm": "LCMScheduler"}


@pytest.mark.parametrize("name", [ONE, TWO, "Hyper-SDXL-1step-lora", "Hyper-SDXL-4steps-lora", UNET])
def test_scheduler_constants_are_diffusers(name: str, run: Run, cheap: Any, tiny_repos: Path) -> None:
    """Every constant is what diffusers' from_config makes of the base's scheduler, as the model card calls it."""
    import diffusers

    entry = find_checkpoint(name)
    manifest = run(name)[0].manifest
    config = json.loads((tiny_repos / entry.base / "scheduler/scheduler_config.json").read_text())
    more = {"timestep_spacing": "trailing"} if entry.sampler == "ddim" else {}
    theirs = getattr(diffusers, SCHEDULERS[entry.sampler]).from_config(config, **more).config
    assert {key: theirs[key] for key in manifest.scheduler} == manifest.scheduler
    known = inspect.signature(getattr(diffusers, SCHEDULERS[entry.sampler])).parameters
    left_out = known.keys() - manifest.scheduler.keys()
    assert left_out == {"sample_max_value", "dynamic_thresholding_ratio"}, "these matter to thresholding alone"
    assert manifest.scheduler["thresholding"] is False
    assert manifest.scheduler["beta_start"] == 0.00085
    assert manifest.scheduler["set_alpha_to_one"] is False
    assert manifest.sampler.kind == entry.sampler


def test_whole_unet_manifest(run: Run, cheap: Any, tiny_repos: Path) -> None:
    """No LoRA and no scale; the UNet's weights are the Hyper-SD file; steps, timesteps and sampler are the card's."""
    manifest = run(UNET)[0].manifest
    file = tiny_repos / HYPER_SD_REPO / f"{UNET}.safetensors"
    assert manifest.origin.lora_scale is None
    assert "lora" not in manifest.origin.weights
    assert [record.sha256 for record in manifest.origin.weights["unet"]] == [sha256(file)]
    settings = manifest.sampler
    assert (settings.kind, settings.allowed_steps, settings.timesteps) == ("lcm", (1,), (800,))
    assert (settings.num_inference_steps, settings.eta, settings.guidance_scale) == (1, 0.0, 0.0)


def test_lora_scale_reaches_weights_and_manifest(run: Run, cheap: Any, tmp_path: Path) -> None:
    """The option is recorded, and the fused weights differ with it."""
    manifest = run(out="full")[0].manifest
    assert manifest.origin.lora_scale == 1.0
    scaled = run(out="scaled", lora_scale=0.75)[0].manifest
    assert scaled.origin.lora_scale == 0.75
    data = [(tmp_path / name / "unet/model.onnx_data").read_bytes() for name in ("full", "scaled")]
    assert data[0] != data[1]


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        (ONE, {}, (0.18215, 8, False)),
        ("Hyper-SDXL-1step-lora", {}, (0.13025, 8, False)),
        ("Hyper-SDXL-1step-lora", {"vae": "madebyollin/sdxl-vae-fp16-fix"}, (0.13025, 8, False)),
        (ONE, {"vae": "madebyollin/taesd"}, (1.0, 8, True)),
        ("Hyper-SDXL-1step-lora", {"vae": "madebyollin/taesdxl"}, (1.0, 8, True)),
    ],
)
def test_vae_settings(
    name: str, changes: dict[str, str], expected: tuple[float, int, bool], run: Run, cheap: Any, tiny_repos: Path
) -> None:
    """The scaling factor is the VAE's own, 1 for the tiny decoders; pixels per latent are 8."""
    manifest = run(name, **{key: str(tiny_repos / value) for key, value in changes.items()})[0].manifest
    assert (manifest.vae.scaling_factor, manifest.vae.spatial, manifest.vae.tiny) == expected


def test_tokenizers_are_each_their_own(sdxl_bundle: Path, tiny_repos: Path) -> None:
    """SDXL's second tokenizer pads with another token: both files give transformers' tokens, 77 of them."""
    from tokenizers import Tokenizer
    from transformers import CLIPTokenizer

    for name in ("tokenizer", "tokenizer_2"):
        ours = Tokenizer.from_file(str(sdxl_bundle / name / "tokenizer.json"))
        theirs = CLIPTokenizer.from_pretrained(tiny_repos / SDXL_REPO / name)
        for text in ("a photo of a cat", "", "cat " * 100, "naïve 猫 🐈"):
            expected = theirs(text, padding="max_length", max_length=77, truncation=True).input_ids
            assert ours.encode(text).ids == expected
    pads = [Tokenizer.from_file(str(sdxl_bundle / n / "tokenizer.json")).encode("").ids[-1]
            for n in ("tokenizer", "tokenizer_2")]  # fmt: skip
    assert pads[0] != pads[1]
