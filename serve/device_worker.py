"""The thread that owns a device and the pipelines on it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from ..errors import EngineError, HyperSDError, RequestError, one_line
from ..runtime import Pipeline
from ..runtime.metadata import image_metadata
from .calls import call_params, images_at_once, warm_up
from .job_queue import Job, JobQueue
from .metrics import Metrics
from .service_request import GeneratedImage

LOG = logging.getLogger(__name__)
FAILURES_UNTIL_UNWELL = 3  # calls in a row: a device that has crashed does not come back


class Worker(threading.Thread):
    """Loads the bundles on a device, warms them up, and draws what is in the queue until that is closed.

    Attributes:
        pipelines: by the bundle's name, once they are ready.
        failure: why they could not be loaded.
    """

    def __init__(
        self, load: Callable[[], Mapping[str, Pipeline]], jobs: JobQueue, metrics: Metrics, max_batch: int, name: str
    ) -> None:
        super().__init__(name=f"hypersd {name}", daemon=True)
        self.pipelines: Mapping[str, Pipeline] = {}
        self.failure: BaseException | None = None
        self.seconds_per_image = 0.0  # of late
        self._load, self._jobs, self._metrics, self._max_batch = load, jobs, metrics, max_batch
        self._is_loaded = threading.Event()
        self._failures = 0

    @property
    def is_well(self) -> bool:
        """Whether it is ready to draw, and has not failed at each of its last calls."""
        return self._is_loaded.is_set() and self.failure is None and self._failures < FAILURES_UNTIL_UNWELL

    def wait_loaded(self, timeout: float | None = None) -> bool:
        """Wait until it is ready, or has failed to be."""
        return self._is_loaded.wait(timeout)

    def run(self) -> None:
        try:
            pipelines = self._load()
            for pipe in pipelines.values():
                warm_up(pipe)
            self.pipelines = pipelines
        except BaseException as error:  # told by whoever waits
            self.failure = error
            return
        finally:
            self._is_loaded.set()
        while jobs := self._jobs.take(self._most):
            self._generate(jobs)

    def _most(self, job: Job) -> int:
        return min(self._max_batch, images_at_once(self.pipelines[job.service_request.model]))

    def _generate(self, jobs: Sequence[Job]) -> None:
        """Draw jobs of one key together; if that fails each alone, because one must not spoil the others'."""
        try:
            self._generate_together(self.pipelines[jobs[0].service_request.model], jobs)
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
        self._metrics.saw_call(jobs[0].service_request.model, len(jobs), output.timings)
        for job, image in zip(jobs, output.images, strict=True):
            waited = began - job.queued_at
            self._metrics.saw_wait(waited)
            job.result.set_result(
                GeneratedImage(
                    image=image,
                    seed=job.seed,
                    request=job.request,
                    metadata=image_metadata(pipe.manifest, job.request, job.seed),
                    timings=output.timings,
                    waited=waited,
                    batch=len(jobs),
                )
            )

    def _fail(self, job: Job, error: Exception) -> None:
        if not isinstance(error, RequestError):  # which says nothing of the device, and clients can cause at will
            self._failures += 1
            LOG.error("an image could not be drawn", exc_info=error)  # the client is told one line
        self._metrics.saw_failure(type(error).__name__)
        job.result.set_exception(_in_words(error))


def _in_words(error: Exception) -> HyperSDError:
    """What the client is told."""
    if isinstance(error, HyperSDError):
        return error
    if isinstance(error, MemoryError):
        return EngineError("out of memory: draw smaller images, or fewer at a time")
    return EngineError(f"drawing failed ({type(error).__name__}: {one_line(error)})")
