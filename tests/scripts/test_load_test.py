"""The load test on a real service, and on stand-ins that lose requests: it has to find that."""

from __future__ import annotations

import base64
import io
import itertools
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from load_test import main
from PIL import Image
from service_load.client import Client, Outcome, answers_by_status, parse_metrics
from service_load.loops import poisson_arrivals
from service_load.memory import growth, slope
from service_load.report import make_level, percentile

CASES = 4


def run(tmp_path: Path, *words: object) -> tuple[int, dict[str, Any]]:
    """Its exit code, and the figures that it wrote."""
    file = tmp_path / "figures.json"
    code = main([*map(str, words), "--cases", str(CASES), "--json", str(file)])
    return code, json.loads(file.read_text())


def test_a_soak_loses_nothing_and_memory_stays_flat(demo_bundle: Path, tmp_path: Path) -> None:
    """A service under load for a while: every request answered with its own image, and no leak.

    16 MB between the middle and the end is what allocators may do; a leak of one 96x96 image a request is more.
    """
    words = ("soak", "--serve", demo_bundle, "--clients", 4, "--seconds", 15, "--most-growth-mb", 16)
    code, figures = run(tmp_path, *words)
    (level,) = figures["levels"]
    assert code == 0, figures["verdict"]
    assert level["kinds"] == {"generated": level["sent"], "rejected": 0, "timed out": 0, "wrong": 0, "failed": 0}
    assert level["sent"] > CASES
    assert level["memory"]["growth"] <= level["memory"]["allowed"] == 16e6


def test_a_full_queue_rejects_and_loses_nothing(demo_bundle: Path, tmp_path: Path) -> None:
    """Beyond a queue of one, requests are rejected at once with Retry-After; all others are answered."""
    words = ("closed", "--serve", demo_bundle, "--queue", 1, "--max-count", 1, "--clients", 8, "--requests", 80)
    code, figures = run(tmp_path, *words)
    (level,) = figures["levels"]
    assert code == 0, figures["verdict"]
    assert level["sent"] == 80 == level["kinds"]["generated"] + level["kinds"]["rejected"]
    assert level["kinds"]["rejected"] > 0
    assert level["received"] == level["counted"]


