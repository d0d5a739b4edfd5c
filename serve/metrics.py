"""What the service tells Prometheus. Seconds and bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
STAGES = ("tokenize", "control", "encode", "denoise", "decode", "convert", "draw", "total")  # single steps are left out


class Metrics:
    """One service's figures, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        self._requests = self._counter("requests", "Answers to HTTP requests", "path", "code")
        self._seconds = self._histogram("request_seconds", "From a request's first byte to its answer", SECONDS, "path")
        self._stages = self._histogram("stage_seconds", "Seconds of a call by stage", SECONDS, "model", "stage")
        self._batch = self._histogram("batch_size", "Images drawn by one call", (1, 2, 4, 8, 16, 32), "model")
        self._waits = self._histogram("queue_wait_seconds", "From an image's request to its call", SECONDS)
        self._images = self._counter("images", "Images drawn", "model")
        self._refused = self._counter("refused", "Requests that were refused without drawing", "reason")
        self._dropped = self._counter("dropped_images", "Images nobody waited for any more", "reason")
        self._failed = self._counter("failed_images", "Images that could not be drawn", "error")
        self._memory = Gauge(
            "hypersd_device_memory_bytes", "Memory of a device", ("device", "kind"), registry=self.registry
        )
        self._live = Gauge("hypersd_live_connections", "WebSockets that are open", registry=self.registry)

    def watch_queue(self, length: Callable[[], int]) -> None:
        """``length()`` is how many images wait."""
        gauge = Gauge("hypersd_queue_images", "Images that wait to be drawn", registry=self.registry)
        gauge.set_function(length)

    def watch_device(self, device: str, memory: Callable[[], Mapping[str, float]]) -> None:
        """``memory()`` gives the bytes that are ``used``, by whomever, and those there are in ``total``."""
        for kind in ("used", "total"):
            self._memory.labels(device, kind).set_function(lambda kind=kind: memory()[kind])

    def saw_request(self, path: str, code: int, seconds: float) -> None:
        self._requests.labels(path, str(code)).inc()
        self._seconds.labels(path).observe(seconds)

    def saw_call(self, model: str, images: int, timings: Mapping[str, float]) -> None:
        self._images.labels(model).inc(images)
        self._batch.labels(model).observe(images)
        for stage in STAGES:
            if stage in timings:
                self._stages.labels(model, stage).observe(timings[stage])

    def saw_wait(self, seconds: float) -> None:
        self._waits.observe(seconds)

    def saw_refusal(self, reason: str) -> None:
        self._refused.labels(reason).inc()

    def saw_dropped(self, reason: str, images: int) -> None:
        self._dropped.labels(reason).inc(images)

    def saw_failure(self, error: str) -> None:
        self._failed.labels(error).inc()

    def saw_live(self, change: int) -> None:
        """A WebSocket was opened (1) or closed (-1)."""
        self._live.inc(change)

    def exposition(self) -> bytes:
        """All of it in Prometheus' text format, version 0.0.4."""
        return generate_latest(self.registry)

    def _counter(self, name: str, words: str, *labels: str) -> Counter:
        return Counter(f"hypersd_{name}", words, labels, registry=self.registry)

    def _histogram(self, name: str, words: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"hypersd_{name}", words, labels, buckets=buckets, registry=self.registry)
