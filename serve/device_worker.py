"""The thread that owns a device and generates with the pipelines on it."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from ..errors import EngineError, HyperSDError, RequestError, one_line
from ..runtime import Pipeline
from ..runtime.metadata import image_metadata
from ..runtime.request import Request
from .calls import call_params, images_at_once, warm_up
from .job_queue import Job, JobQueue
from .metrics import Metrics
from .service_request import GeneratedImage

LOG = logging.getLogger(__name__)
FAILURES_UNTIL_UNWELL = 3  # calls in a row: a device that has crashed does not come back


class Worker(threading.Thread):
    """Loads the bundles on a device, warms them up, and generates the queue's images until the queue is closed.

    Attributes:
        pipelines: by the bundle's name; empty before they are ready and after a failure.
        failure: the error that ended the worker.
    """

    def __init__(
        self, load: Callable[[], Mapping[str, Pipeline]], jobs: JobQueue, metrics: Metrics, max_batch: int, name: str
    ) -> None:
        super().__init__(name=f"hypersd {name}", daemon=True)
        self.pipelines: Mapping[str, Pipeline] = {}
        self.failure: BaseException | None = None
        self.seconds_per_image = 0.0  # moving average
        self._load, self._jobs, self._metrics, self._max_batch = load, jobs, metrics, max_batch
        self._is_loaded = threading.Event()
        self._failures = 0

    @property
    def is_well(self) -> bool:
        """Whether the worker is running and ready, and has not failed at each of its last calls."""
        return (
            self.is_alive()
            and self._is_loaded.is_set()
            and self.failure is None
            and self._failures < FAILURES_UNTIL_UNWELL
        )

    def wait_loaded(self, timeout: float | None = None) -> bool:
        """Wait until the bundles are loaded or could not be; False after ``timeout`` seconds."""
        return self._is_loaded.wait(timeout)

    def run(self) -> None:
        try:
            pipelines = self._load()
            for pipe in pipelines.values():
                warm_up(pipe, self._max_batch)
            self.pipelines = pipelines
        except BaseException as error:  # wait_ready raises it
            self.failure = error
            return
        finally:
            self._is_loaded.set()
        while jobs := self._jobs.take(self._most):
            try:
                self._generate(jobs)
            except BaseException as error:  # nothing but the end of this thread is left
                self._end(jobs, error)
                return

    def _most(self, job: Job) -> int:
        return min(self._max_batch, images_at_once(self.pipelines[job.model]))

    def _generate(self, jobs: Sequence[Job]) -> None:
        """Generate jobs with equal keys in one call; if it fails each alone, so that one does not spoil the others."""
        try:
            self._generate_together(self.pipelines[jobs[0].model], jobs)
        except Exception as error:
            if len(jobs) == 1:
                self._fail(jobs[0], error)
                return
            for job in jobs:
                self._generate([job])

    def _generate_together(self, pipe: Pipeline, jobs: Sequence[Job]) -> None:
        began = time.monotonic()
        output = pipe.generate(call_params(jobs))
        seconds = (time.monotonic() - began) / len(jobs)
        self.seconds_per_image += (seconds - self.seconds_per_image) * (0.2 if self.seconds_per_image else 1.0)
        self._failures = 0
        self._metrics.saw_call(jobs[0].model, len(jobs), output.timings)
        finished = [
            GeneratedImage(
                image=image,
                seed=job.seed,
                request=_without_files(job.request),
                metadata=image_metadata(pipe.manifest, job.request, job.seed),
                timings=output.timings,
                waited=began - job.queued_at,
                batch=len(jobs),
            )
            for job, image in zip(jobs, output.images, strict=True)
        ]
        for job, result in zip(jobs, finished, strict=True):  # all or none: after an error each job is generated alone
            self._metrics.saw_wait(result.waited)
            job.result.set_result(result)

    def _end(self, jobs: Sequence[Job], error: BaseException) -> None:
        """Fail the jobs in hand, and give up the device."""
        LOG.critical("%s has ended", self.name, exc_info=error)
        self.failure, self.pipelines = error, {}
        for job in jobs:
            if not job.result.done():
                job.result.set_exception(EngineError(f"the device's worker has ended ({type(error).__name__})"))

    def _fail(self, job: Job, error: Exception) -> None:
        if not isinstance(error, RequestError):  # these do not concern the device: any client can cause them
            self._failures += 1
            LOG.error("an image could not be generated", exc_info=error)  # the client sees only one line
        self._metrics.saw_failure(type(error).__name__)
        job.result.set_exception(_client_error(error))


def _without_files(request: Request) -> Request:
    """The request without the contents of its LoRA files, which are large where it goes to another process."""
    adapters = tuple(dataclasses.replace(each, adapter=None) for each in request.adapters)
    return dataclasses.replace(request, adapters=adapters)


def _client_error(error: Exception) -> HyperSDError:
    """The error that the client sees."""
    if isinstance(error, HyperSDError):
        return error
    if isinstance(error, MemoryError):
        return EngineError("out of memory: generate smaller images, or fewer at a time")
    return EngineError(f"generating failed ({type(error).__name__}: {one_line(error)})")
