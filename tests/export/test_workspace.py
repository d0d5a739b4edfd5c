"""Writing a bundle: whatever ends an export, and when: no bundle or a whole one, and the next run goes on."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from hypersd.engines.bundle import Bundle
from hypersd.engines.manifest import FileRecord, Manifest, Origin, SamplerSettings, VaeSettings
from hypersd.engines.specs import Component, ImageShapes, Range
from hypersd.errors import DiskFullError, ExportError, UserError
from hypersd.export.workspace import PROGRESS_NAME, Workspace, check_space

Parts = dict[str, tuple[str, bytes]]  # a component's key, and its file's content
PARTS: Parts = {"text_encoder": ("a", b"words" * 100), "unet": ("b", b"noise" * 200)}
KILLED = 77


def manifest_of(components: dict[str, Component], files: dict[str, FileRecord]) -> Manifest:
    side = {"min": 64, "opt": 64, "max": 64}
    return Manifest(
        checkpoint="Test", family="sd15", precision="fp32", opset=23,
        shapes=ImageShapes(batch=Range(name="batch", min=1, opt=1, max=1), height=Range(name="height", **side),
                             width=Range(name="width", **side)),
        sampler=SamplerSettings(kind="tcd", num_inference_steps=1, allowed_steps=(1,), eta=1.0, guidance_scale=0.0),
        scheduler={}, vae=VaeSettings(scaling_factor=1.0), force_zeros_for_empty_prompt=True, components=components,
        files=files, origin=Origin(base="x", weights={}), versions={},
    )  # fmt: skip


def hash_of(name: str) -> str:
    """Stands for the hash of a component's graph."""
    return hashlib.sha256(name.encode()).hexdigest()


def component(name: str, key: str) -> Component:
    return Component(inputs={}, outputs={}, files=(f"{name}/model.onnx",), key=key * 64, graph=hash_of(name))


def build(out: Path, parts: Parts = PARTS, replace: bool = False, made: list[str] | None = None) -> Bundle:
    """Write a bundle as the exporter does, with files in place of networks. ``made`` gets what was not there yet."""
    with Workspace.open(out, lambda: None) as workspace:
        wanted = {name: component(name, key) for name, (key, _) in parts.items()}
        done = {name: c for name, c in workspace.resume().items() if c == wanted.get(name)}
        for name, (key, content) in parts.items():
            if name in done or (workspace.reuse(name, key * 64) is not None):
                continue
            with workspace.component_folder(name) as folder:
                (folder / "model.onnx").write_bytes(content)
                workspace.finish_component(name, wanted[name])
            if made is not None:
                made.append(name)
        (workspace.root / "tokenizer").mkdir()
        (workspace.root / "tokenizer/tokenizer.json").write_bytes(b"{}")
        return workspace.publish(lambda files: manifest_of(wanted, files), replace=replace)


def assert_whole(out: Path, parts: Parts) -> None:
    """The bundle holds exactly what it should, its manifest lists exactly what it holds, and nothing lies beside it."""
    bundle = Bundle.load(out, hashes=True)
    there = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert there == {*(f"{name}/model.onnx" for name in parts), "tokenizer/tokenizer.json", "bundle.json"}
    assert bundle.manifest.files.keys() == there - {"bundle.json"}
    for name, (_, content) in parts.items():
        assert (out / name / "model.onnx").read_bytes() == content
    beside = {path.name for path in out.parent.glob(f".{out.name}.*")}
    assert beside <= {f".{out.name}.lock"}, beside


# --- kills -----------------------------------------------------------------------------------------------------------


