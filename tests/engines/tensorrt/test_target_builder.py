"""Building engines, for real and without a GPU: each plan is built once, recorded when it is whole, and never stale."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from hypersd import Pipeline
from hypersd.engines import BuildOptions, Bundle, build_engines
from hypersd.engines.bundle import write_manifest
from hypersd.engines.files import sha256_file
from hypersd.engines.image_shapes import narrowed
from hypersd.engines.manifest import FileRecord
from hypersd.engines.progress import Silent
from hypersd.engines.specs import EngineTarget, Plan
from hypersd.engines.tensorrt import target_builder as module
from hypersd.engines.tensorrt.api import TensorRTApi, load_api
from hypersd.engines.tensorrt.build_options import check_options, choose_backend
from hypersd.engines.tensorrt.machine import this_machine
from hypersd.engines.tensorrt.target_builder import remove_target
from hypersd.engines.tensorrt.targets import onnx_hash, plan_key, target_name, this_platform
from hypersd.errors import BundleError, DeviceError, DiskFullError, HyperSDError, RequestError, UserError
from hypersd.export import ExportOptions, export_bundle

from .made_by_hand import gpu, machine, refusal, shapes

pytest.importorskip("tensorrt_rtx")
NETWORKS = {"text_encoder", "vae_encoder", "vae_decoder", "unet"}
needs_no_gpu = pytest.mark.skipif(this_machine().gpu is not None, reason="this machine has a GPU")


class Watched(Silent):
    """Keeps what a build tells."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.notes: list[str] = []

    def start(self, stage: str) -> None:
        self.stages.append(stage)

    def note(self, text: str) -> None:
        self.notes.append(text)

    @property
    def built(self) -> set[str]:
        """The networks whose engines were built, not taken from elsewhere."""
        return {stage.split(":")[0] for stage in self.stages if stage.endswith("build engine")}


def build(root: Path | Bundle, **options: Any) -> tuple[Bundle, Watched]:
    watched = Watched()
    return build_engines(root, "tensorrt-rtx", BuildOptions(**options), watched), watched


def plans(bundle: Bundle) -> dict[str, Plan]:
    """The plans of the bundle's one target."""
    (target,) = bundle.manifest.engines.values()
    return dict(target.plans)


def copy(source: Path, to: Path) -> Path:
    return Path(shutil.copytree(source, to))


def without_engines(source: Path, to: Path) -> Path:
    """A copy as it was exported."""
    bundle = Bundle.load(source)
    shutil.copytree(source, to, ignore=shutil.ignore_patterns("engines"))
    files = {name: record for name, record in bundle.manifest.files.items() if name not in bundle.plan_files()}
    write_manifest(to, msgspec.structs.replace(bundle.manifest, engines={}, files=files))
    return to


@pytest.fixture
def built(rtx_bundle: Path, tmp_path: Path) -> Path:
    """A bundle with engines of this test's own."""
    return copy(rtx_bundle, tmp_path / "bundles" / "built")


