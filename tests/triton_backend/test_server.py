"""Triton Inference Server itself, in the CPU build that nvidia-pytriton's wheel holds, serving a bundle.

Skipped where it is not installed, in a folder of its own: its release 24.10 reads strings wrongly with numpy 2.

    .venv/bin/pip install --target .venv/triton --no-deps nvidia-pytriton==0.7.0 numpy==1.26.4
"""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from hypersd import Pipeline
from hypersd.engines import Bundle
from hypersd.triton_backend.repository import write_repository

FOLDER = Path(sys.prefix) / "triton"
START_SECONDS = 120


def find_tritonserver() -> Path | None:
    """The server's folder, if it can run this Python."""
    root = FOLDER / "pytriton/tritonserver"
    if not stub_of(root).exists() or not (FOLDER / "numpy").exists():
        return None
    linked = subprocess.run(["ldd", stub_of(root)], capture_output=True, text=True, check=False).stdout
    return None if "not found" in linked else root


def stub_of(root: Path) -> Path:
    """The program in which the server runs this version of Python."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return root / "python_backend_stubs" / version / "triton_python_backend_stub"


def backends_folder(root: Path, folder: Path) -> Path:
    """The server's backends with the stub among them, which the wheel keeps apart."""
    python = folder / "python"
    python.mkdir(parents=True)
    for file in [*(root / "backends/python").iterdir(), stub_of(root)]:
        (python / file.name).symlink_to(file)
    return folder


@pytest.fixture(scope="module")
def server(sd15_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a server whose one model is the tiny bundle."""
    root = find_tritonserver()
    if root is None:
        pytest.skip(f"no Triton Inference Server in {FOLDER} that runs this Python")
    folder = tmp_path_factory.mktemp("triton")
    write_repository(Bundle.load(sd15_bundle), folder / "models")
    port = free_port()
    words = ["--model-repository", folder / "models", "--backend-directory", backends_folder(root, folder / "backends")]
    words += ["--http-address", "127.0.0.1", "--http-port", port, "--allow-grpc", "false", "--allow-metrics", "false"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # where the stub looks for Python's packages
    environment = {**os.environ, "LD_LIBRARY_PATH": str(FOLDER / "nvidia_pytriton.libs"), "PATH": path}
    with (folder / "log").open("w") as log:
        command = [str(word) for word in (root / "bin/tritonserver", *words)]
        process = subprocess.Popen(command, env=environment, cwd=FOLDER, stdout=log, stderr=log)  # where numpy 1 is
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}/v2", timeout=60, trust_env=False) as client:
                wait_ready(client, process, folder / "log")
                yield client
        finally:
            process.terminate()
            process.wait(60)


def free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def wait_ready(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            if client.get("health/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise AssertionError(f"Triton is not ready: {log.read_text()[-2000:]}")


def infer(client: httpx.Client, model: str, **inputs: Any) -> httpx.Response:
    """A request of one row for an image. Files follow the JSON (Triton's extension for binary tensors)."""
    types = {str: "BYTES", bytes: "BYTES", int: "INT32", float: "FP32", bool: "BOOL"}
    tensors: list[dict[str, Any]] = []
    files = b""
    for name, value in inputs.items():
        tensor = {"name": name, "shape": [1, 1], "datatype": "INT64" if name == "seed" else types[type(value)]}
        if isinstance(value, bytes):
            files += struct.pack("<I", len(value)) + value
            tensors.append({**tensor, "parameters": {"binary_data_size": 4 + len(value)}})
        else:
            tensors.append({**tensor, "data": [value]})
    header = json.dumps({"inputs": tensors}).encode()
    headers = {"Inference-Header-Content-Length": str(len(header))}
    return client.post(f"models/{model}/infer", content=header + files, headers=headers)


def outputs(response: httpx.Response) -> dict[str, np.ndarray]:
    assert response.status_code == 200, response.text
    return {each["name"]: np.array(each["data"]).reshape(each["shape"]) for each in response.json()["outputs"]}


def test_concurrent_requests_get_the_pipelines_images(server: httpx.Client, sd15_bundle: Path) -> None:
    """Every one of many requests at once gets the image of its own prompt and seed, or its own error."""
    pipe, name = Pipeline.load(sd15_bundle), sd15_bundle.name
    asked = [{"prompt": f"a {i}", "seed": i, **({"steps": 2, "eta": 0.3} if i % 2 else {})} for i in range(6)]
    asked.append({"prompt": "a cat", "seed": 7, "steps": 700})
    with ThreadPoolExecutor(len(asked)) as pool:
        responses = list(pool.map(lambda inputs: infer(server, name, **inputs), asked))
    for inputs, response in zip(asked[:-1], responses, strict=False):
        found = outputs(response)
        call = {"num_inference_steps": inputs.get("steps"), "eta": inputs.get("eta"), "seed": inputs["seed"]}
        expected = np.asarray(pipe(str(inputs["prompt"]), **call).images[0])
        assert np.array_equal(found["image"][0], expected)
        assert found["seed"].tolist() == [[inputs["seed"]]]
    assert responses[-1].status_code == 400
    assert "was not distilled for 700 steps" in responses[-1].json()["error"]


def test_images_start_from_files(server: httpx.Client, sd15_bundle: Path) -> None:
    """The input `image` is another tensor than the output of that name."""
    pipe, name, file = Pipeline.load(sd15_bundle), sd15_bundle.name, io.BytesIO()
    photo = Image.linear_gradient("L").convert("RGB")
    photo.save(file, "PNG")
    asked = {"prompt": "a cat", "seed": 3, "steps": 4, "image": file.getvalue(), "strength": 0.6}
    call: dict[str, Any] = {"seed": 3, "num_inference_steps": 4, "image": photo, "strength": 0.6}
    found = outputs(infer(server, name, **asked, keep_steps=False))["image"][0]
    assert np.array_equal(found, np.asarray(pipe("a cat", **call).images[0]))
    found = outputs(infer(server, name, **asked, mask_image=file.getvalue()))["image"][0]
    expected = pipe("a cat", **call, mask_image=photo, keep_steps=True).images[0]
    assert np.array_equal(found, np.asarray(expected))
    assert infer(server, name, prompt="a cat", image=b"no image").status_code == 400


def test_the_configuration_is_taken_as_written(server: httpx.Client, sd15_bundle: Path) -> None:
    config = server.get(f"models/{sd15_bundle.name}/config").json()
    assert [group["kind"] for group in config["instance_group"]] == ["KIND_CPU"], "KIND_AUTO where there is no GPU"
    assert config["dynamic_batching"]["default_queue_policy"]["max_queue_size"] == 64
    assert [tensor["name"] for tensor in config["input"] if not tensor["optional"]] == ["prompt"]
