"""``hypersd serve``: a process that says where it listens, and ends as it should."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from stand_in_service import LONG, wait_until

from hypersd.cli import main

MODEL = "demo15-canny"


@contextlib.contextmanager
def serving(*argv: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that listens, and where."""
    words = [sys.executable, "-m", "hypersd.cli", "serve", "--port", "0", *map(str, argv)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        killer = threading.Timer(3 * LONG, process.kill)
        killer.start()
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            found = re.search(r"on (http://[0-9.:]+)/ ", line)
            assert found, line
            yield process, found[1]
        finally:
            killer.cancel()
            process.kill()


def wait_ready(url: str) -> None:
    wait_until(lambda: httpx.get(url + "/readyz").status_code == 200)


def test_it_generates_until_it_is_stopped(demo_canny_bundle: Path, tmp_path: Path) -> None:
    """Requests of the last moment are answered, one way or the other; no prompt comes into the log."""
    (tmp_path / "token").write_text("sesame\n")
    with serving(demo_canny_bundle, "--token-file", tmp_path / "token", "--device", "cpu") as (process, url):
        assert httpx.get(url + "/healthz").status_code == 200
        wait_ready(url)
        assert httpx.get(url + "/v1/models").status_code == 401
        assert httpx.get(url + "/healthz", headers={"Host": "example.com"}).status_code == 400
        client = httpx.Client(base_url=url, headers={"Authorization": "Bearer sesame"}, timeout=LONG)
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == [MODEL]
        body = {"prompt": "secret " * 100, "n": 8, "steps": 8}
        answers: list[httpx.Response] = []
        last = threading.Thread(target=lambda: answers.append(client.post("/v1/images/generations", json=body)))
        last.start()
        wait_until(lambda: "hypersd_queue_images 0" not in client.get("/metrics").text or answers)
        process.send_signal(signal.SIGTERM)
        last.join(LONG)
        out, err = process.communicate(timeout=LONG)
    assert [answer.status_code in (200, 503) for answer in answers] == [True]
    assert (out, err) == ("", "")
    assert process.returncode == 0


def test_ctrl_c(demo_canny_bundle: Path) -> None:
    with serving(demo_canny_bundle) as (process, url):
        wait_ready(url)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=LONG)
    assert err == "hypersd: interrupted\n"
    assert process.returncode == 130


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--port", 70_000], "--port 70000"),
        (["--queue", 0], "--queue 0"),
        (["--max-batch", 0], "--max-batch 0"),
        (["--max-count", 9, "--queue", 8], "--max-count 9 is above --queue 8"),
        (["--timeout", "nan"], "--timeout nan"),
        (["--max-body-mb", 0], "--max-body-mb 0"),
        (["--token-file", "/nowhere"], "token file /nowhere cannot be read"),
        (["--host", "256.0.0.1"], "cannot listen on 256.0.0.1 port 8000"),
        (["--device", "cuda:x"], "cuda:x"),
        (["--lora-folder", "/nowhere"], "the LoRA folder /nowhere is not there"),
        (["--lora-folder", "/tmp"], "hypersd export --lora-slot RANK"),
        (["--strict"], "--lora-folder FOLDER"),
    ],
)
def test_wrong_options(options: list[Any], words: str, demo_canny_bundle: Path, capsys: pytest.CaptureFixture) -> None:
    assert words in end_of(capsys, demo_canny_bundle, *options)


def end_of(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The last line of a command that fails; before it there is at most the one that says where it listens."""
    assert main(["serve", *map(str, argv)]) == 2
    *before, last = capsys.readouterr().err.splitlines()
    assert all(line.startswith("serving ") for line in before)
    assert len(before) <= 1
    return last


@pytest.mark.parametrize("text", ["", "two words", "grün", "a\nb"])
def test_wrong_tokens(text: str, demo_canny_bundle: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    (tmp_path / "token").write_text(text, "utf-8")
    assert "one token of ASCII characters" in fails("serve", demo_canny_bundle, "--token-file", tmp_path / "token")


def test_wrong_bundles(demo_canny_bundle: Path, tmp_path: Path, copy_bundle, fails: Callable[..., str]) -> None:
    assert "bundle" in fails("serve", tmp_path / "nothing")
    assert f"two bundles are named {MODEL}" in fails("serve", demo_canny_bundle, demo_canny_bundle)
    noise = copy_bundle(demo_canny_bundle, "noise", random_weights=True).root
    assert "--allow-random-weights" in fails("serve", noise)


def test_a_port_that_is_taken(demo_canny_bundle: Path, fails: Callable[..., str]) -> None:
    """Said before anything is loaded."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"cannot listen on 127.0.0.1 port {port} (" in fails("serve", demo_canny_bundle, "--port", port)


def test_a_bundle_that_cannot_be_loaded(
    demo_canny_bundle: Path, copy_bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ends by itself, with one line beside the one that says where it listened."""
    damaged = copy_bundle(demo_canny_bundle, "damaged").root / "unet" / "model.onnx"
    size = damaged.stat().st_size
    damaged.unlink()
    damaged.write_bytes(bytes(size))
    line = end_of(capsys, damaged.parents[1], "--port", 0)
    assert line.startswith("hypersd: error: ")
    assert "model.onnx" in line
