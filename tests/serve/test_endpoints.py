"""Endpoints that make no images: models, health, page and metrics, also while the service loads or generates."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from stand_in_service import GENERATIONS, LONG, GatedPipeline, RunningServer, StandInService, wait_until

from hypersd.serve.settings import ServeSettings

# Models, health and the page


def test_models(client: httpx.Client, net: str) -> None:
    answer = client.get("/v1/models").json()
    assert answer["object"] == "list"
    first, second = answer["data"]
    assert first["created"] > 1.7e9
    assert first | {"created": 0} == {
        "id": "demo15-canny",
        "object": "model",
        "created": 0,
        "owned_by": "hypersd",
        "checkpoint": "Hyper-Demo15-1step-lora",
        "family": "sd15",
        "device": "cpu",
        "backend": "onnxruntime",
        "steps": {"default": 1, "allowed": [1, 2, 3, 4, 5, 6, 7, 8]},
        "eta": {"default": 1.0},
        "guidance_scale": {"default": 0.0},
        "width": {"min": 96, "default": 96, "max": 96, "multiple": 8},
        "height": {"min": 96, "default": 96, "max": 96, "multiple": 8},
        "controlnets": [{"name": net, "preprocess": "canny", "control_scale": 1.0}],
        "lora_rank": None,
        "adapters": [],
        "has_encoder": True,
        "max_count": 8,
        "changed_on_disk": False,
    }
    assert (second["id"], second["controlnets"]) == ("demo15", [])


def test_health(client: httpx.Client) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ready"}


def test_the_page_and_its_headers(client: httpx.Client) -> None:
    answer = client.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", GENERATIONS, 405),
        ("PUT", GENERATIONS, 405),
        ("OPTIONS", GENERATIONS, 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/images", 404),
        ("GET", "/docs", 404),
        ("POST", "/", 405),
    ],
)
def test_other_methods_and_paths(method: str, path: str, status: int, client: httpx.Client) -> None:
    answer = client.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["type"] == "invalid_request_error"


# While the service loads or generates


class _Loading(StandInService):
    """A service that loads when the test lets it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.may_load = threading.Event()

    def _load_all(self, device: str) -> Any:
        assert self.may_load.wait(LONG)
        return super()._load_all(device)


def test_ready_only_after_warm_up(demo_canny_bundle: Path, gated: GatedPipeline) -> None:
    service = _Loading(demo_canny_bundle, gated)
    with RunningServer(service, ServeSettings()) as server, httpx.Client(base_url=server.url, timeout=LONG) as client:
        assert client.get("/healthz").status_code == 200
        for answer in (client.get("/readyz"), client.get("/v1/models"), client.post(GENERATIONS, json={"prompt": ""})):
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["type"] == "server_error"
        service.may_load.set()
        service.wait_ready()
        assert client.get("/readyz").status_code == 200
        assert client.post(GENERATIONS, json={"prompt": ""}).status_code == 200


def test_the_event_loop_is_free_while_an_image_is_generated(gated: GatedPipeline, start_server) -> None:
    """Other requests are answered before the image is finished."""
    server = start_server(gated)
    gated.gate.clear()
    with httpx.Client(base_url=server.url, timeout=LONG) as client, ThreadPoolExecutor() as pool:
        slow = pool.submit(httpx.post, server.url + GENERATIONS, json={"prompt": "slow"}, timeout=LONG)
        wait_until(lambda: gated.calls)
        for path in ("/healthz", "/readyz", "/v1/models", "/metrics", "/openapi.json"):
            assert client.get(path).status_code == 200
        assert client.post(GENERATIONS, json={"prompt": 3}).status_code == 400
        assert not slow.done()
        gated.gate.set()
        assert slow.result().status_code == 200


# Metrics


def figures(client: httpx.Client) -> Callable[..., float]:
    """``figures(client)(name, **labels)``: a figure of /metrics, 0 if it is not there."""
    answer = client.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    samples = [sample for family in text_string_to_metric_families(answer.text) for sample in family.samples]

    def figure(name: str, **labels: str) -> float:
        return sum(one.value for one in samples if one.name == name and one.labels.items() >= labels.items())

    return figure


def test_metrics_count_requests_and_images(client: httpx.Client) -> None:
    before = figures(client)
    client.post(GENERATIONS, json={"prompt": "", "n": 2})
    client.post(GENERATIONS, json={"prompt": ""}, headers={"Accept": "image/png"})
    client.post(GENERATIONS, json={"prompt": 3})
    client.get("/nowhere")
    after = figures(client)

    def more(name: str, **labels: str) -> float:
        return after(name, **labels) - before(name, **labels)

    assert more("hypersd_requests_total", path=GENERATIONS, code="200") == 2
    assert more("hypersd_requests_total", path=GENERATIONS, code="400") == 1
    assert more("hypersd_requests_total", path="other", code="404") == 1
    assert more("hypersd_request_seconds_count", path=GENERATIONS) == 3
    assert more("hypersd_images_total", model="demo15-canny") == 3
    assert more("hypersd_batch_size_sum", model="demo15-canny") == 3
    for stage in ("tokenize", "encode", "denoise", "decode", "total"):
        assert more("hypersd_stage_seconds_count", model="demo15-canny", stage=stage) == 3
    assert more("hypersd_queue_wait_seconds_count") == 3
    assert after("hypersd_queue_images") == 0
    assert after("process_resident_memory_bytes") > 1e6


def test_metrics_of_waiting_and_rejected_images(gated: GatedPipeline, start_server) -> None:
    server = start_server(gated, queue=1)
    gated.gate.clear()
    with httpx.Client(base_url=server.url, timeout=LONG) as client, ThreadPoolExecutor() as pool:
        first = pool.submit(httpx.post, server.url + GENERATIONS, json={"prompt": "first"}, timeout=LONG)
        wait_until(lambda: gated.calls)
        second = pool.submit(httpx.post, server.url + GENERATIONS, json={"prompt": "second"}, timeout=LONG)
        wait_until(lambda: len(server.service._jobs) == 1)
        answer = client.post(GENERATIONS, json={"prompt": "third"})
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "queue_full"
        assert int(answer.headers["retry-after"]) >= 1
        figure = figures(client)
        gated.gate.set()
        assert [first.result().status_code, second.result().status_code] == [200, 200]
    assert figure("hypersd_queue_images") == 1
    assert figure("hypersd_rejected_total", reason="queue_full") == 1
    assert figure("hypersd_requests_total", path=GENERATIONS, code="503") == 1
    assert gated.prompts == ["first", "second"]


def test_bugs_are_reported_and_counted_as_500(gated: GatedPipeline, start_server, monkeypatch) -> None:
    """They are not counted as disconnected clients."""
    server = start_server(gated)

    def fail() -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(server.service, "models", fail)
    with httpx.Client(base_url=server.url, timeout=LONG) as client:
        answer = client.get("/v1/models")
        assert answer.status_code == 500
        assert "ZeroDivisionError" in answer.json()["error"]["message"]
        assert "secret" not in answer.text
        assert figures(client)("hypersd_requests_total", path="/v1/models", code="500") == 1
