"""The service for the HTTP side; replicas on the cluster generate the images."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time

from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, RayError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from ..errors import EngineError, HyperSDError
from ..serve.metrics import Metrics
from ..serve.schemas import ModelCard
from ..serve.service_errors import NotReadyError, QueueFullError, StoppingError, TimedOutError, UnavailableError
from ..serve.service_request import GeneratedImage, ServiceRequest

ATTEMPTS = 3  # at a request whose replica died: a request that kills its replica must not kill all replicas
ASK_AGAIN = 0.5  # seconds, while no replica is ready
REFRESH = 5.0  # seconds between two queries of the bundles and their LoRAs
#: errors of a lost replica; a task is cancelled when its replica dies
LOST = (RayActorError, NodeDiedError, ObjectLostError, TaskCancelledError)


class ClusterService:
    """Generates with the replicas of a deployment (:class:`hypersd.cluster.replica.Replica`).

    A request whose replica dies goes to another one: its seeds were decided here, so the images are the same. A
    request that is superseded after it was sent to a replica is still generated.
    """

    def __init__(self, replica: DeploymentHandle) -> None:
        self.metrics = Metrics()
        self._replica = replica
        self._cards: list[ModelCard] = []
        self._stopping = False
        self._seconds = 0.0  # of the last request, its wait included

    async def watch(self) -> None:
        """Query the served bundles repeatedly; the service is ready from the first answer on."""
        while True:
            with contextlib.suppress(RayError, RayServeException):
                self._cards = await self._replica.models.remote()
            await asyncio.sleep(REFRESH if self._cards else ASK_AGAIN)

    def models(self) -> list[ModelCard]:
        if not self._cards:
            raise NotReadyError("the bundles are still being loaded: ask again later", retry_after=2)
        return self._cards

    def is_ready(self) -> bool:
        return bool(self._cards) and not self._stopping

    async def generate(
        self, service_request: ServiceRequest, timeout: float, superseded: asyncio.Event | None = None
    ) -> list[GeneratedImage]:
        began = time.monotonic()
        try:
            images = await asyncio.wait_for(self._generate(service_request, timeout), timeout)
        except asyncio.TimeoutError:
            self.metrics.saw_dropped("timeout", len(service_request.seeds))
            raise TimedOutError(f"not finished within {timeout:g} s: ask for fewer images, or again later") from None
        except UnavailableError as error:
            self.metrics.saw_rejection(error.code)
            raise
        self._seconds = time.monotonic() - began
        return images

    def stop(self) -> None:
        self._stopping = True

    async def _generate(self, service_request: ServiceRequest, timeout: float) -> list[GeneratedImage]:
        for _ in range(ATTEMPTS):
            if self._stopping:
                raise StoppingError("the service is stopping: ask another, or again later")
            try:
                answer = await self._ask(service_request, timeout)
            except LOST:
                self.metrics.saw_failure("ReplicaDied")
                continue
            except BackPressureError as error:
                message = f"{error.args[0]} requests wait, {error.args[1]} may: ask again later"
                raise QueueFullError(message, self._retry_after()) from None
            except DeploymentUnavailableError as error:
                raise NotReadyError(f"no replica could be started ({error.message}): see Ray's log", 30) from None
            if isinstance(answer, HyperSDError):
                raise answer
            return answer
        raise EngineError(f"the process that generated it died {ATTEMPTS} times: see Ray's log before asking again")

    async def _ask(self, service_request: ServiceRequest, timeout: float) -> list[GeneratedImage] | HyperSDError:
        """One replica's answer. A cancelled call is cancelled there too if it still waits."""
        response = self._replica.generate.remote(service_request, timeout)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise

    def _retry_after(self) -> int:
        """Whole seconds until about half of the waiting images are generated."""
        return max(1, math.ceil(self._seconds / 2))
