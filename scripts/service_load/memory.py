"""The service's memory under load, and its growth."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence

from .client import Client

Sample = tuple[float, float]  # seconds since the start, bytes


class MemoryWatch:
    """Samples the service's resident memory until it is left."""

    def __init__(self, client: Client, interval: float) -> None:
        """``interval``: seconds between samples."""
        self.samples: list[Sample] = []
        self._client, self._interval = client, interval

    async def __aenter__(self) -> MemoryWatch:
        self._began = time.perf_counter()
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._sample()

    async def _watch(self) -> None:
        while True:
            await self._sample()
            await asyncio.sleep(self._interval)

    async def _sample(self) -> None:
        resident = (await self._client.metrics())["process_resident_memory_bytes"]
        self.samples.append((time.perf_counter() - self._began, resident))


def growth(samples: Sequence[Sample]) -> float:
    """Bytes by which the last fifth of the time lies above the fifth around its middle, medians of both."""
    whole = samples[-1][0]
    middle = [value for at, value in samples if 0.4 * whole <= at <= 0.6 * whole]
    end = [value for at, value in samples if at >= 0.8 * whole]
    return statistics.median(end) - statistics.median(middle or [samples[0][1]])


def slope(samples: Sequence[Sample]) -> float:
    """Bytes a minute in the second half of the time, by least squares."""
    half = [(at, value) for at, value in samples if at >= 0.5 * samples[-1][0]]
    if len(half) < 2:
        return 0.0
    return statistics.linear_regression(*zip(*half, strict=True)).slope * 60.0