@pytest.fixture
def bare(rtx_bundle: Path, tmp_path: Path) -> Path:
    """The same without engines, in another folder."""
    return without_engines(rtx_bundle, tmp_path / "elsewhere" / "bare")


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test that starts a building process."""

    def start(*_: Any, **__: Any) -> None:
        raise AssertionError("a build was started")

    monkeypatch.setattr(module, "run_build", start)


def leftovers(root: Path) -> list[Path]:
    """Files that nobody should see."""
    return [path for path in root.rglob(".*") if path.is_file()]


# Plans that are built


def assert_complete(bundle: Bundle, target: EngineTarget) -> None:
    """Every network has a plan, whose record is that of its file and of what it was made from."""
    components = narrowed(bundle.manifest, target.shapes).components
    assert target.plans.keys() == components.keys()
    for name, plan in target.plans.items():
        path, record = bundle.path(plan.file), bundle.manifest.files[plan.file]
        assert (path.stat().st_size, sha256_file(path)) == (record.size, record.sha256)
        assert plan.onnx == onnx_hash(bundle.manifest, name)
        assert plan.key == plan_key(target, components[name], plan.onnx)
        assert plan.file == f"engines/{target_name(target, bundle.manifest)}/{name}.engine"
        assert 0 < plan.seconds < 600
        assert 50e6 < plan.host_memory < 50e9
        assert plan.weights_memory is not None
        assert plan.activation_memory is not None
        weights = sum(bundle.manifest.files[file].size for file in components[name].files)
        assert 0 < plan.weights_memory < 2 * weights
        assert 0 < plan.activation_memory < 1e9
        assert (plan.error is None) == (this_machine().gpu is None)
    assert leftovers(bundle.root) == []


def test_every_network_gets_a_plan_and_a_record(rtx_bundle: Path) -> None:
    """The built bundle is read back from the disk, and every hash is checked."""
    bundle = Bundle.load(rtx_bundle, hashes=True)
    (target,) = bundle.manifest.engines.values()
    assert_complete(bundle, target)
    api = load_api("tensorrt-rtx")
    assert (target.backend, target.version, target.platform) == (
        "tensorrt-rtx",
        api.version,
        this_platform("tensorrt-rtx"),
    )
    assert (target.compute_capabilities, target.precision, target.shapes) == ((), "fp16", bundle.manifest.shapes)
    assert set(target.plans) == NETWORKS


def test_a_bundle_with_engines_generates_as_before(rtx_bundle: Path, bare: Path) -> None:
    """On ONNX Runtime, to the bit."""
    with_engines, without = (
        Pipeline.load(root, backend="onnxruntime", device="cpu")("a cat", seed=0, output_type="np").images
        for root in (rtx_bundle, bare)
    )
    assert np.array_equal(with_engines, without)
    assert without.std() > 0


def test_a_second_build_does_nothing(built: Path, no_process: None) -> None:
    """No file is touched, and it says so; also for a caller whose bundle was opened before the first build."""
    before = {path: path.stat() for path in built.rglob("*")}
    opened = Bundle.load(built)
    stale = Bundle(built, msgspec.structs.replace(opened.manifest, engines={}))
    for bundle in (built, stale):
        again, watched = build(bundle)
        assert again.manifest == opened.manifest
        assert any("there already" in note for note in watched.notes)
    after = {path: path.stat() for path in built.rglob("*")}
    assert {p: (s.st_ino, s.st_mtime_ns) for p, s in after.items()} == {
        p: (s.st_ino, s.st_mtime_ns) for p, s in before.items()
    }


@pytest.mark.parametrize("damage", ["deleted", "shortened", "altered"])
def test_a_damaged_plan_is_built_again_and_no_other(damage: str, built: Path) -> None:
    """One flipped bit counts: TensorRT would crash on it, or generate another image."""
    before = plans(Bundle.load(built))
    path = built / before["text_encoder"].file
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage != "deleted":
        content[len(content) // 2] ^= 1
        path.write_bytes(content if damage == "altered" else content[:-1])
    bundle, watched = build(built)
    assert watched.built == {"text_encoder"}
    after = plans(Bundle.load(built, hashes=True))
    assert {name: plan for name, plan in after.items() if name != "text_encoder"} == {
        name: plan for name, plan in before.items() if name != "text_encoder"
    }
    assert_complete(bundle, next(iter(bundle.manifest.engines.values())))


def test_other_options_make_another_target(built: Path) -> None:
    """Engines that took minutes are not replaced because somebody tries another level."""
    before = Bundle.load(built)
    bundle, watched = build(built, optimization_level=0)
    assert watched.built == NETWORKS
    (new,) = bundle.manifest.engines.keys() - before.manifest.engines.keys()
    assert bundle.manifest.engines[new].optimization_level == 0
    loaded = Bundle.load(built, hashes=True)
    for target in loaded.manifest.engines.values():
        assert_complete(loaded, target)


def test_what_a_target_says_of_itself_is_put_right(built: Path, no_process: None) -> None:
    """Changed by hand; the plans are what their keys say, and so is the target's name."""
    bundle = Bundle.load(built)
    ((name, target),) = bundle.manifest.engines.items()
    wrong = {name: msgspec.structs.replace(target, precision="fp32")}
    write_manifest(built, msgspec.structs.replace(bundle.manifest, engines=wrong))
    build(built)
    assert Bundle.load(built).manifest == bundle.manifest


