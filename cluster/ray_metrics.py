"""A replica's figures among Ray's own, which every node of a cluster exports to Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ray.serve import metrics

from ..serve.metrics import Metrics


class ReplicaMetrics(Metrics):
    """Counters and histograms have the names that ``hypersd serve`` gives them, with ``ray_`` before them.

    Ray adds which application, deployment and replica they are of.
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
    """A figure of Ray's, used as one of prometheus-client."""

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
