"""Memory that engines share, one block of activations per stream."""

from __future__ import annotations

import itertools
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hypersd.engines.tensorrt.activation_memory import ActivationMemory
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