class Service(ThreadingHTTPServer):
    """A stand-in for a service, whose answers are right for the first ``CASES`` images."""

    daemon_threads = True

    def __init__(self, lie: Callable[[dict[str, Any]], Any]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lie, self.asked, self.answers = lie, 0, Counter[int]()
        self.lock = threading.Lock()


def png(seed: int) -> str:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (seed % 256, seed // 256 % 256, 0)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def answer(seed: int, image_seed: int | None = None) -> dict[str, Any]:
    seed_of_image = seed if image_seed is None else image_seed
    return {"size": "8x8", "data": [{"b64_json": png(seed_of_image), "seed": seed}]}


def mislabelled(seed: int) -> dict[str, Any]:
    """The right image under another's seed."""
    return {"b64_json": png(seed), "seed": seed + 1}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Service

    def do_GET(self) -> None:
        labels = f'path="{"/v1/images/generations"}"'
        lines = [f'hypersd_requests_total{{code="{c}",{labels}}} {n}.0' for c, n in self.server.answers.items()]
        self.reply(200, "\n".join([*lines, "process_resident_memory_bytes 1e8"]).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked += 1
            is_honest = self.server.asked <= CASES
        made = answer(body["seed"]) if is_honest else self.server.lie(body)
        if made is None:
            self.close_connection = True
            return
        status, content = made if isinstance(made, tuple) else (200, made)
        with self.server.lock:
            self.server.answers[status] += 1
        self.reply(status, json.dumps(content).encode())

    def reply(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def service(lie: Callable[[dict[str, Any]], Any]) -> Iterator[str]:
    with Service(lie) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


LIES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "the seed of another": (lambda body: {**answer(body["seed"]), "data": [mislabelled(body["seed"])]}, "wrong"),
    "another's image": (lambda body: answer(body["seed"], 1000 + (body["seed"] + 1) % CASES), "wrong"),
    "other bytes": (lambda body: answer(body["seed"], body["seed"] + 5000), "wrong"),
    "no image": (lambda body: {"size": "8x8", "data": []}, "wrong"),
    "no answer": (lambda body: None, "failed"),
    "503 without Retry-After": (lambda body: (503, {}), "failed"),
    "500": (lambda body: (500, {}), "failed"),
}


def test_an_honest_service_passes(tmp_path: Path) -> None:
    """The stand-in itself is no reason to fail."""
    with service(lambda body: answer(body["seed"])) as url:
        code, figures = run(tmp_path, "closed", "--url", url, "--clients", 2, "--requests", 20)
        assert (code, figures["levels"][0]["kinds"]["generated"]) == (0, 20)
        code, figures = run(tmp_path, "open", "--url", url, "--rates", 200, "--requests", 20)
        assert (code, figures["levels"][0]["kinds"]["generated"]) == (0, 20)


@pytest.mark.parametrize("name", LIES)
def test_lost_and_confused_requests_are_found(name: str, tmp_path: Path) -> None:
    lie, kind = LIES[name]
    with service(lie) as url:
        code, figures = run(tmp_path, "closed", "--url", url, "--clients", 2, "--requests", 6)
    assert code == 1
    assert figures["levels"][0]["kinds"][kind] == 6
    assert figures["verdict"].startswith(f"FAIL: closed, 2 clients: 6 {kind}")


def test_an_answer_that_nobody_got_is_found(tmp_path: Path) -> None:
    """The service says that it answered twice as often as answers came."""
    with service(lambda body: answer(body["seed"])) as url:
        original = Handler.do_POST

        def twice(self: Handler) -> None:
            original(self)
            self.server.answers[200] += 1

        Handler.do_POST = twice
        try:
            code, figures = run(tmp_path, "closed", "--url", url, "--clients", 1, "--requests", 5)
        finally:
            Handler.do_POST = original
    assert code == 1
    assert "the service counted the answers {200: 10}, received were {200: 5}" in figures["verdict"]


def test_memory_that_grows_is_found() -> None:
    kilobyte, flat = 1000.0, [(float(second), 1e8) for second in range(60)]
    leaking = [(second, value + 1000 * kilobyte * second) for second, value in flat]
    assert growth(flat) == slope(flat) == 0
    assert growth(leaking) == pytest.approx(24e6, rel=0.1)  # from second 30 to second 54
    assert slope(leaking) == pytest.approx(60e6)
    memory = {"end": 1e8, "growth": growth(leaking), "allowed": 16e6}
    outcome = Outcome("generated", 200, 0.1)
    level = make_level("soak", 1, [outcome], 1.0, {200: 1}, memory)
    assert "memory grew by 24" in level.complaints()[0]


def test_an_outcome_that_is_missing_is_found() -> None:
    level = make_level("open", 2, [Outcome("generated", 200, 0.1)], 1.0, {200: 1}, {})
    assert level.complaints() == ["2 requests sent and 1 outcomes"]


async def ask_late(url: str) -> Outcome:
    import time

    from service_load.cases import make_cases

    async with Client(url, make_cases(1), model=None, token=None, patience=10) as client:
        return await client.ask(0, time.perf_counter() - 100)


def test_latency_counts_from_when_a_request_was_due() -> None:
    """A request that could not be sent in time has waited all the same: no coordinated omission."""
    import asyncio

    with service(lambda body: answer(body["seed"])) as url:
        assert 100 <= asyncio.run(ask_late(url)).seconds < 200


def test_arrivals_are_a_poisson_process() -> None:
    """As many as the rate says, ascending, with gaps whose spread is that of an exponential distribution."""
    arrivals = poisson_arrivals(50.0, seconds=100.0, requests=None)
    assert arrivals == sorted(arrivals)
    assert arrivals == poisson_arrivals(50.0, seconds=100.0, requests=None)
    assert 4700 < len(arrivals) < 5300
    gaps = [after - before for before, after in itertools.pairwise(arrivals)]
    assert 0.45 < sum(gap > 0.02 * 0.6931 for gap in gaps) / len(gaps) < 0.55  # half lie above the median
    assert len(poisson_arrivals(5.0, seconds=None, requests=7)) == 7


def test_percentiles_are_nearest_ranks() -> None:
    values = [float(value) for value in range(1, 101)]
    assert [percentile(values, p) for p in (50, 95, 99)] == [50.0, 95.0, 99.0]
    assert percentile([3.0], 99) == 3.0


def test_metrics_are_read() -> None:
    text = """# HELP hypersd_requests_total Answers
hypersd_requests_total{code="200",path="/v1/images/generations"} 7.0
hypersd_requests_total{code="503",path="/v1/images/generations"} 2.0
hypersd_requests_total{code="200",path="/healthz"} 5.0
process_resident_memory_bytes 3.4e+08"""
    assert answers_by_status(parse_metrics(text)) == {200: 7, 503: 2}
    assert parse_metrics(text)["process_resident_memory_bytes"] == 3.4e8
