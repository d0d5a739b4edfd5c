"""Closed and open loops: when requests are sent."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Iterator

from .client import Client, Outcome


async def run_closed(client: Client, clients: int, *, seconds: float | None, requests: int | None) -> list[Outcome]:
    """Clients of which each asks again once it has its answer.

    Args:
        client: sends the requests.
        clients: how many requests are under way at a time.
        seconds: for how long requests are begun; None for no limit.
        requests: how many; None for no limit.
    """
    indexes = _indexes(seconds, requests)
    outcomes: list[Outcome] = []

    async def ask_on() -> None:
        for index in indexes:
            outcomes.append(await client.ask(index, time.perf_counter()))

    await asyncio.gather(*(ask_on() for _ in range(clients)))
    return outcomes


def _indexes(seconds: float | None, requests: int | None) -> Iterator[int]:
    """Numbers from 0, which all clients share, until time or number is up."""
    end = None if seconds is None else time.perf_counter() + seconds
    for index in itertools.count():
        if (requests is not None and index >= requests) or (end is not None and time.perf_counter() >= end):
            return
        yield index


async def run_open(client: Client, arrivals: list[float]) -> list[Outcome]:
    """Requests at fixed times, however long answers take: latency counts from the time, also where the request is late.

    Args:
        client: sends the requests.
        arrivals: seconds from now, ascending.
    """
    began = time.perf_counter()
    tasks = []
    for index, arrival in enumerate(arrivals):
        await asyncio.sleep(max(0.0, began + arrival - time.perf_counter()))
        tasks.append(asyncio.create_task(client.ask(index, began + arrival)))
    return list(await asyncio.gather(*tasks))


def poisson_arrivals(rate: float, *, seconds: float | None, requests: int | None, seed: int = 0) -> list[float]:
    """When requests of a Poisson process arrive: in seconds, ascending; ``rate`` a second on average."""
    gaps, arrivals, now = random.Random(seed), [], 0.0
    while requests is None or len(arrivals) < requests:
        now += gaps.expovariate(rate)
        if seconds is not None and now >= seconds:
            break
        arrivals.append(now)
    return arrivals
