"""Compiled kernels between loads: beside the plan, or for a read-only bundle in the user's cache folder."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hypersd.engines.tensorrt.runtime_cache import RuntimeCache, find_runtime_cache

KEPT = "compiled for this GPU: the next load is quicker"
SHA, VERSION, GPU = "0123456789abcdef" * 4, "1.7.1.116", "NVIDIA GeForce RTX 4090"


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder, still missing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home" / "cache"))
    return tmp_path / "home" / "cache" / "hypersd"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    root = tmp_path / "bundle"
    root.mkdir()
    return root


@pytest.fixture
def read_only(mount_disk: Callable[[str], Path]) -> Callable[..., Path]:
    """``read_only(file=content)``: a folder on a mount that cannot be written, as containers have bundles."""

    def make(**files: bytes) -> Path:
        folder = mount_disk("64k")
        for name, content in files.items():
            (folder / name.replace("__", ".")).write_bytes(content)
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        return folder

    return make


def cache_of(folder: Path, **changes: str) -> RuntimeCache:
    key = {"sha256": SHA, "version": VERSION, "gpu": GPU, "compute_capability": "8.9", **changes}
    return find_runtime_cache(folder / "unet.engine", **key)


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_kernels_are_kept_beside_the_plan(bundle: Path, own_folder: Path) -> None:
    """The newest content is the whole content, and the user's folder stays clean."""
    cache = cache_of(bundle)
    assert list(cache.contents()) == []
    for content in (b"kernels" * 1000, b"fewer", b"\x00\xff"):
        assert cache.keep(content) == KEPT
        assert list(cache.contents()) == [content]
    assert cache.keep(b"\x00\xff") == "compiled at an earlier load"
    assert cache.keep(b"") == ""
    assert files_below(bundle) == [cache.beside]
    assert not own_folder.exists()


@pytest.mark.parametrize("old", [b"", b"corrupt and longer than the kernels", b"kernel", b"kernelz"])
def test_kernels_of_other_bytes_are_replaced(bundle: Path, own_folder: Path, old: bytes) -> None:
    """Whatever the length of the old content."""
    cache = cache_of(bundle)
    cache.beside.write_bytes(old)
    assert cache.keep(b"kernels") == KEPT
    assert list(cache.contents()) == [b"kernels"]


def test_a_read_only_bundle_is_compiled_once(read_only: Callable[..., Path], own_folder: Path) -> None:
    """The container's command mounts bundles so: the kernels are in the user's folder at the next load."""
    folder = read_only()
    note = cache_of(folder).keep(b"kernels")
    assert note == f"compiled for this GPU and kept in {own_folder / 'kernels'}: the next load is quicker"
    assert list(cache_of(folder).contents()) == [b"kernels"]
    assert cache_of(folder).keep(b"kernels") == "compiled at an earlier load"
    assert len(files_below(own_folder)) == 1


def test_a_useless_cache_in_a_read_only_bundle_does_not_hide_the_users(
    read_only: Callable[..., Path], own_folder: Path
) -> None:
    """It can never be replaced, so the user's own is tried before it."""
    beside = cache_of(Path()).beside.name
    folder = read_only(**{beside.replace(".", "__"): b"corrupt"})
    assert list(cache_of(folder).contents()) == [b"corrupt"]
    cache_of(folder).keep(b"kernels")
    assert list(cache_of(folder).contents()) == [b"kernels", b"corrupt"]


def test_the_users_kernels_go_when_the_bundle_holds_newer_ones(bundle: Path, own_folder: Path) -> None:
    """It was read-only once: left there, the old ones would be read first for ever."""
    cache = cache_of(bundle)
    assert cache.own is not None
    cache.own.parent.mkdir(parents=True)
    cache.own.write_bytes(b"old")
    assert cache.keep(b"kernels") == KEPT
    assert list(cache.contents()) == [b"kernels"]


@pytest.mark.parametrize(
    "changes",
    [{"sha256": "f" * 64}, {"version": "1.8.0.1"}, {"gpu": "NVIDIA GeForce RTX 4080"}, {"compute_capability": "8.6"}],
    ids=lambda changes: next(iter(changes)),
)
def test_the_users_folder_tells_kernels_apart(changes: dict[str, str], bundle: Path, own_folder: Path) -> None:
    """By plan, version and model of GPU: two GPUs of one compute capability reject each other's kernels."""
    one, other = cache_of(bundle), cache_of(bundle, **changes)
    assert one.own != other.own
    if "gpu" in changes:
        assert one.beside != other.beside, "they would overwrite each other at every load"


def test_what_cannot_be_read_or_written_is_no_cache(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache saves time and nothing else: folders in the places of files and of folders must not stop a load."""
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    cache = cache_of(bundle)
    cache.beside.mkdir()
    assert list(cache.contents()) == []
    note = cache.keep(b"kernels")
    assert note.startswith("compiled for this GPU at every load: cannot write ")
    assert str(bundle) in note
    assert str(tmp_path / "file") in note
    assert list(bundle.iterdir()) == [cache.beside], "what was begun is gone"


def test_a_user_without_a_home_can_load(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers run under numbers that no list of users has."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    cache = cache_of(bundle)
    assert cache.own is None
    assert cache.keep(b"kernels") == KEPT


def test_a_full_disk_keeps_the_old_kernels(mount_disk: Callable[[str], Path], tmp_path: Path, monkeypatch) -> None:
    """They stay whole, and the beginning of the new ones does not fill the disk."""
    folder = mount_disk("64k")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    cache = cache_of(folder)
    cache.keep(b"old")
    assert "cannot write" in cache.keep(b"n" * 100_000)
    assert list(cache.contents()) == [b"old"]
    assert files_below(folder) == [cache.beside]


def test_threads_that_write_one_cache_leave_a_whole_one(bundle: Path, own_folder: Path) -> None:
    """Pipelines that load one bundle at a time: every reader sees what one of them wrote, from end to end."""
    contents = [bytes([i]) * 50_000 for i in range(8)]
    cache_of(bundle).keep(contents[0])

    def write_and_read(content: bytes) -> bool:
        cache = cache_of(bundle)
        return all(cache.keep(content) and next(cache.contents()) in contents for _ in range(30))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(write_and_read, contents))
    assert files_below(bundle) == [cache_of(bundle).beside]
