"""What runs on each GPU: a service of its own, in a process that Ray starts and watches."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..errors import EngineError, HyperSDError
from ..serve.calls import keep_prompts_out_of_the_log
from ..serve.schemas import ModelCard
from ..serve.service import LocalService
from ..serve.service_request import GeneratedImage, ServiceRequest
from .bundles import SharedBundle, find_or_fetch
from .ray_metrics import ReplicaMetrics


class Drawer:
    """A replica: draws with all bundles on one device.

    Errors that are told to clients are values here. Raised, Ray would wrap them, and write a traceback of each into
    its log.
    """

    def __init__(
        self, bundles: Sequence[SharedBundle], shelf: Any, *, device: str, queue: int, max_batch: int, **load: Any
    ) -> None:
        """Load the bundles and warm up; the replica gets requests when that is done.

        Args:
            shelf: the handle of a deployed :class:`BundleShelf`.
            device: ``"cuda"``, the one GPU that Ray shows to this process, or ``"cpu"``.
            queue: the most images that wait here.
            max_batch: the most images that one call draws.
            load: further arguments of :meth:`hypersd.Pipeline.load`.

        Raises:
            HyperSDError: a bundle could not be fetched or loaded.
        """
        keep_prompts_out_of_the_log()
        with ThreadPoolExecutor(1) as pool:  # Ray's handles refuse to wait in this thread, which has an event loop
            folders = pool.submit(_find_all, bundles, shelf).result()
        metrics = ReplicaMetrics()
        self._service = LocalService(
            folders, devices=[device], queue=queue, max_batch=max_batch, metrics=metrics, **load
        )
        self._service.start()
        self._service.wait_ready()

    async def generate(self, service_request: ServiceRequest, timeout: float) -> list[GeneratedImage] | HyperSDError:
        """The images, or why there are none (see :meth:`hypersd.serve.service.Service.generate`)."""
        try:
            return await self._service.generate(service_request, timeout)
        except HyperSDError as error:
            return error

    def models(self) -> list[ModelCard]:
        """The bundles that are served."""
        return self._service.models()

    def check_health(self) -> None:
        """Ray calls this every few seconds, and replaces the replica if it fails.

        Raises:
            EngineError: the device has failed at each of its last calls.
        """
        if not self._service.is_ready():
            raise EngineError("the device fails at every call: a new process is needed")


def _find_all(bundles: Sequence[SharedBundle], shelf: Any) -> list[Path]:
    def read(digest: str, file: str, offset: int) -> bytes:
        return shelf.read.remote(digest, file, offset).result()

    return [find_or_fetch(bundle, read) for bundle in bundles]
