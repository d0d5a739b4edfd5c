"""The figures of a run, and whether a request was lost."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from .client import Outcome

KINDS = ("generated", "rejected", "timed out", "wrong", "failed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Level:
    """One stretch of constant load.

    Attributes:
        name: the load in words.
        sent: requests.
        kinds: the number of requests by their result.
        seconds: from the first request to the last answer.
        latency: of the generated images, in seconds: ``p50``, ``p95``, ``p99`` and ``max``.
        rejection_p99: of the rejections, in seconds; None if there were none.
        late: the most seconds by which a request was sent too late: the client's fault, not the service's.
        counted: answers by HTTP status as the service counted them itself.
        received: answers by HTTP status.
        faults: descriptions of the first few.
        memory: bytes of the service: ``end``, and of a soak ``growth``, ``slope`` (a minute) and ``allowed``.
    """

    name: str
    sent: int
    kinds: Mapping[str, int]
    seconds: float
    latency: Mapping[str, float]
    rejection_p99: float | None
    late: float
    counted: Mapping[int, int]
    received: Mapping[int, int]
    faults: Sequence[str]
    memory: Mapping[str, float]

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.kinds["generated"] / self.seconds if self.seconds else 0.0

    def complaints(self) -> list[str]:
        """Why the run is not as it should be; nothing if no request was lost and no answer was another's."""
        answered = sum(self.kinds[kind] for kind in ("generated", "rejected", "timed out"))
        found = [f"{self.kinds[kind]} {kind}" for kind in ("wrong", "failed") if self.kinds[kind]]
        if answered + self.kinds["wrong"] + self.kinds["failed"] != self.sent:
            found.append(f"{self.sent} requests sent and {sum(self.kinds.values())} outcomes")
        if self.counted != self.received:
            found.append(f"the service counted the answers {dict(self.counted)}, received were {dict(self.received)}")
        if self.memory.get("growth", 0.0) > self.memory.get("allowed", math.inf):
            grown, allowed = (f"{self.memory[name] / 1e6:.1f} MB" for name in ("growth", "allowed"))
            found.append(f"the service's memory grew by {grown} between the middle and the end, allowed are {allowed}")
        return found

    def as_json(self) -> dict[str, Any]:
        """All of it, and what follows from it."""
        return {**dataclasses.asdict(self), "rate": self.rate, "complaints": self.complaints()}


def make_level(
    name: str,
    sent: int,
    outcomes: Sequence[Outcome],
    seconds: float,
    counted: Mapping[int, int],
    memory: Mapping[str, float],
) -> Level:
    """The figures of some outcomes."""
    kinds = Counter(outcome.kind for outcome in outcomes)
    generated = sorted(outcome.seconds for outcome in outcomes if outcome.kind == "generated")
    rejected = sorted(outcome.seconds for outcome in outcomes if outcome.kind == "rejected")
    return Level(
        name=name,
        sent=sent,
        kinds={kind: kinds[kind] for kind in KINDS},
        seconds=seconds,
        latency=_latency(generated),
        rejection_p99=percentile(rejected, 99) if rejected else None,
        late=max((outcome.late for outcome in outcomes), default=0.0),
        counted=dict(sorted(counted.items())),
        received=dict(sorted(Counter(o.status for o in outcomes if o.status is not None).items())),
        faults=[outcome.fault for outcome in outcomes if outcome.fault][:5],
        memory=memory,
    )


def _latency(ascending: Sequence[float]) -> dict[str, float]:
    return {f"p{p}": percentile(ascending, p) for p in (50, 95, 99)} | {"max": ascending[-1]} if ascending else {}


def percentile(ascending: Sequence[float], percent: float) -> float:
    """The least value that so many percent of all do not exceed (nearest rank)."""
    return ascending[max(0, math.ceil(len(ascending) * percent / 100) - 1)]


def print_table(levels: Sequence[Level], console: Console) -> None:
    """A row for every level; latencies in milliseconds."""
    table = Table(
        "load", "sent", "images", "503", "504", "wrong", "failed", "images/s", "p50", "p95", "p99", "max", "MB"
    )
    for level in levels:
        latencies = [
            f"{level.latency[name] * 1e3:.0f}" if level.latency else "-" for name in ("p50", "p95", "p99", "max")
        ]
        counts = [str(level.kinds[kind]) for kind in KINDS]
        memory = f"{level.memory.get('end', 0) / 1e6:.0f}"
        table.add_row(level.name, str(level.sent), *counts, f"{level.rate:.1f}", *latencies, memory)
    console.print(table)
