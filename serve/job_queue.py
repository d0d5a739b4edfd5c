"""A bounded queue of images; it hands out together the images that one call can generate."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future

from PIL import Image

from ..runtime.params import Params
from ..runtime.request import Request
from .service_errors import QueueFullError, StoppingError
from .service_request import GeneratedImage


@dataclasses.dataclass(eq=False)
class Job:
    """One image to generate.

    Attributes:
        model: the name of the bundle.
        params: of this image, without its seed.
        request: the decided params.
        control: the images that the ControlNets see, in the output size, by the ControlNets' names.
        image: the init image, in the output size unless ``params`` ask for a part of it, or None; likewise ``mask``.
        key: equal for jobs that one call of a pipeline can generate.
        result: the image; if it is cancelled while the job waits, the image is not generated.
    """

    model: str
    seed: int
    params: Params
    request: Request
    control: dict[str, Image.Image]
    key: Hashable
    image: Image.Image | None = None
    mask: Image.Image | None = None
    result: Future[GeneratedImage] = dataclasses.field(default_factory=Future)
    queued_at: float = dataclasses.field(default_factory=time.monotonic)


class JobQueue:
    """First come, first served; the jobs that one call can generate with the oldest are taken with it.

    Any number of threads may put and take.
    """

    def __init__(self, size: int) -> None:
        """Make an empty queue for at most ``size`` images."""
        self.size = size
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._is_closed = False

    def __len__(self) -> int:
        """The number of waiting images that were not cancelled."""
        with self._changed:
            self._drop_cancelled()
            return len(self._jobs)

    def put(self, jobs: Sequence[Job], retry_after: int = 1) -> None:
        """Append all jobs, or none.

        Raises:
            QueueFullError: the queue has no room for them.
            StoppingError: the queue is closed.
        """
        with self._changed:
            if self._is_closed:
                raise StoppingError("the service is stopping: ask another, or again later", retry_after)
            self._drop_cancelled()
            if len(self._jobs) + len(jobs) > self.size:
                raise QueueFullError(f"{len(self._jobs)} images wait, {self.size} may: ask again later", retry_after)
            self._jobs.extend(jobs)
            self._changed.notify(len(jobs))

    def take(self, most: Callable[[Job], int]) -> list[Job]:
        """Take up to ``most(oldest)`` jobs with equal keys, the oldest first; waits for the first, not for more.

        The list is empty once the queue is closed. Cancelled jobs are dropped; a job that was taken cannot be
        cancelled any more.
        """
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._jobs or self._is_closed)
                if not self._jobs:
                    return []
                if taken := self._take_alike(most):
                    return taken

    def close(self) -> list[Job]:
        """Close the queue: fail and return the waiting jobs, reject new ones, and wake blocked takers."""
        with self._changed:
            self._is_closed = True
            waiting = [job for job in self._jobs if job.result.set_running_or_notify_cancel()]
            self._jobs.clear()
            self._changed.notify_all()
        for job in waiting:
            job.result.set_exception(StoppingError("the service is stopping: ask another, or again later"))
        return waiting

    def _take_alike(self, most: Callable[[Job], int]) -> list[Job]:
        """Remove and return the oldest job and jobs with its key; cancelled jobs before them are dropped."""
        taken: list[Job] = []
        others: deque[Job] = deque()
        while self._jobs and (not taken or len(taken) < most(taken[0])):
            job = self._jobs.popleft()
            if taken and job.key != taken[0].key:
                others.append(job)
            elif job.result.set_running_or_notify_cancel():
                taken.append(job)
        self._jobs.extendleft(reversed(others))
        return taken

    def _drop_cancelled(self) -> None:
        if any(job.result.cancelled() for job in self._jobs):
            self._jobs = deque(job for job in self._jobs if not job.result.cancelled())
