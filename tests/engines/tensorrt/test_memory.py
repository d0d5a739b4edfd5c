"""Memory that engines share, one block of activations per stream, and compiled kernels beside their plan."""

from __future__ import annotations

import itertools
import subprocess
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hypersd.engines.tensorrt.activation_memory import ActivationMemory
from hypersd.engines.tensorrt.target_loader import cache_path, keep_cache, read_cache, write_cache
from hypersd.errors import EngineError

CPU = torch.device("cpu")


@given(sizes=st.lists(st.integers(0, 5000), min_size=1), streams=st.lists(st.integers(0, 3), min_size=1))
def test_a_stream_has_one_block_of_the_neediest_engines_size(sizes: list[int], streams: list[int]) -> None:
    """Engines of one stream share, streams do not; and a block never moves, for CUDA graphs hold its address."""
    memory = ActivationMemory(CPU)
    for size in sizes:
        memory.require(size)
    blocks = {stream: memory.block(stream) for stream in streams}
    memory.require(min(sizes))  # a later engine that needs no more changes nothing
    for stream in streams:
        assert memory.block(stream) is blocks[stream]
        assert blocks[stream].dtype == torch.uint8
        assert blocks[stream].shape == (max(sizes),)
    assert len({id(block) for block in blocks.values()}) == len(set(streams))


def test_blocks_of_the_warm_up_are_let_go() -> None:
    """A pipeline runs on a stream of its own: the block of the stream that engines were warmed up on is freed."""
    memory = ActivationMemory(CPU)
    memory.require(1000)
    gone = weakref.ref(memory.block(0))
    memory.drop_blocks()
    assert gone() is None
    assert memory.block(0).shape == (1000,)


def test_an_engine_that_needs_more_than_was_handed_out_is_rejected() -> None:
    """It would write past the block's end. What was handed out stays as it was."""
    memory = ActivationMemory(CPU)
    memory.require(1000)
    block = memory.block(0)
    with pytest.raises(EngineError, match=r"needs 1001 bytes .* 1000 are handed out.*loaded before") as caught:
        memory.require(1001)
    assert "\n" not in str(caught.value)
    assert memory.block(0) is block
    assert memory.block(1).shape == (1000,)


def test_threads_that_start_a_stream_at_once_get_one_block() -> None:
    """Two blocks for one stream would be memory lost."""
    start, made = threading.Barrier(8), itertools.count()

    def allocate(size: int, device: torch.device) -> torch.Tensor:
        next(made)
        return torch.empty(size, dtype=torch.uint8, device=device)

    memory = ActivationMemory(CPU, allocate)
    memory.require(64)

    def take(_: int) -> int:
        start.wait(60)
        return memory.block(5).data_ptr()

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(take, range(8)))) == 1
    assert next(made) == 1


def test_too_little_memory_says_how_much_was_needed_and_was_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA device that is full, as torch tells of it; a stand-in, as there is none here. Later it may be free."""
    attempts: list[int] = []

    def allocate(size: int, device: torch.device) -> torch.Tensor:
        attempts.append(size)
        if len(attempts) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate …")
        return torch.empty(1, dtype=torch.uint8)

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1_230_000_000, 8_000_000_000))
    memory = ActivationMemory(torch.device("cuda", 0), allocate)
    memory.require(2_500_000_000)
    with pytest.raises(EngineError, match=r"need 2\.50 GB, 1\.23 GB are free on cuda:0: generate smaller") as caught:
        memory.block(0)
    assert "\n" not in str(caught.value)
    memory.block(0)
    assert attempts == [2_500_000_000] * 2


# Compiled kernels


def test_a_cache_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Kernels of two kinds of GPU lie side by side; the newest content is the whole content."""
    plan = tmp_path / "unet.engine"
    path = cache_path(plan, "8.9")
    assert path.parent == tmp_path
    assert path != cache_path(plan, "8.6") != cache_path(tmp_path / "vae.engine", "8.6")
    assert read_cache(path) == b""
    for content in (b"kernels" * 1000, b"fewer", b"\x00\xff"):
        assert write_cache(path, content)
        assert read_cache(path) == content
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("old", [b"", b"corrupt and longer than the kernels", b"kernel"])
def test_a_cache_of_other_kernels_is_replaced(tmp_path: Path, old: bytes) -> None:
    """A corrupt file that is longer than the right one is compiled again and replaced, once."""
    path = cache_path(tmp_path / "unet.engine", "8.9")
    path.write_bytes(old)
    assert keep_cache(path, b"kernels") == "compiled for this GPU"
    assert read_cache(path) == b"kernels"
    assert keep_cache(path, b"kernels") == "compiled at an earlier load"
    assert keep_cache(path, b"") == ""
    assert read_cache(path) == b"kernels"
    assert "cannot be written" in keep_cache(tmp_path / "gone" / "file", b"kernels")


def test_what_cannot_be_read_or_written_is_no_cache(tmp_path: Path) -> None:
    """A cache saves time and nothing else: no folder, or a folder in its place, must not stop a load."""
    gone = cache_path(tmp_path / "gone" / "unet.engine", "8.9")
    assert read_cache(gone) == b""
    assert not write_cache(gone, b"kernels")
    folder = cache_path(tmp_path / "unet.engine", "8.9")
    folder.mkdir()
    assert read_cache(folder) == b""
    assert not write_cache(folder, b"kernels")
    assert list(tmp_path.iterdir()) == [folder], "what was begun is gone"


@pytest.fixture
def small_disk(mount_disk: Callable[[str], Path]) -> Path:
    """A file system of 64 KiB, a folder in it."""
    return mount_disk("64k")


def test_a_full_or_read_only_disk_keeps_the_old_cache(small_disk: Path) -> None:
    """The old content stays whole, and the beginning of the new one does not fill the disk."""
    path = cache_path(small_disk / "unet.engine", "8.9")
    assert write_cache(path, b"old")
    assert not write_cache(path, b"n" * 100_000)
    assert read_cache(path) == b"old"
    assert [file.name for file in small_disk.iterdir()] == [path.name]
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert not write_cache(path, b"new")
    assert read_cache(path) == b"old"


def test_threads_that_write_one_cache_leave_a_whole_one(tmp_path: Path) -> None:
    """Pipelines that load one bundle at a time: every reader sees what one of them wrote, from end to end."""
    path, contents = tmp_path / "unet.sm89.cache", [bytes([i]) * 50_000 for i in range(8)]
    assert write_cache(path, contents[0])

    def write_and_read(content: bytes) -> bool:
        return all(write_cache(path, content) and read_cache(path) in contents for _ in range(30))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(write_and_read, contents))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
