"""Parts for tests of the live page: a real `hypersd serve`, Chromium, and what a person sees in it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from typing import Any

import numpy as np
import preloaded
import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
OFFLINE = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
FAKE_CAMERA = [  # a disc that fills up on a green ground, and the time
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",  # the permission is given
]
PATIENCE = 30_000  # milliseconds: how long a slow machine may take; nothing is measured
if os.environ.get("CI") == "true":
    assert CHROMIUM, "chromium is not installed"
    import playwright.sync_api  # noqa: F401

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


class Server:
    """`hypersd serve` in a process of its own, which may be killed and started again on the same port."""

    def __init__(self, *arguments: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.arguments = [*arguments, "--port", str(self.port)]
        self.url = f"http://127.0.0.1:{self.port}/"

    def start(self) -> None:
        self.process = preloaded.start("-m", "hypersd.cli", "serve", *self.arguments, stderr=subprocess.PIPE)
        assert self.process.stderr is not None
        assert self.process.stderr.readline().startswith("serving ")

    def wait_ready(self) -> None:
        """Wait until the bundles are loaded."""
        while True:
            with contextlib.suppress(urllib.error.HTTPError):
                urllib.request.urlopen(f"{self.url}readyz", timeout=30)
                return
            assert self.process.poll() is None
            time.sleep(0.1)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        finally:
            self.kill()

    def count(self, name: str) -> float:
        """A counter of /metrics, summed over its labels."""
        text = urllib.request.urlopen(f"{self.url}metrics", timeout=30).read().decode()
        values = [line.rpartition(" ")[2] for line in text.splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
        return sum(map(float, values))


def shown(page: Any, index: int = 0) -> np.ndarray:
    """The pixels of an image as the page has them."""
    data = page.evaluate(
        """async (index) => {
            const image = document.querySelectorAll("#images img")[index];
            await image.decode();
            const { naturalWidth: width, naturalHeight: height } = image;
            const canvas = Object.assign(document.createElement("canvas"), { width, height });
            const context = canvas.getContext("2d");
            context.drawImage(image, 0, 0);
            return [height, width, Array.from(context.getImageData(0, 0, width, height).data)];
        }""",
        index,
    )
    height, width, values = data
    return np.array(values, np.uint8).reshape(height, width, 4)[..., :3]


def settled(page: Any) -> None:
    """Wait until the newest input's image is shown: nothing is under way any more."""
    page.wait_for_function("() => document.body.dataset.shown === document.body.dataset.asked")
