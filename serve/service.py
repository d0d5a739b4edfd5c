"""Draws for any number of callers at once: a bounded queue, and a worker thread for each device."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..engines import Bundle
from ..engines.bundle import MANIFEST_NAME
from ..errors import RequestError
from ..runtime import Pipeline
from .calls import call_key, control_images, request_params
from .cards import ModelCard, make_card
from .device_worker import Worker
from .job_queue import Job, JobQueue
from .metrics import Metrics
from .service_errors import NotReadyError, StoppingError, TimedOutError, UnavailableError, UnknownModelError
from .service_request import GeneratedImage, ServiceRequest


class Service(Protocol):
    """What the HTTP side draws with."""

    metrics: Metrics

    def models(self) -> list[ModelCard]:
        """The bundles that are served; the first is the one that is meant where none is named.

        Raises:
            NotReadyError: they are still being loaded.
        """
        ...

    def is_ready(self) -> bool:
        """Whether a request would be drawn now."""
        ...

    async def generate(
        self, service_request: ServiceRequest, timeout: float, superseded: asyncio.Event | None = None
    ) -> list[GeneratedImage]:
        """The images of a drawing, one for each seed.

        What still waits is not drawn once the call is cancelled, or ``superseded`` is set: the list then holds those
        images that had been begun.

        Raises:
            RequestError: an argument is out of range.
            UnavailableError: the queue is full, or the service starts or stops.
            TimedOutError: they were not finished after ``timeout`` seconds.
            EngineError: an engine failed.
        """
        ...

    def stop(self) -> None:
        """Refuse what waits and what comes; what is being drawn is finished."""
        ...


class LocalService:
    """Bundles on this machine's devices. Every device holds all bundles and takes from the same queue."""

    def __init__(
        self,
        bundles: Sequence[str | Path],
        *,
        devices: Sequence[str] = ("auto",),
        queue: int = 64,
        max_batch: int = 8,
        metrics: Metrics | None = None,
        **load: Any,
    ) -> None:
        """Nothing is loaded before :meth:`start`.

        Args:
            bundles: folders that ``hypersd export`` wrote; their names are what requests call them.
            devices: ``"cpu"``, ``"cuda:0"`` and so on, a worker for each.
            queue: the most images that wait; more are refused.
            max_batch: the most images that one call draws.
            metrics: where figures go.
            load: further arguments of :meth:`hypersd.Pipeline.load`.

        Raises:
            BundleError: a folder holds no bundle.
            RequestError: two have the same name.
        """
        self.folders = name_folders(bundles)
        self._loaded_from = {name: _manifest_bytes(folder) for name, folder in self.folders.items()}
        self.metrics = metrics or Metrics()
        self._load = load
        self._jobs = JobQueue(queue)
        self._created = int(time.time())
        self._stopping = False
        self.workers = [
            Worker(lambda device=device: self._load_all(device), self._jobs, self.metrics, max_batch, device)
            for device in devices
        ]
        self.metrics.watch_queue(lambda: len(self._jobs))

    def start(self) -> None:
        """Load and warm up in the background."""
        for worker in self.workers:
            worker.start()

    def wait_ready(self) -> None:
        """Wait until every worker is ready.

        Raises:
            HyperSDError: one could not load its bundles.
        """
        for worker in self.workers:
            worker.wait_loaded()
        if failure := self.failure:
            raise failure

    @property
    def failure(self) -> BaseException | None:
        """Why the bundles could not be loaded."""
        return next((worker.failure for worker in self.workers if worker.failure is not None), None)

    def is_ready(self) -> bool:
        return not self._stopping and any(worker.is_well for worker in self.workers)

    def models(self) -> list[ModelCard]:
        return [
            make_card(name, pipe, self._created, _manifest_bytes(self.folders[name]) != self._loaded_from[name])
            for name, pipe in self._pipelines().items()
        ]

    async def generate(
        self, service_request: ServiceRequest, timeout: float, superseded: asyncio.Event | None = None
    ) -> list[GeneratedImage]:
        jobs = await asyncio.to_thread(self._jobs_of, service_request)
        try:
            self._jobs.put(jobs, self._retry_after())
        except UnavailableError as error:
            self.metrics.saw_refusal(error.code)
            raise
        watcher = asyncio.ensure_future(self._drop_superseded(superseded, jobs))
        reason = "cancelled"
        try:
            return await asyncio.wait_for(_finished(jobs), timeout)
        except asyncio.TimeoutError:
            reason = "timeout"
            raise TimedOutError(f"not finished within {timeout:g} s: ask for fewer images, or again later") from None
        finally:
            watcher.cancel()
            self._drop(jobs, reason)

    def stop(self) -> None:
        self._stopping = True
        for _ in self._jobs.close():
            self.metrics.saw_refusal(StoppingError.code)

    def join(self, timeout: float | None = None) -> None:
        """Wait for what is being drawn."""
        for worker in self.workers:
            if worker.is_alive():
                worker.join(timeout)

    def _load_all(self, device: str) -> dict[str, Pipeline]:
        pipelines = {name: Pipeline.load(folder, device=device, **self._load) for name, folder in self.folders.items()}
        for pipe in pipelines.values():
            if pipe.device.type == "cuda":
                self.metrics.watch_device(str(pipe.device), lambda device=pipe.device: _cuda_memory(device))
                break
        return pipelines

    def _pipelines(self) -> Mapping[str, Pipeline]:
        """Those of some worker: all have the same."""
        for worker in self.workers:
            if worker.pipelines:
                return worker.pipelines
        raise NotReadyError("the bundles are still being loaded: ask again later", retry_after=2)

    def _jobs_of(self, service_request: ServiceRequest) -> list[Job]:
        """The drawing's images, checked. Takes milliseconds, more with control images."""
        pipelines = self._pipelines()
        if service_request.model not in pipelines:
            raise UnknownModelError(
                f"model {service_request.model!r} is not served here: expected {' or '.join(pipelines)}"
            )
        pipe = pipelines[service_request.model]
        request = pipe.decide(request_params(service_request))
        control = control_images(pipe, service_request, request)
        key = call_key(service_request, request)
        return [
            Job(service_request=service_request, seed=s, request=request, control=control, key=key)
            for s in service_request.seeds
        ]

    async def _drop_superseded(self, superseded: asyncio.Event | None, jobs: Sequence[Job]) -> None:
        if superseded is not None:
            await superseded.wait()
            self._drop(jobs, "superseded")

    def _drop(self, jobs: Sequence[Job], reason: str) -> None:
        """Cancel what no worker has begun."""
        if dropped := sum(job.result.cancel() for job in jobs if not job.result.done()):
            self.metrics.saw_dropped(reason, dropped)

    def _retry_after(self) -> int:
        """Whole seconds until about half of what waits is drawn."""
        seconds = sum(worker.seconds_per_image for worker in self.workers) / len(self.workers)
        return max(1, math.ceil(len(self._jobs) * seconds / len(self.workers) / 2))


async def _finished(jobs: Sequence[Job]) -> list[GeneratedImage]:
    """The images that were drawn; raises what made one fail."""
    # Shielded: if the wait is cancelled, the jobs are cancelled by who counts them.
    futures = [asyncio.shield(asyncio.wrap_future(job.result)) for job in jobs]
    results = await asyncio.gather(*futures, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return [result for result in results if isinstance(result, GeneratedImage)]


def name_folders(bundles: Sequence[str | Path]) -> dict[str, Path]:
    """Bundles by the names of their folders.

    Raises:
        BundleError: one is none.
        RequestError: two have the same name.
    """
    folders: dict[str, Path] = {}
    for bundle in bundles:
        folder = Bundle.load(bundle).root.resolve()
        if folder.name in folders:
            raise RequestError(f"two bundles are called {folder.name}: expected different names; rename a folder")
        folders[folder.name] = folder
    return folders


def _manifest_bytes(folder: Path) -> bytes | None:
    try:
        return (folder / MANIFEST_NAME).read_bytes()
    except OSError:
        return None


def _cuda_memory(device: Any) -> dict[str, float]:
    import torch

    free, total = torch.cuda.mem_get_info(device)
    return {"used": float(total - free), "total": float(total)}