def _die_at(count: int, half_written: bool) -> None:
    """End this process at its ``count``-th change of the file system, as kill -9 does: nothing is cleaned up."""
    left = count

    def dying(change: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*args: object, **kwargs: object) -> object:
            nonlocal left
            left -= 1
            if left == 0:
                if half_written and change.__name__ == "write_bytes":
                    content = args[1]
                    assert isinstance(content, bytes)
                    change(args[0], content[: len(content) // 2])
                os._exit(KILLED)
            return change(*args, **kwargs)

        return wrapped

    for name in ("write_bytes", "rename", "replace", "unlink", "mkdir"):
        setattr(Path, name, dying(getattr(Path, name)))
    for name in ("link", "unlink", "rmdir"):
        setattr(os, name, dying(getattr(os, name)))


def killed(action: Callable[[], object], count: int, half_written: bool) -> bool:
    """Do it in a process that dies at the ``count``-th change. False if it ended before."""
    if (child := os.fork()) == 0:
        status = 1
        try:
            _die_at(count, half_written)
            action()
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, KILLED)
    return status == KILLED


OLD: Parts = {"text_encoder": ("c", b"older" * 100), "vae": ("d", b"other" * 50)}


@pytest.mark.parametrize("half_written", [False, True], ids=["before", "in-the-middle"])
@pytest.mark.parametrize("there", ["nothing", "other bundle", "neighbour"])
def test_a_kill_at_any_moment(there: str, half_written: bool, tmp_path: Path) -> None:
    """Killed at each single change that it makes: no bundle or a whole one, and the next run makes the right one.

    With another bundle at the place (--replace) there is, besides, that one; with a neighbour that has the same
    components these are linked, and the neighbour stays as it was.
    """
    for count in range(1, 200):
        folder = tmp_path / str(count)
        out = folder / "out"
        if there == "other bundle":
            build(out, OLD)
        elif there == "neighbour":
            build(folder / "neighbour")
        replace = there == "other bundle"
        ended = not killed(lambda out=out, replace=replace: build(out, replace=replace), count, half_written)
        if out.exists():
            Bundle.load(out, hashes=True)
        build(out, replace=replace or out.exists())
        assert_whole(out, PARTS)
        if there == "neighbour":
            assert_whole(folder / "neighbour", PARTS)
        if ended:
            assert count > 10, "the changes were not seen"
            return
    pytest.fail("the export never ended")


@pytest.mark.parametrize("count", range(1, 40))
def test_finished_components_survive_a_kill(count: int, tmp_path: Path) -> None:
    """From the moment that a component is noted until the bundle is there, no kill costs the component."""
    out = tmp_path / "out"
    progress = out.parent / f".{out.name}.partial" / PROGRESS_NAME
    killed(lambda: build(out), count, half_written=False)
    noted = set()
    if progress.exists():
        noted = {name for name in PARTS if f'"{name}": {{' in progress.read_text()}
    elif (progress.parent / "unet").exists():
        noted = set(PARTS)  # the last note is gone because all was finished
    if out.exists():
        return
    made: list[str] = []
    build(out, made=made)
    assert not noted & set(made), f"{made} made again"


# --- resuming --------------------------------------------------------------------------------------------------------


class Stop(Exception):  # noqa: N818
    """Ends a run from outside."""


def _write_until(workspace: Workspace, after: int, parts: Parts, error: BaseException | type[BaseException]) -> None:
    workspace.resume()
    for i, (name, (key, content)) in enumerate(parts.items()):
        with workspace.component_folder(name) as folder:
            (folder / "model.onnx").write_bytes(content)
            if i == after:
                raise error
            workspace.finish_component(name, component(name, key))


def interrupted(out: Path, after: int, parts: Parts = PARTS, error: type[BaseException] = Stop) -> Path:
    """A run that ends with an error after ``after`` components, and its folder."""
    with pytest.raises(error), Workspace.open(out, lambda: None) as workspace:
        _write_until(workspace, after, parts, error)
    return out.parent / f".{out.name}.partial"


@pytest.mark.parametrize("error", [Stop, ExportError, UserError, KeyboardInterrupt, SystemExit, MemoryError])
def test_an_error_leaves_no_half_written_component(error: type[BaseException], tmp_path: Path) -> None:
    """After any error, Ctrl-C included, the finished component stays for the next run and the other one is gone."""
    partial = interrupted(tmp_path / "out", 1, error=error)
    assert sorted(path.name for path in partial.iterdir()) == [PROGRESS_NAME, "text_encoder"]
    assert not (tmp_path / "out").exists()
    made: list[str] = []
    build(tmp_path / "out", made=made)
    assert made == ["unet"]
    assert_whole(tmp_path / "out", PARTS)


def test_an_error_before_anything_is_finished_leaves_nothing(tmp_path: Path) -> None:
    """There is nothing to go on from, so nothing stays (but the lock's empty file)."""
    interrupted(tmp_path / "out", 0)
    assert [path.name for path in tmp_path.iterdir() if path.stat().st_size or path.is_dir()] == []


@pytest.mark.parametrize("progress", [b"", b"{", b"[]", b'{"components": 3}', b"\xff\xfe", None])
def test_a_damaged_note_starts_over(progress: bytes | None, tmp_path: Path) -> None:
    """An unreadable file is not trusted: everything is made again, and the bundle is right."""
    partial = interrupted(tmp_path / "out", 1)
    if progress is None:
        (partial / PROGRESS_NAME).unlink()
    else:
        (partial / PROGRESS_NAME).write_bytes(progress)
    made: list[str] = []
    build(tmp_path / "out", made=made)
    assert made == list(PARTS)
    assert_whole(tmp_path / "out", PARTS)


@pytest.mark.parametrize("damage", ["gone", "shorter", "altered"])
def test_a_damaged_finished_component_is_made_again(damage: str, tmp_path: Path) -> None:
    """A finished component whose file is not the one that was noted is not published under the noted hash."""
    partial = interrupted(tmp_path / "out", 1)
    file = partial / "text_encoder/model.onnx"
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1] + (b"" if damage == "shorter" else b"!"))
    build(tmp_path / "out")
    assert_whole(tmp_path / "out", PARTS)


