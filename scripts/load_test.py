#!/usr/bin/env python
"""Put load on a service (`hypersd serve`), check every answer, and say whether one request was lost.

    python scripts/load_test.py closed --serve bundles/NAME --clients 1 2 4 8 32 --seconds 20
    python scripts/load_test.py open --url http://127.0.0.1:8000 --rates 10 20 40 --seconds 20
    python scripts/load_test.py soak --serve bundles/NAME --clients 8 --seconds 300

closed: each client asks again once it has its answer: the most that the service reaches.
open: requests that arrive at random (a Poisson process), whether the service keeps up or not; latency counts from when
a request was to be sent. Without --rates the rates are a quarter to twice what a closed loop reaches.
soak: a closed loop for long, while the service's memory is watched: between the middle and the end it may not grow.

First every image is generated alone. Under load each answer must be the image of its own prompt and seed, byte for
byte; rejections (503 with Retry-After) and timeouts (504) are answers, too. The last line is PASS, or FAIL and why; the
exit code 0 or 1.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

try:
    from service_load.client import Client, Outcome, answers_by_status
except ModuleNotFoundError as missing:
    sys.exit(f"{missing.name} is not installed; in the clone: pip install -e '.[serve,dev]'")
from service_load.cases import make_cases
from service_load.loops import poisson_arrivals, run_closed, run_open
from service_load.memory import MemoryWatch, growth, slope
from service_load.report import Level, make_level, print_table
from service_load.server import serving

SHARES = (0.25, 0.5, 0.75, 0.9, 1.1, 1.5, 2.0)  # of what a closed loop reaches
CAPACITY_CLIENTS = 4
LATE = 0.5  # seconds
SETTLING = 20  # times that the service is asked how many answers it gave


class LoadTest:
    """Runs levels of load against one service.

    Attributes:
        levels: the results so far.
    """

    def __init__(self, client: Client, args: argparse.Namespace, console: Console) -> None:
        self.levels: list[Level] = []
        self._client, self._args, self._console = client, args, console

    async def closed(self) -> None:
        for clients in self._args.clients:
            await self._measure(f"closed, {clients} clients", self._run_closed(clients))

    async def open(self) -> None:
        for rate in self._args.rates or await self._rates():
            arrivals = poisson_arrivals(rate, seconds=self._args.seconds, requests=self._args.requests)
            await self._measure(f"open, {rate:.3g}/s", run_open(self._client, arrivals))

    async def soak(self) -> None:
        interval = min(5.0, (self._args.seconds or 60.0) / 40)
        (clients,) = self._args.clients
        async with MemoryWatch(self._client, interval) as watch:
            await self._measure(f"soak, {clients} clients", self._run_closed(clients), watch=watch)

    def _run_closed(self, clients: int) -> Awaitable[list[Outcome]]:
        return run_closed(self._client, clients, seconds=self._args.seconds, requests=self._args.requests)

    async def _rates(self) -> list[float]:
        """Rates around what the service reaches."""
        name = f"closed, {CAPACITY_CLIENTS} clients"
        await self._measure(name, self._run_closed(CAPACITY_CLIENTS))
        return [share * self.levels[-1].rate for share in SHARES]

    async def _measure(self, name: str, run: Awaitable[list[Outcome]], watch: MemoryWatch | None = None) -> None:
        """Run, and compare what came with what the service says that it answered."""
        before, sent_before = answers_by_status(await self._client.metrics()), self._client.sent
        began = time.perf_counter()
        outcomes = await run
        seconds = time.perf_counter() - began
        answered = sum(outcome.status is not None for outcome in outcomes)
        counted, metrics = await self._counted(before, answered)
        memory = {"end": metrics["process_resident_memory_bytes"]}
        if watch is not None:
            allowed = self._args.most_growth_mb * 1e6
            memory |= {"growth": growth(watch.samples), "slope": slope(watch.samples), "allowed": allowed}
        level = make_level(name, self._client.sent - sent_before, outcomes, seconds, counted, memory)
        self.levels.append(level)
        late = f"; the client was {level.late:.1f} s late: too much load for it" if level.late > LATE else ""
        complaints = "".join(f"; {complaint}" for complaint in level.complaints())
        self._console.print(f"{name}: {level.rate:.1f} images/s{late}{complaints}", markup=False, soft_wrap=True)

    async def _counted(self, before: Mapping[int, int], expected: int) -> tuple[Counter[int], dict[str, float]]:
        """Answers by status as the service counts them, maybe a moment after it gave them; and all its figures."""
        counted, metrics = Counter[int](), {}
        for _ in range(SETTLING):
            metrics = await self._client.metrics()
            counted = Counter(answers_by_status(metrics))
            counted.subtract(before)
            if counted.total() >= expected:
                break
            await asyncio.sleep(0.1)
        return +counted, metrics


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    loops = parser.add_subparsers(dest="loop", required=True)
    for name, clients in (("closed", [1, 2, 4, 8, 32]), ("open", None), ("soak", [8])):
        _add_arguments(loops.add_parser(name), name, clients)
    args, options = parser.parse_known_args(argv)
    args.options = options  # those of `hypersd serve`
    if args.url and options:
        parser.error(f"{options[0]} is no option; those of `hypersd serve` go with --serve")
    if args.seconds is None and args.requests is None:
        args.seconds = 20.0
    if args.loop == "soak" and len(args.clients) > 1:
        parser.error("--clients: a soak has one number of them")
    return args


def _add_arguments(parser: argparse.ArgumentParser, loop: str, clients: list[int] | None) -> None:
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--serve", type=Path, metavar="BUNDLE", help="start a service; it gets all options unknown here")
    where.add_argument("--url", help="a service that runs, which nobody else asks meanwhile")
    parser.add_argument("--model", help="one of its bundles (default: the first)")
    parser.add_argument("--token", help="its bearer token")
    if clients:
        parser.add_argument("--clients", type=int, nargs="+", default=clients, metavar="N", help=f"default: {clients}")
    if loop == "open":
        parser.add_argument("--rates", type=float, nargs="+", metavar="R", help="requests a second")
    if loop == "soak":
        parser.add_argument(
            "--most-growth-mb",
            type=float,
            default=16.0,
            metavar="MB",
            help="between the middle and the end (default: 16)",
        )
    parser.add_argument("--seconds", type=float, metavar="S", help="for each load (default: 20, without --requests)")
    parser.add_argument("--requests", type=int, metavar="N", help="for each load")
    parser.add_argument("--cases", type=int, default=16, metavar="N", help="different images (default: 16)")
    parser.add_argument(
        "--patience", type=float, default=120.0, metavar="S", help="then an answer is lost (default: 120)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")


async def run_loops(args: argparse.Namespace, url: str, console: Console) -> list[Level]:
    """Learn the images, then load the service as the arguments say."""
    cases = make_cases(args.cases)
    async with Client(url, cases, model=args.model, token=args.token, patience=args.patience) as client:
        await client.wait_ready(args.patience)
        await client.learn()
        test = LoadTest(client, args, console)
        await getattr(test, args.loop)()
        return test.levels


def verdict(levels: Sequence[Level]) -> str:
    """PASS, or FAIL and why."""
    complaints = [f"{level.name}: {complaint}" for level in levels for complaint in level.complaints()]
    if not levels or not any(level.kinds["generated"] for level in levels):
        complaints.append("no image was generated")
    return f"FAIL: {'; '.join(complaints)}" if complaints else "PASS: no request was lost, no answer was another's"


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    console = Console(stderr=True, highlight=False)
    try:
        with contextlib.ExitStack() as stack:
            url = stack.enter_context(serving(args.serve, args.options)) if args.serve else args.url
            levels = asyncio.run(run_loops(args, url, console))
    except (RuntimeError, TimeoutError) as error:
        console.print(f"error: {error}", markup=False, soft_wrap=True)
        return 1
    outcome = verdict(levels)
    if args.json:
        report: dict[str, Any] = {"verdict": outcome, "levels": [level.as_json() for level in levels]}
        args.json.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    out = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    print_table(levels, out)
    out.print(outcome, markup=False, soft_wrap=True)
    return 0 if outcome.startswith("PASS") else 1


if __name__ == "__main__":
    sys.exit(main())
