"""A client that checks every answer."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Literal

import httpx

from .cases import Case, Images

GENERATIONS = "/v1/images/generations"
POOLS = 16  # of connections: what httpx does for a request grows with the connections in its pool
Kind = Literal["generated", "rejected", "timed out", "wrong", "failed"]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a request.

    Attributes:
        kind: ``generated``; ``rejected`` (503 with Retry-After) and ``timed out`` (504) are answers that a service may
            give under too much load; ``wrong`` is an answer to something else; ``failed`` is anything else.
        status: HTTP's; None if no answer came.
        seconds: from when the request was to be sent, also if it was sent later, to its whole answer.
        fault: the description of the fault.
        late: the part of ``seconds`` before it was sent; if it is large, the client is the slow part.
    """

    kind: Kind
    status: int | None
    seconds: float
    fault: str = ""
    late: float = 0.0


class Client:
    """Sends requests to a service and checks its answers.

    Attributes:
        sent: requests so far.
    """

    def __init__(self, url: str, cases: Sequence[Case], *, model: str | None, token: str | None, patience: float):
        """``patience`` are seconds after which an answer counts as lost."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        unlimited = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        timeout = httpx.Timeout(patience, pool=None)
        self._pools = [
            httpx.AsyncClient(base_url=url, headers=headers, limits=unlimited, timeout=timeout, trust_env=False)
            for _ in range(POOLS)
        ]
        self._http = self._pools[0]
        self._cases, self._model = cases, model
        self._images = Images()
        self.sent = 0

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        for pool in self._pools:
            await pool.aclose()

    async def learn(self) -> None:
        """Request every case once, alone: the images under load must be the same.

        Raises:
            RuntimeError: an image could not be generated.
        """
        for i in range(len(self._cases)):
            outcome = await self.ask(i, time.perf_counter())
            if outcome.kind != "generated":
                raise RuntimeError(f"a request by itself was not answered: {outcome.fault or outcome.kind}")

    async def ask(self, index: int, due: float) -> Outcome:
        """Send a request that was to be sent at ``due`` (of ``time.perf_counter``), and judge its answer."""
        case = self._cases[index % len(self._cases)]
        self.sent += 1
        late = time.perf_counter() - due
        try:
            response = await self._pools[self.sent % POOLS].post(GENERATIONS, json=case.body(self._model))
        except httpx.HTTPError as error:
            fault = f"{type(error).__name__}: {error}"
            return Outcome("failed", None, time.perf_counter() - due, fault, late)
        seconds = time.perf_counter() - due
        kind, fault = self._judge(case, response)
        return Outcome(kind, response.status_code, seconds, fault, late)

    async def metrics(self) -> dict[str, float]:
        """The service's figures; labels are a part of their names."""
        return parse_metrics((await self._http.get("/metrics")).raise_for_status().text)

    async def wait_ready(self, seconds: float) -> None:
        """Raises:
        TimeoutError: the service was not ready in time.
        """
        end = time.perf_counter() + seconds
        while not await self._is_ready():
            if time.perf_counter() > end:
                raise TimeoutError(f"{self._http.base_url} was not ready within {seconds:g} s")
            await asyncio.sleep(0.1)

    async def _is_ready(self) -> bool:
        try:
            return (await self._http.get("/readyz")).status_code == 200
        except httpx.TransportError:
            return False

    def _judge(self, case: Case, response: httpx.Response) -> tuple[Kind, str]:
        if response.status_code == 200:
            fault = self._images.fault(case, response.json())
            return ("wrong", fault) if fault else ("generated", "")
        if response.status_code == 503:
            patient = response.headers.get("Retry-After", "").isdigit()
            return ("rejected", "") if patient else ("failed", "503 without Retry-After")
        if response.status_code == 504:
            return "timed out", ""
        return "failed", f"{response.status_code}: {response.text[:200]}"


def parse_metrics(text: str) -> dict[str, float]:
    """Prometheus' text format: every sample by its name and labels."""
    samples = (line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, value in samples}


def answers_by_status(metrics: Mapping[str, float]) -> dict[int, int]:
    """The number of answers to requests for images, by HTTP status, as the service counts them."""
    found = {}
    for name, value in metrics.items():
        if name.startswith("hypersd_requests_total{") and f'path="{GENERATIONS}"' in name:
            found[int(name.split('code="')[1].split('"')[0])] = int(value)
    return found