def test_a_finished_component_of_another_key_is_made_again(tmp_path: Path) -> None:
    """The same name is not enough."""
    interrupted(tmp_path / "out", 1, {"text_encoder": ("f", b"stale"), "unet": ("g", b"x")})
    made: list[str] = []
    build(tmp_path / "out", made=made)
    assert made == list(PARTS)
    assert_whole(tmp_path / "out", PARTS)


def test_a_rejected_run_keeps_components_of_an_earlier_run(tmp_path: Path) -> None:
    """A run that is refused before it starts (another bundle is there) does not throw away hours of another one."""
    interrupted(tmp_path / "out", 1)
    with pytest.raises(UserError):
        with Workspace.open(tmp_path / "out", lambda: None):
            raise UserError("holds a bundle made from other inputs")
    made: list[str] = []
    build(tmp_path / "out", made=made)
    assert made == ["unet"]


# --- the lock --------------------------------------------------------------------------------------------------------


def test_one_at_a_time(tmp_path: Path) -> None:
    """The second of two on one output is told, waits for the first, and sees what the first has done."""
    inside, waiting, seen = threading.Event(), threading.Event(), []

    def second() -> None:
        inside.wait(10)
        with Workspace.open(tmp_path / "out", waiting.set) as workspace:
            seen.append(workspace.out.exists())

    thread = threading.Thread(target=second)
    thread.start()
    with Workspace.open(tmp_path / "out", lambda: pytest.fail("nobody was there")):
        inside.set()
        assert waiting.wait(10)
        assert not seen
        (tmp_path / "out").mkdir()
    thread.join(10)
    assert seen == [True]


def test_outputs_side_by_side_do_not_wait(tmp_path: Path) -> None:
    """The lock is the output's own."""
    with Workspace.open(tmp_path / "a", pytest.fail), Workspace.open(tmp_path / "b", pytest.fail):
        pass


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_the_lock_is_released_after_an_error(error: type[BaseException], tmp_path: Path) -> None:
    """In the same process, too."""
    interrupted(tmp_path / "out", 0, error=error)
    with Workspace.open(tmp_path / "out", pytest.fail):
        pass


def test_an_output_below_a_file(tmp_path: Path) -> None:
    """A place that cannot hold a folder is one line that names it."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"file/out, cannot be written: .*choose another folder") as error:
        build(tmp_path / "file" / "out")
    assert "\n" not in str(error.value)


def test_parents_are_made(tmp_path: Path) -> None:
    """--out a/b/c makes a and a/b."""
    build(tmp_path / "a/b/c")
    assert_whole(tmp_path / "a/b/c", PARTS)


# --- neighbours ------------------------------------------------------------------------------------------------------


def test_a_component_of_the_same_key_is_linked(tmp_path: Path) -> None:
    """No second copy on the disk: the same file under both names; what has another key is made."""
    build(tmp_path / "first")
    made: list[str] = []
    parts = {"text_encoder": PARTS["text_encoder"], "unet": ("e", b"finer" * 200)}
    build(tmp_path / "second", parts, made=made)
    assert made == ["unet"]
    assert_whole(tmp_path / "second", parts)
    assert os.path.samefile(tmp_path / "first/text_encoder/model.onnx", tmp_path / "second/text_encoder/model.onnx")
    shutil.rmtree(tmp_path / "first")
    assert_whole(tmp_path / "second", parts)


def test_a_component_of_the_same_key_under_another_name_is_not_taken(tmp_path: Path) -> None:
    """Name and key both count."""
    build(tmp_path / "first")
    made: list[str] = []
    parts = {"text_encoder_2": PARTS["text_encoder"]}
    build(tmp_path / "second", parts, made=made)
    assert made == ["text_encoder_2"]


def test_without_hard_links_it_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File systems that know no links get a copy."""
    build(tmp_path / "first")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    made: list[str] = []
    build(tmp_path / "second", made=made)
    assert made == []
    assert_whole(tmp_path / "second", PARTS)


def found_graph(out: Path, name: str) -> tuple[bytes, str] | None:
    with Workspace.open(out, lambda: None) as workspace:
        workspace.resume()
        return workspace.find_graph(hash_of(name))


