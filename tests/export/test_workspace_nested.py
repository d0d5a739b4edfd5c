"""Components in folders of their kind, ``controlnet/canny``: resumed, discarded, linked and published as others are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hypersd.engines.bundle import Bundle
from hypersd.export.workspace import PROGRESS_NAME, Workspace

from .test_workspace import Parts, Stop, assert_whole, build, component, interrupted, killed

PARTS: Parts = {
    "text_encoder": ("a", b"words" * 100),
    "controlnet_cond_embedding/canny": ("b", b"edges" * 50),
    "controlnet/canny": ("c", b"canny" * 100),
    "controlnet/scribble": ("d", b"lines" * 100),
    "unet": ("e", b"noise" * 200),
}
NAMES = list(PARTS)


def there(root: Path) -> set[str]:
    """All files and empty folders below a folder."""
    paths = (path for path in root.rglob("*") if path.is_file() or not any(path.iterdir()))
    return {path.relative_to(root).as_posix() for path in paths}


def files_of(*names: str) -> set[str]:
    return {f"{name}/model.onnx" for name in names}


def resumed(out: Path) -> Workspace:
    """A workspace that goes on from what is there."""
    workspace = Workspace(out)
    workspace.resume()
    return workspace


def test_a_bundle_with_them(tmp_path: Path) -> None:
    """Published with a record for every file, and loaded, hashes and all."""
    build(tmp_path / "out", PARTS)
    assert_whole(tmp_path / "out", PARTS)
    bundle = Bundle.load(tmp_path / "out", hashes=True)
    assert list(bundle.manifest.components) == NAMES
    assert bundle.path(bundle.component("controlnet/canny").onnx).read_bytes() == PARTS["controlnet/canny"][1]


@pytest.mark.parametrize("after", range(len(PARTS)), ids=NAMES)
def test_an_error_leaves_finished_components(after: int, tmp_path: Path) -> None:
    """Nothing of the component that failed, not even the folder of its kind if it was the first; the rest stays."""
    partial = interrupted(tmp_path / "out", after, PARTS)
    if after == 0:
        assert not partial.exists()
    else:
        assert there(partial) == {PROGRESS_NAME, *files_of(*NAMES[:after])}
    made: list[str] = []
    build(tmp_path / "out", PARTS, made=made)
    assert made == NAMES[after:]
    assert_whole(tmp_path / "out", PARTS)


STRANGERS = [
    "controlnet/scribble/model.onnx",  # what a kill leaves
    "controlnet/canny2/model.onnx",
    "controlnet/notes.txt",
    f"controlnet/{PROGRESS_NAME}",
    f"controlnet/.{PROGRESS_NAME}.1.2.tmp",
    "controlnet_cond_embedding/scribble/model.onnx",
    "controlnet_cond/canny/model.onnx",
    "control/canny/model.onnx",
    "unet/model.onnx",
    "notes.txt",
]


@pytest.mark.parametrize("after", [1, 2, 3], ids=["no kind", "one kind", "both kinds"])
def test_resuming_deletes_everything_else(after: int, tmp_path: Path) -> None:
    """Half-written components and strangers, beside finished ones and above them, whose names begin alike."""
    partial = interrupted(tmp_path / "out", after, PARTS)
    for name in STRANGERS:
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).write_bytes(b"x")
    (partial / "controlnet/empty").mkdir()
    assert list(resumed(tmp_path / "out").resume()) == NAMES[:after]
    assert there(partial) == {PROGRESS_NAME, *files_of(*NAMES[:after])}


def test_a_damaged_file_starts_over(tmp_path: Path) -> None:
    """One that was shortened is found out in the folder of a kind, too."""
    partial = interrupted(tmp_path / "out", 4, PARTS)
    file = partial / "controlnet/canny/model.onnx"
    file.write_bytes(file.read_bytes()[:-1])
    assert resumed(tmp_path / "out").resume() == {}
    assert there(partial) == {PROGRESS_NAME}


@pytest.mark.parametrize("order", [["canny", "scribble"], ["scribble", "canny"]], ids="-".join)
def test_discarding(order: list[str], tmp_path: Path) -> None:
    """One goes with its files, and with the last of its kind the kind's folder; the next run knows of it."""
    partial = interrupted(tmp_path / "out", 4, PARTS)
    first, last = (f"controlnet/{name}" for name in order)
    workspace = resumed(tmp_path / "out")
    workspace.discard(first)
    assert there(partial) == {PROGRESS_NAME, *files_of(*NAMES[:2], last)}
    assert set(resumed(tmp_path / "out").resume()) == {*NAMES[:2], last}
    workspace.discard(last)
    assert there(partial) == {PROGRESS_NAME, *files_of(*NAMES[:2])}
    assert not (partial / "controlnet").exists()
    assert list(resumed(tmp_path / "out").resume()) == NAMES[:2]