# Deleted


def test_a_target_is_deleted_with_all_that_is_in_its_folder(built: Path) -> None:
    """Compiled kernels lie beside the plans and go with them. The bundle is as it was before."""
    ((name, target),) = Bundle.load(built).manifest.engines.items()
    (built / target.plans["unet"].file).with_suffix(".sm89.cache").write_bytes(b"kernels")
    with pytest.raises(RequestError, match=f"no engines 'other'.*{name}"):
        remove_target(Bundle.load(built), "other")
    bundle = remove_target(Bundle.load(built), name)
    assert bundle.manifest == Bundle.load(built, hashes=True).manifest
    assert (bundle.manifest.engines, bundle.plan_files()) == ({}, set())
    assert list((built / "engines").iterdir()) == []


# Taken from elsewhere


def test_what_calls_itself_a_plan_is_looked_at(built: Path, bare: Path) -> None:
    """A bundle beside ours says that a file is the plan that we want: it is checked as one that we built."""
    beside = Path(shutil.move(bare, built.parent / "second"))
    other = Bundle.load(built)
    plan = plans(other)["unet"]
    (built / plan.file).write_bytes(b"not a plan at all")
    record = FileRecord(size=17, sha256=sha256_file(built / plan.file))
    write_manifest(built, msgspec.structs.replace(other.manifest, files={**other.manifest.files, plan.file: record}))
    bundle, watched = build(beside)
    assert watched.built == {"unet"}
    assert bundle.manifest.files[plans(bundle)["unet"].file].size > 1000


def test_a_folder_of_engines_that_is_elsewhere_is_rejected(built: Path, tmp_path: Path) -> None:
    """A link to a larger disk: the plans would be built, and not be found again."""
    shutil.move(built / "engines", tmp_path / "larger-disk")
    (built / "engines").symlink_to(tmp_path / "larger-disk")
    with pytest.raises(BundleError, match="leads out of the bundle"):
        build(built)


def test_plans_of_a_bundle_beside_it_are_linked(built: Path, bare: Path, no_process: None) -> None:
    """Made from the same inputs: no second build, no second copy on the disk."""
    beside = Path(shutil.move(bare, built.parent / "second"))
    bundle, watched = build(beside)
    assert watched.built == set()
    assert sum(str(built) in note for note in watched.notes) == len(NETWORKS)
    assert_complete(Bundle.load(beside, hashes=True), next(iter(bundle.manifest.engines.values())))
    for name, plan in plans(bundle).items():
        assert (beside / plan.file).samefile(built / plans(Bundle.load(built))[name].file)


def test_an_altered_plan_beside_it_is_not_taken(built: Path, bare: Path) -> None:
    """Its hash is looked at; the other plans of that bundle are taken."""
    beside = Path(shutil.move(bare, built.parent / "second"))
    with (built / plans(Bundle.load(built))["text_encoder"].file).open("r+b") as file:
        file.seek(1000)
        file.write(b"\0altered\0")
    _, watched = build(beside)
    assert watched.built == {"text_encoder"}
    Bundle.load(beside, hashes=True)


def test_capabilities_make_a_target_of_their_own(built: Path) -> None:
    """Beside the portable one, which is left as it is; named in order, each once."""
    before = Bundle.load(built).manifest.engines
    bundle, watched = build(built, compute_capabilities=("8.9", "8.6", "8.9"))
    assert watched.built == NETWORKS
    assert len(bundle.manifest.engines) == 2
    assert before.items() <= bundle.manifest.engines.items()
    (target,) = [t for name, t in bundle.manifest.engines.items() if name not in before]
    assert target.compute_capabilities == ("8.6", "8.9")
    assert_complete(Bundle.load(built, hashes=True), target)
    again, watched = build(built, compute_capabilities=("8.6", "8.9"))
    assert watched.built == set()
    assert again.manifest == bundle.manifest


def test_fp32_builds(sd15_bundle: Path, tmp_path: Path) -> None:
    """A float32 bundle gives float32 engines."""
    bundle, _ = build(copy(sd15_bundle, tmp_path / "fp32"))
    (target,) = bundle.manifest.engines.values()
    assert target.precision == "fp32"
    assert_complete(bundle, target)


