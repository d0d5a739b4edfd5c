"""A bounded queue of images that groups those which can be drawn together."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future

from PIL import Image

from ..runtime.request import Request
from .service_errors import QueueFullError, StoppingError
from .service_request import GeneratedImage, ServiceRequest


@dataclasses.dataclass(eq=False)
class Job:
    """One image to draw.

    Attributes:
        request: the drawing's, checked.
        control: images as the ControlNets are to see them, of the size that is drawn.
        key: equal for jobs that one call of a pipeline can draw.
        result: cancelled while the job waits, it is not drawn.
    """

    service_request: ServiceRequest
    seed: int
    request: Request
    control: dict[str, Image.Image]
    key: Hashable
    result: Future[GeneratedImage] = dataclasses.field(default_factory=Future)
    queued_at: float = dataclasses.field(default_factory=time.monotonic)


class JobQueue:
    """First come, first served; whoever takes a job takes those behind it that can be drawn with it.

    Any number of threads may put and take.
    """

    def __init__(self, size: int) -> None:
        """``size``: the most images that wait."""
        self.size = size
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._is_closed = False

    def __len__(self) -> int:
        """Images that wait, and that somebody still waits for."""
        with self._changed:
            self._drop_cancelled()
            return len(self._jobs)

    def put(self, jobs: Sequence[Job], retry_after: int = 1) -> None:
        """Append all jobs, or none.

        Raises:
            QueueFullError: the queue has no room for them.
            StoppingError: it is closed.
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
        """Up to ``most(oldest)`` jobs of one key, the oldest first; waits for the first, not for more.

        Nothing is in the list once the queue is closed. Jobs that were cancelled are dropped; those that are taken
        cannot be cancelled any more.
        """
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._jobs or self._is_closed)
                if not self._jobs:
                    return []
                if taken := self._take_alike(most):
                    return taken

    def close(self) -> list[Job]:
        """Refuse what waits, which is returned, and what comes; those who take are sent home."""
        with self._changed:
            self._is_closed = True
            waiting = [job for job in self._jobs if job.result.set_running_or_notify_cancel()]
            self._jobs.clear()
            self._changed.notify_all()
        for job in waiting:
            job.result.set_exception(StoppingError("the service is stopping: ask another, or again later"))
        return waiting

    def _take_alike(self, most: Callable[[Job], int]) -> list[Job]:
        """The oldest and those like it; cancelled jobs on the way to them go, too."""
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
