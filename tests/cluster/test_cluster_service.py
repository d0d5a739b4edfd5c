"""Requests whose replica is lost, busy or late, with a stand-in for Ray's handle."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, TaskCancelledError
from ray.serve.exceptions import BackPressureError

from hypersd.cluster.cluster_service import ATTEMPTS, ClusterService
from hypersd.errors import EngineError, RequestError
from hypersd.runtime.params import Params
from hypersd.serve.service_errors import NotReadyError, QueueFullError, StoppingError, TimedOutError
from hypersd.serve.service_request import ServiceRequest

REQUEST = ServiceRequest(model="demo15", params=Params(prompt="a red circle", seed=(7,)))
LOSSES = (ActorDiedError(), ActorUnavailableError("unavailable", None), TaskCancelledError())


class Response:
    """Ends with a value or an error, or never."""

    def __init__(self, outcome: Any) -> None:
        self.outcome, self.cancelled = outcome, False

    def __await__(self) -> Any:
        if self.outcome is None:
            yield from asyncio.Event().wait().__await__()
        if isinstance(self.outcome, list) and isinstance(self.outcome[0], BaseException):
            raise self.outcome[0]
        return self.outcome

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """A deployment's handle; call i of ``generate`` has outcome i; ``raising`` makes an error that Ray raises."""

    def __init__(self, outcomes: Sequence[Any]) -> None:
        self.responses: list[Response] = []
        self.seeds: list[tuple[int, ...]] = []
        self._outcomes = iter(outcomes)

    @property
    def generate(self) -> Handle:
        return self

    def remote(self, service_request: ServiceRequest, timeout: float) -> Response:
        self.seeds.append(service_request.seeds)
        self.responses.append(Response(next(self._outcomes)))
        return self.responses[-1]


def raising(error: BaseException) -> list[BaseException]:
    return [error]


def service_of(*outcomes: Any) -> tuple[ClusterService, Handle]:
    handle = Handle(outcomes)
    fake: Any = handle
    return ClusterService(fake), handle


def generate(service: ClusterService, timeout: float = 5.0) -> Any:
    return asyncio.run(service.generate(REQUEST, timeout))


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_a_request_whose_replica_is_lost_is_generated_by_another(loss: BaseException) -> None:
    """With the seeds of the first attempt: the client cannot tell."""
    service, handle = service_of(raising(loss), ["image"])
    assert generate(service) == ["image"]
    assert handle.seeds == [(7,), (7,)]
    assert b'hypersd_failed_images_total{error="ReplicaDied"} 1.0' in service.metrics.exposition()


def test_a_request_that_kills_replicas_does_not_kill_all() -> None:
    """A request that crashes the driver crashes it on every GPU."""
    service, handle = service_of(*[raising(ActorDiedError())] * 10)
    with pytest.raises(EngineError, match="died 3 times"):
        generate(service)
    assert len(handle.responses) == ATTEMPTS


def test_a_full_queue_is_reported_at_once_with_a_time() -> None:
    """Ray's rejection is a 503 with Retry-After for clients, and is counted."""
    service, handle = service_of(raising(BackPressureError(64, 64)))
    with pytest.raises(QueueFullError, match="64 requests wait, 64 may") as caught:
        generate(service)
    assert caught.value.retry_after >= 1
    assert len(handle.responses) == 1
    assert b'hypersd_rejected_total{reason="queue_full"} 1.0' in service.metrics.exposition()


@pytest.mark.parametrize("error", [RequestError("width 7: expected a multiple of 8"), EngineError("out of memory")])
def test_an_error_from_a_replica_is_not_retried(error: Exception) -> None:
    """Another replica would give the same error."""
    service, handle = service_of(error)
    with pytest.raises(type(error), match=str(error)):
        generate(service)
    assert len(handle.responses) == 1


def leave_early(service: ClusterService) -> Callable[[], Any]:
    async def leave() -> None:
        task = asyncio.ensure_future(service.generate(REQUEST, 60.0))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    return lambda: asyncio.run(leave())


def test_a_request_that_nobody_waits_for_is_cancelled_at_the_replica() -> None:
    """A client that leaves, and a timeout, free the replica's queue."""
    service, handle = service_of(None, None)
    with pytest.raises(TimedOutError, match=r"0\.05 s"):
        generate(service, timeout=0.05)
    leave_early(service)()
    assert [response.cancelled for response in handle.responses] == [True, True]


def test_nothing_is_generated_before_the_bundles_are_known_or_after_the_stop() -> None:
    """Ray routes requests to an ingress as soon as it runs: it answers what ``hypersd serve`` answers then."""
    service, handle = service_of(["image"])
    assert not service.is_ready()
    with pytest.raises(NotReadyError):
        service.models()
    service.stop()
    with pytest.raises(StoppingError):
        generate(service)
    assert not handle.responses