def test_a_bundle_of_ranges_and_parts_of_it(sd15_tiny_vae_bundle: Path, tmp_path: Path) -> None:
    """The whole range, and two sizes that share the text encoder."""
    root = copy(sd15_tiny_vae_bundle, tmp_path / "ranged")
    build(root)
    build(root, shapes=shapes(1, 64, 64))
    bundle, watched = build(root, shapes=shapes(1, 96, 64))
    assert watched.built == {"unet", "vae_decoder"}
    whole, small, large = bundle.manifest.engines.values()
    for target in (whole, small, large):
        assert_complete(Bundle.load(root, hashes=True), target)
    assert whole.shapes == bundle.manifest.shapes
    for name in whole.plans:
        shared = (root / small.plans[name].file).samefile(root / large.plans[name].file)
        assert shared == name.startswith("text_encoder")
        assert not (root / small.plans[name].file).samefile(root / whole.plans[name].file)
    assert refusal(RequestError, lambda: build(root, shapes=shapes(1, 64, 128)))


# Interrupted


class Impatient(Watched):
    """Presses Ctrl-C while a network is built."""

    def __init__(self, network: str) -> None:
        super().__init__()
        self.network = network

    def update(self, fraction: float, detail: str) -> None:
        if self.stages[-1].startswith(self.network):
            raise KeyboardInterrupt


def test_an_interrupted_build_goes_on_where_it_was(built: Path) -> None:
    """Finished plans are recorded, nothing else is left, and the bundle can be opened even with damaged plans."""
    damaged = plans(Bundle.load(built))
    (built / damaged["text_encoder"].file).unlink()
    os.truncate(built / damaged["unet"].file, 1000)
    with pytest.raises(KeyboardInterrupt):
        build_engines(built, "tensorrt-rtx", BuildOptions(), Impatient("unet"))
    assert leftovers(built) == []
    halfway = Bundle.load(built)
    assert plans(halfway).keys() == NETWORKS - {"unet"}
    Bundle.load(built, hashes=True)
    bundle, watched = build(built)
    assert watched.built == {"unet"}
    assert_complete(bundle, next(iter(bundle.manifest.engines.values())))


def test_a_first_build_that_was_interrupted_leaves_a_bundle(bare: Path) -> None:
    """As it was exported; what a killed build left is swept away by the next one."""
    with pytest.raises(KeyboardInterrupt):
        build_engines(bare, "tensorrt-rtx", BuildOptions(), Impatient("text_encoder"))
    assert leftovers(bare) == []
    assert Bundle.load(bare, hashes=True).manifest.engines == {}
    (folder,) = (bare / "engines").iterdir()
    (folder / ".text_encoder.engine.partial").write_bytes(b"half")
    with pytest.raises(KeyboardInterrupt):
        build_engines(bare, "tensorrt-rtx", BuildOptions(), Impatient("vae_encoder"))
    assert leftovers(bare) == []
    assert plans(Bundle.load(bare, hashes=True)).keys() == {"text_encoder"}


def test_a_build_waits_for_another_process(built: Path, no_process: None) -> None:
    """It says so, and goes on once the other one is done. A link to the bundle is the same bundle."""
    program = f"""if True:
        import sys
        from pathlib import Path
        from hypersd.engines.files import lock_file
        with lock_file(Path({str(built)!r}), lambda: None):
            print("locked", flush=True)
            sys.stdin.read()
    """
    alias = built.parent.parent / "alias"
    alias.symlink_to(built, target_is_directory=True)
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"

        class Waiting(Watched):
            def note(self, text: str) -> None:
                super().note(text)
                if "waiting" in text:
                    other.stdin.close()  # type: ignore[union-attr]

        watched = Waiting()
        build_engines(alias, "tensorrt-rtx", None, watched)
    assert "waiting for another build" in watched.notes[0]
    assert "there already" in watched.notes[1]


# Plans that are not built


