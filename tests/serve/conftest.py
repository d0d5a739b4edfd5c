"""Fixtures of the service's tests."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from live_page import CHROMIUM, FAKE_CAMERA, OFFLINE, PATIENCE, Server
from PIL import Image
from stand_in_service import LONG, GatedPipeline, RunningServer, StandInService, file_of

from hypersd import Pipeline
from hypersd.serve.service import LocalService
from hypersd.serve.settings import ServeSettings

MODEL = "demo15-canny"
SMALL_BODY = 1 << 20


@pytest.fixture(scope="session")
def demo_pipe(demo_canny_bundle: Path) -> Pipeline:
    return Pipeline.load(demo_canny_bundle, device="cpu")


@pytest.fixture(scope="session")
def net(demo_pipe: Pipeline) -> str:
    """The ControlNet's name."""
    (name,) = demo_pipe.manifest.controlnets
    return name


@pytest.fixture
def gated(demo_pipe: Pipeline) -> Iterator[GatedPipeline]:
    """The demonstration checkpoint with a gate. What waits for it at the end is let go."""
    pipe = GatedPipeline(demo_pipe, batch=4)
    yield pipe
    pipe.gate.set()


@pytest.fixture
def start_service(demo_canny_bundle: Path) -> Iterator[Callable[..., StandInService]]:
    """``start_service(*pipes, **options)``: a service that generates with these pipelines, one for each worker."""
    services: list[StandInService] = []

    def start(*pipes: Any, **options: Any) -> StandInService:
        service = StandInService(demo_canny_bundle, *pipes, **options)
        services.append(service)
        service.start()
        service.wait_ready()
        return service

    yield start
    for service in services:
        service.stop()


@pytest.fixture
def start_server(demo_canny_bundle: Path) -> Iterator[Callable[..., RunningServer]]:
    """``start_server(*pipes, queue=..., **settings)``: a server in a thread that generates with these pipelines."""
    with contextlib.ExitStack() as stack:

        def start(*pipes: Any, queue: int = 64, **settings: Any) -> RunningServer:
            service = StandInService(demo_canny_bundle, *pipes, queue=queue)
            server = stack.enter_context(RunningServer(service, ServeSettings(**settings)))
            stack.callback(lambda: [pipe.gate.set() for pipe in pipes if isinstance(pipe, GatedPipeline)])
            service.wait_ready()
            return server

        yield start


@pytest.fixture(scope="session")
def demo_server(demo_canny_bundle: Path, demo_bundle: Path) -> Iterator[RunningServer]:
    """Both demonstration bundles on the CPU; bodies may have a mebibyte."""
    service = LocalService([demo_canny_bundle, demo_bundle], devices=["cpu"])
    settings = ServeSettings(max_body=SMALL_BODY, max_prompt=200, loopback_only=True)
    with RunningServer(service, settings) as server:
        service.wait_ready()
        yield server


@pytest.fixture(scope="module")
def client(demo_server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=demo_server.url, timeout=LONG) as client:
        yield client


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    """Something with edges, wider than high."""
    pixels = np.full((80, 120, 3), 250, np.uint8)
    pixels[20:60, 40:80] = (200, 30, 30)
    return Image.fromarray(pixels)


@pytest.fixture(scope="session")
def photo_base64(photo: Image.Image) -> str:
    return base64.b64encode(file_of(photo)).decode()


@pytest.fixture(scope="session")
def server(demo_canny_bundle: Path) -> Iterator[Server]:
    """A `hypersd serve` in a process of its own."""
    server = Server(str(demo_canny_bundle))
    server.start()
    server.wait_ready()
    yield server
    server.end()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Callable[..., Any]]:
    """``chromium(*arguments)``: a browser. Not for the session: Playwright leaves an event loop in the thread."""
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright, contextlib.ExitStack() as stack:

        def launch(*arguments: str) -> Any:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*OFFLINE, *arguments])
            stack.callback(browser.close)
            return browser

        yield launch


@pytest.fixture(scope="module")
def browser(chromium: Callable[..., Any]) -> Any:
    return chromium(*FAKE_CAMERA)


@pytest.fixture
def open_page(browser: Any, server: Server) -> Iterator[Callable[..., Any]]:
    """``open_page(fragment, **context)``: the page with an image on it. It must not complain or look elsewhere."""
    contexts, problems = [], []

    def open_page(
        fragment: str = "", url: str = server.url, wait: bool = True, browser: Any = browser, **options: Any
    ) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 1000}, **options})
        contexts.append(context)
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        page.problems = problems
        page.on("console", lambda message: message.type == "error" and problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: _is_elsewhere(request.url, url) and problems.append(request.url))
        page.goto(url + fragment)
        if wait:
            page.wait_for_selector("body[data-shown]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


def _is_elsewhere(address: str, url: str) -> bool:
    return not address.startswith((url, url.replace("http", "ws"), "blob:", "data:"))