def test_a_graph_is_found_in_a_neighbour_or_among_the_finished_components(tmp_path: Path) -> None:
    """Whatever its weights are: the keys differ. The name tells where the graph comes from."""
    assert found_graph(tmp_path / "out", "unet") is None
    build(tmp_path / "first", {"unet": ("c", b"graph")})
    assert found_graph(tmp_path / "out", "unet") == (b"graph", "first")
    assert found_graph(tmp_path / "out", "text_encoder") is None
    interrupted(tmp_path / "out", 1)
    assert found_graph(tmp_path / "out", "text_encoder") == (PARTS["text_encoder"][1], "text_encoder")


@pytest.mark.parametrize("damage", ["gone", "shorter", "altered", "manifest", "newer"])
def test_a_damaged_neighbour_is_not_taken(damage: str, tmp_path: Path) -> None:
    """A neighbour's file counts only if it is the one that its manifest describes: else it is made anew."""
    build(tmp_path / "first")
    file, manifest = tmp_path / "first/unet/model.onnx", tmp_path / "first/bundle.json"
    if damage == "gone":
        file.unlink()
    elif damage == "manifest":
        manifest.write_text("{")
    elif damage == "newer":
        manifest.write_text(manifest.read_text().replace('"schema_version": 5', '"schema_version": 6'))
    else:
        file.write_bytes(file.read_bytes()[:-1] + (b"" if damage == "shorter" else b"!"))
    assert found_graph(tmp_path / "second", "unet") is None
    made: list[str] = []
    build(tmp_path / "second", made=made)
    assert "unet" in made
    assert_whole(tmp_path / "second", PARTS)


# --- a full disk -----------------------------------------------------------------------------------------------------


def _enospc() -> BaseException:
    return OSError(errno.ENOSPC, "No space left on device")


def _quota() -> BaseException:
    return OSError(errno.EDQUOT, "Disk quota exceeded")


def _wrapped() -> BaseException:
    error = RuntimeError("saving failed")
    error.__cause__ = _enospc()
    return error


def _as_text() -> BaseException:
    return RuntimeError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("cause", [_enospc, _quota, _wrapped, _as_text], ids=lambda f: f.__name__)
def test_a_disk_that_fills_up(cause: Callable[[], BaseException], tmp_path: Path) -> None:
    """Every library's error becomes one line with a remedy, exit code 2, and all space is given back."""
    interrupted(tmp_path / "out", 1)
    with pytest.raises(DiskFullError) as error, Workspace.open(tmp_path / "out", lambda: None) as workspace:
        _write_until(workspace, 0, {"unet": PARTS["unet"]}, cause())
    message = str(error.value)
    assert "\n" not in message
    assert "full" in message
    assert "--out" in message
    assert error.value.exit_code == 2
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    """A refused permission stays what it is."""
    with pytest.raises(PermissionError):
        with Workspace.open(tmp_path / "out", lambda: None):
            raise PermissionError(errno.EACCES, "Permission denied")


@pytest.fixture
def small_disk(mount_disk: Callable[[str], Path]) -> Path:
    """A file system of 64 KiB, a folder in it."""
    return mount_disk("64k")


@pytest.mark.parametrize("kilobytes", range(36, 66, 2))
def test_a_small_disk(kilobytes: int, small_disk: Path) -> None:
    """For real, filling up at one write after another: the first line is DiskFullError, then nothing is left."""
    parts = {"text_encoder": ("a", b"w" * 20_000), "unet": ("b", b"n" * (1000 * (kilobytes - 20)))}
    message = None
    try:
        build(small_disk / "out", parts)
    except DiskFullError as error:
        message = str(error)
    if message is None:
        assert_whole(small_disk / "out", parts)
        assert kilobytes < 62
    else:
        assert "\n" not in message
        assert [path.name for path in small_disk.iterdir() if path.is_dir()] == []
        assert kilobytes > 36, "a bundle of this size fits"


def test_space_is_checked_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte too few is refused with both numbers, also for a folder that is not there yet; just enough is not."""
    asked = []

    def usage(path: Path) -> shutil._ntuple_diskusage:
        asked.append(path)
        return shutil._ntuple_diskusage(10**9, 0, 5_000_000)

    monkeypatch.setattr("hypersd.export.workspace.shutil.disk_usage", usage)
    check_space(tmp_path / "a/b", 5_000_000)
    with pytest.raises(DiskFullError, match=r"about 6 MB, .* has 5 MB free.*--out") as error:
        check_space(tmp_path / "a/b", 6_000_000)
    assert "\n" not in str(error.value)
    assert set(asked) == {tmp_path}
    with pytest.raises(DiskFullError):
        check_space(tmp_path, 5_000_001)