def test_an_onnx_file_that_changed_since_the_export_is_not_built(built: Path, no_process: None) -> None:
    """The plan would be recorded as built from the file that it was not built from."""
    path = built / "unet/model.onnx_data"
    with path.open("r+b") as file:
        file.seek(100)
        file.write(b"\0altered\0")
    expected = Bundle.load(built).manifest.files["unet/model.onnx_data"].sha256
    (built / plans(Bundle.load(built))["unet"].file).unlink()
    message = refusal(BundleError, lambda: build(built))
    assert "unet/model.onnx_data" in message
    assert expected[:12] in message
    assert sha256_file(path)[:12] in message
    assert leftovers(built) == []


def test_only_what_is_built_is_read(built: Path) -> None:
    """Hashing takes seconds a gigabyte: the networks that have their plans are left alone."""
    with (built / "unet/model.onnx_data").open("r+b") as file:
        file.write(b"\0altered\0")
    (built / plans(Bundle.load(built))["text_encoder"].file).unlink()
    _, watched = build(built)
    assert watched.built == {"text_encoder"}


REFUSED: dict[str, tuple[dict[str, Any], type[HyperSDError], list[str]]] = {
    "level": ({"optimization_level": 6}, RequestError, ["6", "0 to 5"]),
    "negative level": ({"optimization_level": -1}, RequestError, ["-1", "0 to 5"]),
    "capability": ({"compute_capabilities": ("8.9", "1.0")}, RequestError, ["'1.0'", "8.6", "12.0"]),
    "no capability": ({"compute_capabilities": ("ampere",)}, RequestError, ["'ampere'"]),
    "size": ({"shapes": shapes(1, 64, 72)}, RequestError, ["width 72", "64"]),
    "batch": ({"shapes": shapes((1, 1, 2), 64, 64)}, RequestError, ["batch 2", "1"]),
}


