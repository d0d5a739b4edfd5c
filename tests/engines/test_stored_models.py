"""Stored ONNX Runtime models: the same numbers from a mapped file, and a folder that never stops a load."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import onnx
import onnxruntime as ort
import pytest
import torch
from counting import load_engines
from small_graphs import random_feeds

from hypersd.engines import Bundle, stored_models
from hypersd.engines import onnx_runtime as module
from hypersd.engines.engine import Engine
from hypersd.engines.files import link_or_copy
from hypersd.engines.onnx_runtime import OnnxRuntimeEngine
from hypersd.engines.stored_models import VARIABLE, StoredModel, StoredModelWarning, find_stored_model

IS_OLD = tuple(map(int, ort.__version__.split(".")[:2])) < (1, 24)

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for stored models; it does not exist yet."""
    folder = tmp_path / "a" / "stored"
    monkeypatch.setenv(VARIABLE, str(folder))
    return folder


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, str]]:
    """Every graph that ONNX Runtime opens: its path, and ``stored``, ``stores`` or ``plain`` for how."""
    calls, open_session = [], module._open_session

    def record(path: Path, options: ort.SessionOptions, providers: list) -> ort.InferenceSession:
        is_optimized = options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        how = "stored" if is_optimized else "stores" if options.optimized_model_filepath else "plain"
        calls.append((path, how))
        return open_session(path, options, providers)

    monkeypatch.setattr(module, "_open_session", record)
    return calls


@pytest.fixture
def unet(sd15_bundle: Path, tmp_path: Path) -> Callable[..., OnnxRuntimeEngine]:
    """``unet()`` loads a UNet from a folder of the test's own, ``bundle/unet``."""
    bundle = Bundle.load(sd15_bundle)
    shutil.copytree(sd15_bundle / "unet", tmp_path / "bundle" / "unet")

    def load(threads: int = 1) -> OnnxRuntimeEngine:
        component = bundle.component("unet")
        return OnnxRuntimeEngine("unet", tmp_path / "bundle" / component.onnx, component, CPU, threads)

    return load


def hows(opened: list[tuple[Path, str]]) -> list[str]:
    """How graphs were opened since the last call."""
    taken = [how for _, how in opened]
    opened.clear()
    return taken


def models(folder: Path) -> list[Path]:
    """The content of the folder without locks."""
    return sorted(path for path in folder.iterdir() if path.suffix != ".lock") if folder.exists() else []


def assert_same(ours: Engine, theirs: Engine, tolerance: float = 0.0) -> None:
    feeds = random_feeds(ours.inputs, seed=0)
    expected = theirs.run(feeds)
    for name, tensor in ours.run(feeds).items():
        torch.testing.assert_close(tensor, expected[name], rtol=tolerance, atol=tolerance)
        assert tensor.isfinite().all()
        assert tensor.float().std() > 0, "a constant output would prove nothing"


