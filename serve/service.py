"""The service without HTTP: any number of callers, a bounded queue, and a worker thread for each device."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..engines import Bundle
from ..engines.bundle import MANIFEST_NAME
from ..engines.hub_bundles import bundle_name, find_bundle
from ..errors import RequestError
from ..runtime import Pipeline
from .calls import make_jobs
from .device_worker import Worker
from .job_queue import Job, JobQueue
from .lora_folder import LoraFolder
from .metrics import Metrics
from .model_cards import LoadedManifest, model_card
from .schemas import ModelCard
from .service_errors import NotReadyError, StoppingError, TimedOutError, UnavailableError, UnknownModelError
from .service_request import GeneratedImage, ServiceRequest


class Service(Protocol):
    """The interface between the HTTP side and whatever generates the images."""

    metrics: Metrics

    def models(self) -> list[ModelCard]:
        """The served bundles; requests that name no model use the first.

        Raises:
            NotReadyError: the bundles are still being loaded, or no device is left.
        """
        ...

    def is_ready(self) -> bool:
        """Whether a request would be answered with images now."""
        ...

    async def generate(
        self, service_request: ServiceRequest, timeout: float, superseded: asyncio.Event | None = None
    ) -> list[GeneratedImage]:
        """Generate the images of a request, one for each seed.

        Images that still wait are dropped once the call is cancelled or ``superseded`` is set: the list then holds
        only the images that had been begun.

        Raises:
            RequestError: an argument is out of range.
            UnavailableError: the queue is full, or the service starts or stops.
            TimedOutError: the images were not finished after ``timeout`` seconds.
            EngineError: an engine failed.
        """
        ...

    def stop(self) -> None:
        """Reject waiting and new requests; images that were begun are finished."""
        ...


class LocalService:
    """Generates on this machine's devices. Every device holds all bundles and takes from the same queue."""

    def __init__(
        self,
        bundles: Sequence[str | Path],
        *,
        devices: Sequence[str] = ("auto",),
        queue: int = 64,
        max_batch: int = 8,
        metrics: Metrics | None = None,
        lora_folder: LoraFolder | None = None,
        **load: Any,
    ) -> None:
        """Check the bundles' names; :meth:`start` loads them.

        Args:
            bundles: folders that ``hypersd export`` wrote, or repositories on the Hub; requests call them by the names
                of the folders or repositories.
            devices: ``"cpu"``, ``"cuda:0"`` and so on, a worker for each.
            queue: the most images that wait; more are rejected.
            max_batch: the most images of one call.
            metrics: the figures to update; new ones by default.
            lora_folder: the LoRAs that requests may use.
            load: further arguments of :meth:`hypersd.Pipeline.load`.

        Raises:
            BundleError: a folder holds no bundle.
            RequestError: two folders have the same name; or no bundle has a slot for the LoRAs.
        """
        self.folders = name_folders(bundles)
        if lora_folder is not None:
            check_slots(self.folders)
        self._lora_folder = lora_folder
        self._manifests = {name: LoadedManifest(folder / MANIFEST_NAME) for name, folder in self.folders.items()}
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
        if self._lora_folder is not None:
            self._lora_folder.watch()

    def wait_ready(self) -> None:
        """Wait until every worker is ready.

        Raises:
            HyperSDError: a worker could not load its bundles.
        """
        for worker in self.workers:
            worker.wait_loaded()
        if failure := self.failure:
            raise failure

    @property
    def failure(self) -> BaseException | None:
        """The error of a worker that could not load its bundles, or has ended."""
        return next((worker.failure for worker in self.workers if worker.failure is not None), None)

    def is_ready(self) -> bool:
        return not self._stopping and any(worker.is_well for worker in self.workers)

    def models(self) -> list[ModelCard]:
        return [
            model_card(name, pipe, self._created, self._manifests[name].has_changed())
            for name, pipe in self._pipelines().items()
        ]

    async def generate(
        self, service_request: ServiceRequest, timeout: float, superseded: asyncio.Event | None = None
    ) -> list[GeneratedImage]:
        jobs = await asyncio.to_thread(self._jobs_of, service_request)
        try:
            self._jobs.put(jobs, self._retry_after())
        except UnavailableError as error:
            self.metrics.saw_rejection(error.code)
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
        if self._lora_folder is not None:
            self._lora_folder.end()
        for _ in self._jobs.close():
            self.metrics.saw_rejection(StoppingError.code)

    def join(self, timeout: float | None = None) -> None:
        """Wait for the images that were begun."""
        for worker in self.workers:
            if worker.is_alive():
                worker.join(timeout)

    def _load_all(self, device: str) -> dict[str, Pipeline]:
        pipelines = {name: Pipeline.load(folder, device=device, **self._load) for name, folder in self.folders.items()}
        for pipe in pipelines.values():
            if pipe.device.type == "cuda":
                self.metrics.watch_device(str(pipe.device), lambda device=pipe.device: _cuda_memory(device))
                break
        if self._lora_folder is not None:
            self._lora_folder.join(pipelines)
        return pipelines

    def _pipelines(self) -> Mapping[str, Pipeline]:
        """The pipelines of any working device: all hold the same bundles."""
        for worker in self.workers:
            if worker.pipelines:
                return worker.pipelines
        if self.failure is not None:
            raise NotReadyError("no device is left: ask another service, or restart this one", retry_after=30)
        raise NotReadyError("the bundles are still being loaded: ask again later", retry_after=2)

    def _jobs_of(self, service_request: ServiceRequest) -> list[Job]:
        pipelines = self._pipelines()
        name = service_request.model
        if name not in pipelines:
            raise UnknownModelError(f"model {name!r} is not served here: expected {' or '.join(pipelines)}")
        return make_jobs(pipelines[name], service_request)

    async def _drop_superseded(self, superseded: asyncio.Event | None, jobs: Sequence[Job]) -> None:
        if superseded is not None:
            await superseded.wait()
            self._drop(jobs, "superseded")

    def _drop(self, jobs: Sequence[Job], reason: str) -> None:
        """Cancel jobs that no worker has begun."""
        if dropped := sum(job.result.cancel() for job in jobs if not job.result.done()):
            self.metrics.saw_dropped(reason, dropped)

    def _retry_after(self) -> int:
        """Whole seconds until about half of the waiting images are finished."""
        seconds = sum(worker.seconds_per_image for worker in self.workers) / len(self.workers)
        return max(1, math.ceil(len(self._jobs) * seconds / len(self.workers) / 2))


