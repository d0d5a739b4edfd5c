"""Streams have one owner each, although torch gives out the same few in turn: a stand-in of its pool, without a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hypersd.engines.cuda.streams import POOLED, claim_stream
from hypersd.engines.cuda.turns import Turns
from hypersd.errors import EngineError

DEVICES = torch.device("cuda", 0), torch.device("cuda", 1)


class PooledStream:
    """As torch's: the 32 streams of a device in turn, each draw an object of its own."""

    draws: ClassVar = {device: itertools.count() for device in DEVICES}

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or DEVICES[0]
        self.cuda_stream = 1000 + next(self.draws[self.device]) % POOLED  # one device's addresses are another's here

    def wait_stream(self, other: Any) -> None: ...


@pytest.fixture(autouse=True)
def pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Stream", PooledStream)


def test_two_pipelines_never_take_turns_on_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their locks are two: one would record the other's work. Torch's pool comes round after 32 draws."""
    entered: list[int] = []

    @contextmanager
    def enter(stream: PooledStream) -> Iterator[None]:
        entered.append(stream.cuda_stream)
        yield

    monkeypatch.setattr(torch.cuda, "stream", enter)
    monkeypatch.setattr(torch.cuda, "current_stream", PooledStream)
    one = Turns(DEVICES[0])
    for _ in range(POOLED - 1):
        torch.cuda.Stream(DEVICES[0])
    two = Turns(DEVICES[0])
    for turns in (one, two):
        with turns.turn():
            pass
    assert len(set(entered)) == 2


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(acts=st.lists(st.tuples(st.sampled_from(["claim", "drop", "draw"]), st.integers(0, 63)), max_size=100))
def test_claims_differ_whoever_draws_and_drops(acts: list[tuple[str, int]]) -> None:
    """Any sequence of claims, dropped claims and streams that others draw."""
    claims: list[Any] = []
    for act, n in acts:
        device = DEVICES[n % 2]
        if act == "claim" and len(claims) < POOLED:
            claims.append(claim_stream(device))
        elif act == "drop" and claims:
            del claims[n % len(claims)]
        elif act == "draw":
            for _ in range(n):
                torch.cuda.Stream(device)
        assert len({(claim.device, claim.cuda_stream) for claim in claims}) == len(claims)


def test_more_pipelines_than_streams_are_an_error_until_one_goes() -> None:
    """It says how many there are; another device has its own."""
    claims = [claim_stream(DEVICES[0]) for _ in range(POOLED)]
    with pytest.raises(EngineError, match=r"^all 32 CUDA streams of cuda:0 are in use, .*drop those") as caught:
        claim_stream(DEVICES[0])
    assert "\n" not in str(caught.value)
    assert claim_stream(DEVICES[1]).device == DEVICES[1]
    freed = claims.pop(7).cuda_stream
    assert claim_stream(DEVICES[0]).cuda_stream == freed


def test_threads_that_claim_at_once_get_different_streams() -> None:
    """As a service loads its bundles."""
    with ThreadPoolExecutor(8) as pool:
        claims = list(pool.map(lambda _: claim_stream(DEVICES[0]), range(POOLED)))
    assert len({claim.cuda_stream for claim in claims}) == POOLED