@pytest.fixture(autouse=True)
def no_warning() -> Any:
    """Only the tests that say so let a load go on without the folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", StoredModelWarning)
        yield


@pytest.mark.parametrize("value", [None, ""])
def test_nothing_is_stored_unless_asked_for(
    value: str | None, unet: Any, opened: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A second copy of the weights is gigabytes: not without being asked, and not beside the bundle."""
    monkeypatch.delenv(VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(VARIABLE, value)
    before = sorted(tmp_path.rglob("*"))
    unet()
    assert hows(opened) == ["plain"]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("family", ["sd15", "sdxl_dynamic"])
def test_outputs_are_equal_to_the_bit(
    family: str, request: pytest.FixtureRequest, folder: Path, opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every network in float32 and float16, fixed and ranged in shape: stored at the first load, mapped at the next."""
    bundle = Bundle.load(request.getfixturevalue(f"{family}_bundle"))
    first = load_engines(bundle, "onnxruntime", "cpu")
    first["vae_encoder"].run(random_feeds(first["vae_encoder"].inputs, 0))  # it is loaded now
    assert hows(opened).count("plain") == 0
    assert len(models(folder)) == len(first)
    second = load_engines(bundle, "onnxruntime", "cpu")
    second["vae_encoder"].run(random_feeds(first["vae_encoder"].inputs, 0))
    assert all(how == "stored" and path.is_relative_to(folder) for path, how in opened)
    monkeypatch.delenv(VARIABLE)
    for name, plain in load_engines(bundle, "onnxruntime", "cpu").items():
        assert_same(first[name], plain)
        assert_same(second[name], plain)


def test_a_stored_model_stands_alone(unet: Any, folder: Path, opened: Any, tmp_path: Path) -> None:
    """Its weights are read from its own file: none is left in, or read from, the bundle's."""
    unet()
    hows(opened)
    (stored,) = models(folder)
    assert {path.name for path in stored.iterdir()} == {"model.onnx", "model.onnx_data"}
    data = tmp_path / "bundle" / "unet" / "model.onnx_data"
    state = data.stat()
    data.write_bytes(bytes(state.st_size))
    os.utime(data, ns=(state.st_atime_ns, state.st_mtime_ns))  # as if it had not changed
    assert unet().run(random_feeds(unet().inputs, 0))["out_sample"].std() > 0
    assert {*hows(opened)} == {"stored"}


@pytest.mark.parametrize("threads", [(1, 2), (2, 1)])
def test_another_number_of_threads_takes_the_same_model(
    threads: tuple[int, int], unet: Any, folder: Path, opened: Any
) -> None:
    """Processes on one and on two cores would otherwise throw away each other's models."""
    engines = [unet(number) for number in threads]
    assert hows(opened) == ["stores", "stored", "stored"]
    assert_same(*engines, tolerance=1e-5 if IS_OLD else 0.0)  # where another number of threads rounds otherwise


# Packed weights


def test_packed_weights_are_stored(unet: Any, folder: Path) -> None:
    """They are the larger part of what a load would otherwise make."""
    unet()
    (stored,) = models(folder)
    graph = (stored / "model.onnx").read_bytes()
    assert module.PACKED.search(graph)
    assert module._packed_are_aligned(graph)


def test_packed_weights_that_are_not_aligned_are_left_out(
    sd15_bundle: Path, folder: Path, opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mapped, they end the process at the first run. These come after a mask of 5929 bytes, all in one file."""
    key = "session.optimized_model_external_initializers_min_size_in_bytes"
    monkeypatch.setitem(module.STORED_WEIGHTS, key, "1024")
    component = Bundle.load(sd15_bundle).component("text_encoder")
    source, path = sd15_bundle / component.onnx, tmp_path / "mask-first" / "model.onnx"
    model = onnx.load(str(source), load_external_data=False)
    tensors = sorted(model.graph.initializer, key=lambda tensor: tensor.data_type != onnx.TensorProto.BOOL)
    del model.graph.initializer[:]
    model.graph.initializer.extend(tensors)
    path.parent.mkdir()
    onnx.save(model, str(path))
    link_or_copy(source.with_name("model.onnx_data"), path.with_name("model.onnx_data"))
    engine = OnnxRuntimeEngine("text_encoder", path, component, CPU, 1)
    assert hows(opened) == ["stores", "stores", "stored"]
    (stored,) = models(folder)
    assert not module.PACKED.search((stored / "model.onnx").read_bytes()), "a run would end this process"
    monkeypatch.delenv(VARIABLE)
    assert_same(engine, OnnxRuntimeEngine("text_encoder", path, component, CPU, 1))


@pytest.mark.parametrize(
    ("graph", "aligned"),
    [
        (b"no packed weights", True),
        (b"prepacked_0\x12\x1fGemm+12|640;4096;0 prepacked_0\x12\x1fMatMul+3|64;1;0", True),
        (b"prepacked_0\x12\x1fGemm+12|640;4096;0 prepacked_0\x12\x1fMatMul+3|96;1;0", False),
        (b"prepacked_0\x12\x1fGemm+12|640;4096;0|4736;12;0", True),
        (b"prepacked_0\x12\x1fGemm+12|640;4096;0|4740;12;0", False),
        (b"prepacked_0\x12\x1fas another version may write it", False),
    ],
)
def test_alignment_is_read_from_the_graph(graph: bytes, aligned: bool) -> None:
    """A form that is not known counts as not aligned: slower loads, and never a crash."""
    assert module._packed_are_aligned(graph) is aligned


# Keys


def test_a_changed_network_is_stored_anew_in_the_place_of_the_old(unet: Any, folder: Path, opened: Any) -> None:
    """Content counts, and the folder does not grow: of a network the newest is kept, and nothing else is touched."""
    unet()
    (old,) = models(folder)
    others = [folder / "notes.txt", folder / f"vae_decoder{old.name.removeprefix('unet')}", folder / f"{old.name}-mine"]
    others[0].write_text("mine")
    for other in others[1:]:
        other.mkdir()
    hows(opened)
    data = folder.parent.parent / "bundle" / "unet" / "model.onnx_data"
    data.write_bytes(data.read_bytes())  # the size stays
    unet()
    assert hows(opened) == ["stores", "stored"]
    assert not old.exists()
    (new,) = {*models(folder)} - {*others}
    assert new.name.startswith("unet-")
    assert all(other.exists() for other in others)


def test_the_key_covers_everything_that_matters(
    sd15_bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All that the stored model depends on; the key is the same where nothing changed."""
    component = Bundle.load(sd15_bundle).component("unet")
    shutil.copytree(sd15_bundle / "unet", tmp_path / "unet")

    def find(runtime: str = "1.31.1") -> StoredModel:
        stored = find_stored_model(tmp_path / "unet" / "model.onnx", component, runtime, "model.onnx")
        assert stored is not None
        return stored

    first = find()
    assert find() == first
    keys = {first.key, find("1.31.2").key}
    monkeypatch.setattr(stored_models, "describe_processor", lambda: "another")
    keys.add(find().key)
    monkeypatch.undo()
    monkeypatch.setenv(VARIABLE, str(folder))
    for name in ("model.onnx", "model.onnx_data"):
        file = tmp_path / "unet" / name
        state = file.stat()
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
        keys.add(find().key)
        with file.open("ab") as appended:
            appended.write(b"\0")
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
        keys.add(find().key)
    assert len(keys) == 7
    assert find().network == first.network


def test_the_version_of_onnx_runtime_decides(
    unet: Any, folder: Path, opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version packs weights otherwise, and would read them as its own."""
    unet()
    monkeypatch.setattr(ort, "__version__", "1.99.0")
    unet()
    assert hows(opened) == ["stores", "stored"] * 2
    assert len(models(folder)) == 1


def test_processors_are_told_apart_by_what_they_can_do(tmp_path: Path) -> None:
    """Cores of one kind count once, and what changes from minute to minute not at all; other systems have a name."""
    core = "processor\t: {}\nmodel name\t: A\ncpu MHz\t\t: {}\nflags\t\t: fpu {}\n\n"
    texts = {
        "one": core.format(0, 800, "avx2"),
        "two": core.format(0, 900, "avx2") + core.format(1, 3000, "avx2"),
        "wider": core.format(0, 800, "avx2 avx512f"),
        "arm": "processor\t: 0\nFeatures\t: fp asimd\nCPU part\t: 0xd40\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    described = {name: stored_models.describe_processor(tmp_path / name) for name in [*texts, "gone"]}
    assert described["one"] == described["two"]
    assert len({*described.values()}) == 4
    assert "asimd" in described["arm"]


# Damage, and folders that cannot be used


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("damage", [cut, lambda path: path.write_bytes(b"not a model"), Path.unlink])
@pytest.mark.parametrize("name", ["model.onnx", "model.onnx_data"])
def test_a_damaged_model_is_made_again(damage: Any, name: str, unet: Any, folder: Path, opened: Any) -> None:
    """A copy that was interrupted, or someone who tidied up."""
    first = unet()
    (stored,) = models(folder)
    shutil.copytree(stored, folder.parent / "kept")
    hows(opened)
    shutil.rmtree(stored)  # the first engine has it mapped
    shutil.copytree(folder.parent / "kept", stored)
    damage(stored / name)
    second = unet()
    assert hows(opened)[-2:] == ["stores", "stored"]
    assert models(folder) == [stored]
    assert_same(second, first)
    unet()
    assert hows(opened) == ["stored"]


@pytest.mark.parametrize("place", ["under a file", "relative"])
def test_a_folder_that_cannot_be_used_is_a_warning(
    place: str, unet: Any, opened: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The load goes on, and the user learns why it was slow."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(VARIABLE, {"under a file": str(tmp_path / "file" / "stored"), "relative": "stored"}[place])
    monkeypatch.chdir(tmp_path)
    with pytest.warns(StoredModelWarning) as caught:
        unet()
    assert hows(opened) == ["plain"]
    assert [warning.filename for warning in caught] == [__file__]
    message = str(caught[0].message)
    assert message.startswith(f"{VARIABLE}: ")
    assert message.endswith("loading as without it")
    assert "\n" not in message
    assert not (tmp_path / "stored").exists()


def test_a_folder_in_the_users_home(unet: Any, opened: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """``~`` is what people write where no shell reads it: in a service's unit file."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv(VARIABLE, "~/stored")
    unet()
    assert len(models(tmp_path / "stored")) == 1


def test_a_full_disk_is_a_warning(unet: Any, opened: Any, monkeypatch: pytest.MonkeyPatch, mount_disk: Any) -> None:
    """The weights do not fit: the load goes on, and nothing is left of the half of them."""
    disk = mount_disk("1m")
    monkeypatch.setenv(VARIABLE, str(disk))
    with pytest.warns(StoredModelWarning, match="loading as without it"):
        engine = unet()
    assert hows(opened)[-1] == "plain"
    assert models(disk) == []
    monkeypatch.delenv(VARIABLE)
    assert_same(engine, unet())


def test_a_damaged_bundle_is_rejected_as_ever(
    unet: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The error is the bundle's own, and nothing is stored."""
    (tmp_path / "bundle" / "unet" / "model.onnx").write_bytes(b"not a model")
    warns = contextlib.nullcontext() if IS_OLD else pytest.warns(StoredModelWarning)  # its file is read before
    with warns, pytest.raises(module.BundleError, match=r"bundle.unet.model\.onnx cannot"):
        unet()
    assert models(folder) == []


# Several processes


def test_a_process_does_not_wait_for_another_that_stores(unet: Any, folder: Path, opened: Any) -> None:
    """It loads as without the folder: the other may take half a minute."""
    unet()
    (stored,) = models(folder)
    shutil.rmtree(stored)
    hows(opened)
    network = stored.name.rpartition("-")[0]
    with filelock.FileLock(folder / f".{network}.lock"):
        unet()
    assert hows(opened) == ["plain"]
    assert models(folder) == []
    unet()
    assert hows(opened) == ["stores", "stored"]


def test_leftovers_of_a_killed_process_are_removed(unet: Any, folder: Path, opened: Any) -> None:
    """Half a model under its temporary name: never read, and gone with the next that is stored."""
    unet()
    (stored,) = models(folder)
    left = folder / f".{stored.name.rpartition('-')[0]}-{'0' * 16}.partial"
    stored.rename(left)
    cut(left / "model.onnx_data")
    hows(opened)
    unet()
    assert hows(opened) == ["stores", "stored"]
    assert models(folder) == [stored]


PROGRAM = """if True:
    import sys
    import torch
    torch.set_num_threads(1)
    from pathlib import Path
    from hypersd.engines import Bundle
    from hypersd.engines.onnx_runtime import OnnxRuntimeEngine
    bundle = Bundle.load(sys.argv[1])
    component = bundle.component("unet")
    feeds = torch.load(sys.argv[2], weights_only=True)
    print("ready", flush=True)
    sys.stdin.readline()
    engine = OnnxRuntimeEngine("unet", bundle.path(component.onnx), component, torch.device("cpu"), 1)
    torch.save(dict(engine.run(feeds)), sys.argv[3])
"""


def test_processes_that_start_at_once_do_not_hurt_each_other(sd15_bundle: Path, folder: Path, tmp_path: Path) -> None:
    """One stores; all run, with the right numbers; one whole model is left."""
    component = Bundle.load(sd15_bundle).component("unet")
    feeds = random_feeds(component.inputs, 0)
    torch.save(feeds, tmp_path / "feeds")
    outputs = [tmp_path / f"out{i}" for i in range(3)]
    command = [
        sys.executable,
        "-W",
        "error::UserWarning:hypersd",
        "-c",
        PROGRAM,
        str(sd15_bundle),
        str(tmp_path / "feeds"),
    ]
    processes = [
        subprocess.Popen([*command, str(output)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for output in outputs
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.communicate(timeout=120)[1] is None and process.returncode for process in processes] == [0, 0, 0]
    (stored,) = models(folder)
    assert {path.name for path in stored.iterdir()} == {"model.onnx", "model.onnx_data"}
    expected = OnnxRuntimeEngine("unet", sd15_bundle / component.onnx, component, CPU, 1).run(feeds)["out_sample"]
    for output in outputs:
        assert torch.equal(torch.load(output, weights_only=True)["out_sample"], expected)
