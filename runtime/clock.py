"""Seconds by stage."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Times the stages of one call, and the steps inside one of them."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._stages: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, device: torch.device | None = None) -> Iterator[None]:
        """Time the block, and the work that it enqueues on the current stream of a CUDA ``device``."""
        began = time.perf_counter()
        yield
        if device is not None and device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        self._stages[name] = time.perf_counter() - began

    def add_steps(self, steps: Steps) -> None:
        """Add ``step_1``, ``step_2`` and so on: the parts of a stage that ends with a synchronization."""
        self._stages |= {f"step_{i}": seconds for i, seconds in enumerate(steps.seconds(), start=1)}

    def timings(self) -> dict[str, float]:
        """Seconds by name, in order, and their ``total`` since the call began."""
        return {**self._stages, "total": time.perf_counter() - self._began}


class Steps:
    """Marks in time between the steps of a loop; on a CUDA device events in its current stream, without waiting."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._marks: list[float | torch.cuda.Event] = []
        self.mark()

    def mark(self) -> None:
        """Here one step ends and the next one begins."""
        if not self._is_cuda:
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def seconds(self) -> list[float]:
        """The seconds of each step; on a CUDA device call it after waiting for the stream."""
        return [_seconds_between(*pair) for pair in zip(self._marks, self._marks[1:], strict=False)]


def _seconds_between(first: float | torch.cuda.Event, second: float | torch.cuda.Event) -> float:
    if isinstance(first, torch.cuda.Event) and isinstance(second, torch.cuda.Event):
        return first.elapsed_time(second) / 1000
    assert isinstance(first, float)
    assert isinstance(second, float)
    return second - first