async def _finished(jobs: Sequence[Job]) -> list[GeneratedImage]:
    """The generated images; raises the error of the first that failed."""
    # Shielded: if the wait is cancelled, LocalService cancels and counts the jobs.
    futures = [asyncio.shield(asyncio.wrap_future(job.result)) for job in jobs]
    results = await asyncio.gather(*futures, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return [result for result in results if isinstance(result, GeneratedImage)]


def name_folders(bundles: Sequence[str | Path]) -> dict[str, Path]:
    """The bundles' folders by their names.

    Raises:
        BundleError: a folder holds no bundle.
        RequestError: two folders have the same name.
    """
    folders: dict[str, Path] = {}
    for bundle in bundles:
        folder = Bundle.load(find_bundle(bundle)).root.resolve()
        name = bundle_name(bundle) or folder.name
        if name in folders:
            raise RequestError(f"two bundles are named {name}: rename one of the folders")
        folders[name] = folder
    return folders


def check_slots(folders: Mapping[str, Path]) -> None:
    """Reject LoRAs for bundles of which none has a slot for them.

    Raises:
        RequestError: none has.
    """
    if not any(Bundle.load(folder).manifest.lora_slot for folder in folders.values()):
        option = "`hypersd export --lora-slot RANK`, such as 32"
        raise RequestError(f"LoRAs at run time: {', '.join(folders)} has no LoRA slot: export it with {option}")


def _cuda_memory(device: Any) -> dict[str, float]:
    import torch

    free, total = torch.cuda.mem_get_info(device)
    return {"used": float(total - free), "total": float(total)}