def test_making_one_again_leaves_its_neighbours(tmp_path: Path) -> None:
    """A finished one of another key is replaced, in a run that fails and in one that does not."""
    partial = interrupted(tmp_path / "out", 4, PARTS)
    with pytest.raises(Stop), resumed(tmp_path / "out").component_folder("controlnet/canny") as folder:
        assert list(folder.iterdir()) == []
        raise Stop
    assert there(partial) == {PROGRESS_NAME, *files_of(*NAMES[:2], "controlnet/scribble")}
    interrupted(tmp_path / "again", 4, PARTS)
    changed: Parts = {**PARTS, "controlnet/canny": ("f", b"finer" * 100)}
    made: list[str] = []
    build(tmp_path / "again", changed, made=made)
    assert made == ["controlnet/canny", "unet"]
    assert_whole(tmp_path / "again", changed)


def test_linked_from_a_neighbour(tmp_path: Path) -> None:
    """Under the same name and key it is the neighbour's file, in folders that were not there."""
    build(tmp_path / "first", PARTS)
    made: list[str] = []
    parts: Parts = {**PARTS, "controlnet/scribble": ("f", b"other" * 100)}
    build(tmp_path / "second", parts, made=made)
    assert made == ["controlnet/scribble"]
    assert_whole(tmp_path / "second", parts)
    for file in files_of(*PARTS.keys() - {"controlnet/scribble"}):
        assert os.path.samefile(tmp_path / "first" / file, tmp_path / "second" / file)


@pytest.mark.parametrize("damage", ["gone", "altered"])
def test_a_damaged_neighbour_leaves_nothing(damage: str, tmp_path: Path) -> None:
    """Its component is not taken, nor is a folder left of the attempt."""
    build(tmp_path / "first", PARTS)
    file = tmp_path / "first/controlnet/canny/model.onnx"
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1] + b"!")
    workspace = resumed(tmp_path / "second")
    assert workspace.reuse("controlnet/canny", "c" * 64) is None
    assert there(workspace.root) == set()


def test_a_neighbour_that_goes_away_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaced between its check and the link: the half-made component is deleted, and the others stay."""
    build(tmp_path / "first", PARTS)
    partial = interrupted(tmp_path / "second", 3, {**PARTS, "unet": ("f", b"")})

    def gone(*_: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr("hypersd.export.workspace.link_or_copy", gone)
    assert resumed(tmp_path / "second").reuse("controlnet/scribble", "d" * 64) is None
    assert there(partial) == {PROGRESS_NAME, *files_of(*NAMES[:3])}


def test_another_name_is_another_component(tmp_path: Path) -> None:
    """The same key under another ControlNet's name is not linked: a manifest names the files by it."""
    build(tmp_path / "first", PARTS)
    workspace = resumed(tmp_path / "second")
    for name in ("controlnet/edges", "canny", "controlnet"):
        assert workspace.reuse(name, "c" * 64) is None
    assert workspace.reuse("controlnet/canny", "c" * 64) == component("controlnet/canny", "c")


SMALL: Parts = {name: PARTS[name] for name in NAMES if name.startswith("controlnet")}


@pytest.mark.parametrize("half_written", [False, True], ids=["before", "in-the-middle"])
def test_a_kill_at_any_moment(half_written: bool, tmp_path: Path) -> None:
    """Killed at each single change: no bundle or a whole one, nothing that was noted made again, nothing left."""
    for count in range(1, 100):
        out = tmp_path / str(count) / "out"
        ended = not killed(lambda out=out: build(out, SMALL), count, half_written)
        progress = out.parent / f".{out.name}.partial" / PROGRESS_NAME
        noted = progress.read_text() if progress.exists() else ""
        if out.exists():
            Bundle.load(out, hashes=True)
        made: list[str] = []
        build(out, SMALL, replace=out.exists(), made=made)
        assert not [name for name in made if f'"{name}": {{' in noted]
        assert_whole(out, SMALL)
        if ended:
            assert count > 10, "the changes were not seen"
            return
    pytest.fail("the export never ended")