@pytest.mark.parametrize(("options", "kind", "parts"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_built_is_rejected_before_it_is_begun(
    options: dict[str, Any], kind: type[HyperSDError], parts: list[str], bare: Path, no_process: None
) -> None:
    """With what was asked for and what there is."""
    before = sorted(bare.rglob("*"))
    message = refusal(kind, lambda: build(bare, **options))
    assert [part for part in parts if part not in message] == []
    assert sorted(bare.rglob("*")) == before


def test_backends_that_are_none_or_not_here(rtx_bundle: Path, tmp_path: Path, no_process: None) -> None:
    """A misspelt one names those there are; one that is not installed says how to install it."""
    message = refusal(RequestError, lambda: build_engines(rtx_bundle, "onnxruntime"))
    assert "'onnxruntime'" in message
    assert "auto, tensorrt or tensorrt-rtx" in message
    if "tensorrt" not in this_machine().versions:
        assert "pip install" in refusal(DeviceError, lambda: build_engines(rtx_bundle, "tensorrt"))
    assert "hypersd export" in refusal(BundleError, lambda: build_engines(tmp_path))


def test_auto_takes_what_can_build_here() -> None:
    """TensorRT on a GPU that it runs on, else RTX; what is missing is said with what to install."""
    both, only = {"tensorrt": "10.16", "tensorrt-rtx": "1.7"}, {"tensorrt": "10.16"}
    no_gpu: dict[str, Any] = {"gpu": None, "no_gpu": "no CUDA device: a fake"}
    assert choose_backend("auto", machine(versions=both)) == "tensorrt"
    assert choose_backend("auto", machine(versions=both, driver_cuda=(12, 0))) == "tensorrt-rtx"
    assert choose_backend("auto", machine(versions=both, **no_gpu)) == "tensorrt-rtx"
    message = refusal(DeviceError, lambda: choose_backend("auto", machine(versions=only, **no_gpu)))
    assert "a fake" in message
    assert "pip install -e '.[tensorrt-rtx]'" in message
    assert "pip install" in refusal(DeviceError, lambda: choose_backend("auto", machine(versions={}, **no_gpu)))
    assert choose_backend("tensorrt", machine(versions={})) == "tensorrt", "asked for: loading it says what is missing"


def test_tensorrt_builds_for_its_own_gpu_alone() -> None:
    """The backend that takes no compute capability, as far as a stand-in shows it."""
    api = TensorRTApi("tensorrt", types.SimpleNamespace(__version__="10.16.1.11"))
    check_options(api, BuildOptions(stripped=True), machine(gpu=gpu()), "int8")
    asked = BuildOptions(compute_capabilities=("8.9",))
    assert "this machine's GPU only" in refusal(RequestError, lambda: check_options(api, asked, machine(), "fp16"))
    no_gpu = machine(gpu=None, no_gpu="no CUDA device: a fake")
    assert "a fake" in refusal(DeviceError, lambda: check_options(api, BuildOptions(), no_gpu, "fp16"))


def test_rtx_leaves_no_weights_of_8_bits_out() -> None:
    """Its plan would be called one without weights and have most of them."""
    api = TensorRTApi("tensorrt-rtx", types.SimpleNamespace(__version__="1.7.1.116"))
    check_options(api, BuildOptions(stripped=True), machine(), "fp16")
    check_options(api, BuildOptions(), machine(), "int8")
    reason = refusal(RequestError, lambda: check_options(api, BuildOptions(stripped=True), machine(), "int8"))
    assert "keeps int8 weights in its plans: build them without --strip-weights" in reason


# Disks


@pytest.fixture
def small_disk(mount_disk: Callable[[str], Path]) -> Path:
    """A file system that the exported bundle fits in, and its first engines, but not all of them."""
    return mount_disk("8m")


def test_space_is_checked_beforehand(bare: Path, no_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With both numbers; engines that are there take none."""
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 40_000_000))
    message = refusal(DiskFullError, lambda: build(bare))
    assert "need about 69 MB" in message
    assert "has 40 MB free" in message
    assert not (bare / "engines").exists()


def test_a_disk_that_fills_up(bare: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For real, where the estimate was wrong: one line, exit code 2, and what was finished is kept."""
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 0, 10**12))
    root = Path(shutil.move(bare, small_disk / "bundle"))
    with pytest.raises(UserError) as caught:
        build(root)
    assert "No space left on device" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert leftovers(root) == []
    assert {"text_encoder"} <= plans(Bundle.load(root, hashes=True)).keys() < NETWORKS


def test_a_disk_that_fills_up_at_the_manifest(
    built: Path, bare: Path, no_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last bytes may be those of the record: the old one stays, and the error says what to do."""
    beside = Path(shutil.move(bare, built.parent / "second"))
    before = (beside / "bundle.json").read_bytes()
    real = Path.write_bytes

    def write(path: Path, content: bytes) -> int:
        real(path, content[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write)
    message = refusal(DiskFullError, lambda: build(beside))
    assert str(beside) in message
    assert "free some space" in message
    assert leftovers(beside) == []
    assert (beside / "bundle.json").read_bytes() == before


@pytest.mark.parametrize("read_only", ["parent", "bundle"])
def test_folders_that_cannot_be_written(
    read_only: str, bare: Path, small_disk: Path, no_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused at the lock beside the bundle, or else at the first plan."""
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 0, 10**12))
    root = Path(shutil.move(bare, small_disk / "bundle"))
    if read_only == "bundle":  # the lock beside the mount can be had
        for path in root.iterdir():
            shutil.move(path, small_disk)
        root.rmdir()
        root = small_disk
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    message = refusal(UserError, lambda: build(root))
    assert f"{root}" in message
    assert "cannot be written" in message
    Bundle.load(root, hashes=True)


# Exports of a bundle that has engines


def test_an_export_of_a_bundle_with_engines_is_done_already(built: Path, source_options: Any) -> None:
    """Built engines are no other settings: the same export again keeps them; another one drops them with the bundle."""
    name = Bundle.load(built).manifest.checkpoint
    options = ExportOptions(sources=source_options(name), precision="fp16")
    before = (built / "bundle.json").read_bytes()
    assert export_bundle(name, built, options).manifest.engines
    assert (built / "bundle.json").read_bytes() == before
    other = ExportOptions(sources=source_options(name), precision="fp16", lora_scale=0.5)
    assert "--replace" in refusal(UserError, lambda: export_bundle(name, built, other))
    assert Bundle.load(built).manifest.engines
    replaced = export_bundle(name, built, dataclasses.replace(other, replace=True))
    assert replaced.manifest.engines == {}
    assert not (built / "engines").exists()
