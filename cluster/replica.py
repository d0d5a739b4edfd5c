"""The process on each GPU: a service of its own, started and watched by Ray."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ray.serve import metrics

from ..errors import EngineError, HyperSDError
from ..serve.calls import keep_prompts_out_of_the_log
from ..serve.lora_folder import LoraFolder
from ..serve.metrics import Metrics
from ..serve.schemas import ModelCard
from ..serve.service import LocalService
from ..serve.service_request import GeneratedImage, ServiceRequest
from .bundles import SharedBundle, find_or_fetch


class Replica:
    """A replica: generates with all bundles on one device.

    Errors for clients are returned, not raised: Ray would wrap a raised error and write its traceback into the log.
    """

    def __init__(
        self,
        bundles: Sequence[SharedBundle],
        shelf: Any,
        *,
        device: str,
        queue: int,
        max_batch: int,
        loras: Callable[[], LoraFolder | None] = lambda: None,
        **load: Any,
    ) -> None:
        """Load the bundles and warm up; Ray sends requests afterwards.

        Args:
            shelf: the handle of a deployed :class:`BundleShelf`.
            device: ``"cuda"``, the one GPU that Ray shows to this process, or ``"cpu"``.
            queue: the most images that wait here.
            max_batch: the most images of one call.
            loras: opens the folder of LoRAs on this machine, if there is one.
            load: further arguments of :meth:`hypersd.Pipeline.load`.

        Raises:
            HyperSDError: a bundle could not be copied or loaded, or the folder of LoRAs is not on this machine.
        """
        keep_prompts_out_of_the_log()
        with ThreadPoolExecutor(1) as pool:  # Ray's handles refuse to wait in this thread, which has an event loop
            folders = pool.submit(_find_all, bundles, shelf).result()
        self._service = LocalService(
            folders,
            devices=[device],
            queue=queue,
            max_batch=max_batch,
            metrics=ReplicaMetrics(),
            lora_folder=loras(),
            **load,
        )
        self._service.start()
        self._service.wait_ready()

    async def generate(self, service_request: ServiceRequest, timeout: float) -> list[GeneratedImage] | HyperSDError:
        """The images or the error (see :meth:`hypersd.serve.service.Service.generate`)."""
        try:
            return await self._service.generate(service_request, timeout)
        except HyperSDError as error:
            return error

    def models(self) -> list[ModelCard]:
        """The served bundles."""
        return self._service.models()

    def check_health(self) -> None:
        """Check the device; Ray calls this every few seconds, and replaces a replica that raises.

        Raises:
            EngineError: the last calls of the device have all failed.
        """
        if not self._service.is_ready():
            raise EngineError("the device fails at every call: a new process is needed")


def _find_all(bundles: Sequence[SharedBundle], shelf: Any) -> list[Path]:
    def read(digest: str, file: str, offset: int) -> bytes:
        return shelf.read.remote(digest, file, offset).result()

    return [find_or_fetch(bundle, read) for bundle in bundles]


class ReplicaMetrics(Metrics):
    """A replica's metrics, exported by Ray: named as those of ``hypersd serve``, prefixed with ``ray_``.

    Ray adds labels for the application, deployment and replica.
    """

    def watch_queue(self, length: Callable[[], int]) -> None:
        """Ray counts what is at a replica itself."""

    def watch_device(self, device: str, memory: Callable[[], Mapping[str, float]]) -> None:
        """Ray watches the memory of GPUs itself."""

    def _counter(self, name: str, words: str, *labels: str) -> Any:
        keys: Any = labels  # declared as one string
        return _Labelled(metrics.Counter(f"hypersd_{name}", words, tag_keys=keys), labels)

    def _histogram(self, name: str, words: str, buckets: tuple[float, ...], *labels: str) -> Any:
        keys: Any = labels
        return _Labelled(metrics.Histogram(f"hypersd_{name}", words, list(buckets), tag_keys=keys), labels)


class _Labelled:
    """Adapts a Ray metric to the interface of prometheus-client."""

    def __init__(self, figure: Any, names: tuple[str, ...], values: tuple[str, ...] = ()) -> None:
        self._figure, self._names, self._values = figure, names, values

    def labels(self, *values: str) -> _Labelled:
        return _Labelled(self._figure, self._names, values)

    def inc(self, amount: float = 1.0) -> None:
        self._figure.inc(amount, tags=self._tags)

    def observe(self, value: float) -> None:
        self._figure.observe(value, tags=self._tags)

    @property
    def _tags(self) -> dict[str, str]:
        return dict(zip(self._names, self._values, strict=True))
