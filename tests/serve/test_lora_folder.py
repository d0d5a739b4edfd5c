"""LoRAs at run time: files in the service's folder, and requests that use them."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from lora_writers import write_slot_lora
from PIL import Image
from stand_in_service import GENERATIONS, LONG, GatedPipeline, RunningServer, file_of, wait_until
from websockets.sync.client import connect

from hypersd import Pipeline
from hypersd.errors import RequestError
from hypersd.serve.lora_folder import LoraFolder
from hypersd.serve.service import LocalService
from hypersd.serve.settings import ServeSettings

BODY: dict[str, Any] = {"prompt": "a photo of a cat", "seed": 3}


@pytest.fixture(scope="module")
def bundle(export_slotted: Callable[[str], Path]) -> Path:
    return export_slotted("Hyper-SD15-1step-lora")


@pytest.fixture(scope="module")
def pipe(bundle: Path) -> Pipeline:
    """For the expected images and the layout of the slot."""
    return Pipeline.load(bundle, device="cpu")


@pytest.fixture(scope="module")
def write(pipe: Pipeline) -> Callable[..., Path]:
    """``write(file, seed, ...)``: a LoRA that fits the bundle."""
    assert pipe.manifest.lora_slot is not None
    return lambda file, seed=0, **more: write_slot_lora(pipe.manifest.lora_slot, file, seed, **more)


@pytest.fixture(scope="module")
def served(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningServer, Path]]:
    """A server and its folder, which is empty at first. Tests put files of their own names there."""
    folder = tmp_path_factory.mktemp("loras")
    service = LocalService([bundle], devices=["cpu", "cpu"], lora_folder=LoraFolder(folder))
    with RunningServer(service, ServeSettings()) as server, pytest.MonkeyPatch.context() as patch:
        service.wait_ready()
        patch.setattr("hypersd.serve.lora_folder.INTERVAL", 0.1)  # most of these tests wait for a look or two
        yield server, folder


@pytest.fixture(scope="module")
def client(served: tuple[RunningServer, Path]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served[0].url, timeout=LONG) as client:
        yield client


@pytest.fixture
def folder(served: tuple[RunningServer, Path], client: httpx.Client) -> Iterator[Path]:
    """The folder, emptied after the test."""
    yield served[1]
    for file in served[1].iterdir():
        file.unlink()
    wait_until(lambda: names(client) == [])


def names(client: httpx.Client) -> list[str]:
    return [adapter["name"] for adapter in client.get("/v1/models").json()["data"][0]["adapters"]]


def generated(answer: httpx.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    (image,) = answer.json()["data"]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image["b64_json"]))))


def post(client: httpx.Client, **fields: Any) -> np.ndarray:
    return generated(client.post(GENERATIONS, json={**BODY, **fields}))


def expected(pipe: Pipeline, files: dict[Path, float], **call: Any) -> np.ndarray:
    """The pipeline's own image with these files."""
    try:
        adapters = {pipe.load_lora_weights(file).name: strength for file, strength in files.items()}
        return np.asarray(pipe(BODY["prompt"], seed=BODY["seed"], adapters=adapters, **call).images[0])
    finally:
        pipe.unload_lora_weights()


def rejection(answer: httpx.Response) -> str:
    assert answer.status_code == 400, answer.text
    message = answer.json()["error"]["message"]
    assert "\n" not in message
    return message


# The folder


def test_files_come_change_and_go(client: httpx.Client, folder: Path, pipe: Pipeline, write) -> None:
    """A file that is dropped into the folder is offered without a restart, and the images are the runtime's."""
    plain = post(client)
    assert names(client) == []
    one = write(folder / "one.safetensors")
    wait_until(lambda: names(client) == ["one"])
    first = post(client, adapters={"one": 0.8})
    assert np.array_equal(first, expected(pipe, {one: 0.8}))
    assert not np.array_equal(first, plain)
    assert np.array_equal(post(client), plain)

    two = write(folder / "two.safetensors", seed=1)
    wait_until(lambda: names(client) == ["one", "two"])
    both = post(client, adapters={"one": 0.8, "two": -0.4})
    assert np.array_equal(both, expected(pipe, {one: 0.8, two: -0.4}))

    write(one, seed=2)  # in its place
    wait_until(lambda: not np.array_equal(post(client, adapters={"one": 0.8}), first))
    assert np.array_equal(post(client, adapters={"one": 0.8}), expected(pipe, {one: 0.8}))

    two.unlink()
    wait_until(lambda: names(client) == ["one"])
    message = rejection(client.post(GENERATIONS, json={**BODY, "adapters": {"two": 1.0}}))
    assert message == "adapter 'two' is not loaded: expected some of: one; load it first"


def test_files_that_do_not_fit(
    client: httpx.Client, folder: Path, write, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """They are left out with one line in the log each, however often the folder is read; the service goes on."""
    whole = write(tmp_path / "whole.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "text.safetensors").write_text("not a LoRA")
    (folder / "notes.txt").write_text("not even by name")
    (folder / ".hidden.safetensors").write_bytes(whole)
    (folder / "folder.safetensors").mkdir()
    (folder / "nowhere.safetensors").symlink_to(tmp_path / "nothing")
    try:
        with caplog.at_level(logging.WARNING, "hypersd.serve.lora_folder"):
            write(folder / "fine.safetensors")
            wait_until(lambda: names(client) == ["fine"])
            write(folder / "later.safetensors")
            wait_until(lambda: names(client) == ["fine", "later"])
            left_out = sorted(record.getMessage() for record in caplog.records)
        assert [message.partition(":")[0] for message in left_out] == [
            "LoRA 'cut' is left out of Hyper-SD15-1step-lora-slotted",
            "LoRA 'text' is left out of Hyper-SD15-1step-lora-slotted",
        ]
        assert not any("\n" in message for message in left_out)
        post(client, adapters={"fine": 1.0})
        (folder / "cut.safetensors").write_bytes(whole)  # the copy is complete
        wait_until(lambda: names(client) == ["cut", "fine", "later"])
    finally:
        (folder / "folder.safetensors").rmdir()


def test_a_file_that_grows_is_not_read(bundle: Path, pipe: Pipeline, write, tmp_path: Path, caplog) -> None:
    """Only once it has stayed the same from one look to the next; a copy under way is no error."""
    folder = tmp_path / "loras"
    folder.mkdir()
    whole = write(tmp_path / "whole.safetensors").read_bytes()
    loras, other = LoraFolder(folder), Pipeline.load(bundle, device="cpu")
    loras.join({"tiny": other})
    for end in (100, 1000, len(whole)):
        (folder / "slow.safetensors").write_bytes(whole[:end])
        loras.look()
        assert other.adapters == []
    loras.look()
    assert [adapter.name for adapter in other.adapters] == ["slow"]
    assert not caplog.records


def test_a_folder_that_cannot_be_read(bundle: Path, write, tmp_path: Path, caplog) -> None:
    """A share that is away for a while takes no LoRA with it."""
    folder, other = tmp_path / "loras", Pipeline.load(bundle, device="cpu")
    folder.mkdir()
    write(folder / "one.safetensors")
    loras = LoraFolder(folder)
    loras.join({"tiny": other})
    folder.rename(tmp_path / "away")
    for _ in range(3):
        loras.look()
    assert [adapter.name for adapter in other.adapters] == ["one"]
    assert len(caplog.records) == 1
    (tmp_path / "away").rename(folder)
    os.unlink(folder / "one.safetensors")
    loras.look()
    assert other.adapters == []


def test_strict_leaves_out_files_that_do_not_fit_as_a_whole(bundle: Path, write, tmp_path: Path, caplog) -> None:
    write(tmp_path / "convolutions.safetensors", is_whole=False)
    lenient, strict = Pipeline.load(bundle, device="cpu"), Pipeline.load(bundle, device="cpu")
    with pytest.warns(match="no place"):
        LoraFolder(tmp_path).join({"tiny": lenient})
    assert "no place" in lenient.adapters[0].notes[0]
    LoraFolder(tmp_path, is_strict=True).join({"tiny": strict})
    assert strict.adapters == []
    assert "nothing may be left out" in caplog.text


def test_bundles_without_a_slot(demo_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"hypersd export --lora-slot RANK"):
        LocalService([demo_bundle], lora_folder=LoraFolder(tmp_path))
    with pytest.raises(RequestError, match="is not there"):
        LoraFolder(tmp_path / "nothing")


# Requests


@pytest.fixture
def style(client: httpx.Client, folder: Path, write) -> Path:
    file = write(folder / "style.safetensors")
    wait_until(lambda: names(client) == ["style"])
    return file


@pytest.mark.parametrize(
    ("adapters", "words"),
    [
        ({"other": 1.0}, "adapter 'other' is not loaded: expected some of: style; load it first"),
        ({"../style": 1.0}, "adapter '../style' is not loaded"),
        ({"style.safetensors": 1.0}, "adapter 'style.safetensors' is not loaded"),
        ({"style": 10.5}, "adapters.style"),
        ({"style": -11}, "adapters.style"),
        ({"style": "1"}, "adapters.style"),
        ({"style": True}, "adapters.style"),
        ({"style": None}, "adapters.style"),
        ({"s" * 101: 1.0}, "adapters.sss"),
        (["style"], "adapters"),
        ("style", "adapters"),
        (1.0, "adapters"),
    ],
)
def test_wrong_adapters(adapters: Any, words: str, client: httpx.Client, style: Path) -> None:
    answer = client.post(GENERATIONS, json={**BODY, "adapters": adapters})
    assert rejection(answer).startswith(words)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_strengths_that_are_no_numbers(number: str, client: httpx.Client, style: Path) -> None:
    """JSON has no such numbers; Python's reader takes them."""
    body = json.dumps({**BODY, "adapters": {"style": 0}}).replace('"style": 0', f'"style": {number}')
    rejection(client.post(GENERATIONS, content=body, headers={"Content-Type": "application/json"}))


def test_a_bundle_without_a_slot_names_the_option(demo_server: RunningServer) -> None:
    with httpx.Client(base_url=demo_server.url, timeout=LONG) as client:
        message = rejection(client.post(GENERATIONS, json={**BODY, "adapters": {"style": 1.0}}))
        assert "--lora-slot" in message
        assert [model["adapters"] for model in client.get("/v1/models").json()["data"]] == [[], []]


def test_the_list_tells_ranks_and_what_is_left_out(client: httpx.Client, folder: Path, write) -> None:
    write(folder / "convolutions.safetensors", is_whole=False)
    wait_until(lambda: names(client) == ["convolutions"])
    (adapter,) = client.get("/v1/models").json()["data"][0]["adapters"]
    assert adapter["rank"] == 4
    assert "no place" in adapter["notes"][0]


def test_edits_as_forms_and_as_json(
    client: httpx.Client, style: Path, pipe: Pipeline, photo: Image.Image, photo_base64: str
) -> None:
    files = {"image": ("image.png", file_of(photo), "image/png")}
    image = expected(pipe, {style: 0.5}, image=photo, keep_steps=True)
    for field in ({"adapters[style]": "0.5"}, {"adapters": '{"style": 0.5}'}):
        answer = client.post("/v1/images/edits", data={**BODY, **field}, files=files)
        assert np.array_equal(generated(answer), image)
    answer = client.post("/v1/images/edits", json={**BODY, "image": photo_base64, "adapters": {"style": 0.5}})
    assert np.array_equal(generated(answer), image)


@pytest.mark.parametrize(
    "field",
    [
        {"adapters[style]": "much"}, {"adapters[style]": "nan"}, {"adapters[style]": "11"}, {"adapters": "style"},
        {"adapters": '{"style": NaN}'}, {"adapters": '{"style": true}'}, {"adapters": "[" * 5000},
    ],
)  # fmt: skip
def test_wrong_adapters_in_forms(field: dict[str, str], client: httpx.Client, photo: Image.Image) -> None:
    files = {"image": ("image.png", file_of(photo), "image/png")}
    assert rejection(client.post("/v1/images/edits", data={**BODY, **field}, files=files)).startswith("adapters")


def test_adapters_that_are_files_of_a_form(client: httpx.Client, photo: Image.Image) -> None:
    """A LoRA cannot be uploaded."""
    files = {name: ("style.safetensors", file_of(photo), "image/png") for name in ("image", "adapters[style]")}
    assert "adapters is a file" in rejection(client.post("/v1/images/edits", data=BODY, files=files))


def test_live_inputs(served: tuple[RunningServer, Path], style: Path, pipe: Pipeline) -> None:
    with connect(served[0].live_url) as socket:
        socket.send(json.dumps({**BODY, "id": 0, "adapters": {"style": 1.5}}))
        answer = socket.recv(LONG)
        assert isinstance(answer, bytes)
        image = Image.open(io.BytesIO(answer[4 + int.from_bytes(answer[:4], "big") :]))
        assert np.array_equal(np.asarray(image), expected(pipe, {style: 1.5}))
        socket.send(json.dumps({**BODY, "id": 1, "adapters": {"other": 1.0}}))
        assert json.loads(socket.recv(LONG))["error"]["message"].startswith("adapter 'other' is not loaded")


def test_settings_in_files_name_the_lora(client: httpx.Client, style: Path) -> None:
    answer = client.post(GENERATIONS, json={**BODY, "adapters": {"style": 0.5}}, headers={"Accept": "image/png"})
    settings = json.loads(Image.open(io.BytesIO(answer.content)).info["hypersd"])
    assert settings["adapters"]["style"]["strength"] == 0.5
    assert settings["adapters"]["style"]["file"] == "style.safetensors"


# Batches


@pytest.fixture
def gate(bundle: Path, write, tmp_path: Path) -> Iterator[GatedPipeline]:
    """A pipeline that is held back, with two LoRAs."""
    own = Pipeline.load(bundle, device="cpu")
    for seed, name in enumerate(("one", "two")):
        own.load_lora_weights(write(tmp_path / f"{name}.safetensors", seed))
    gated = GatedPipeline(own, batch=8)
    yield gated
    gated.gate.set()


def test_equal_adapters_share_a_call_and_others_do_not(
    gate: GatedPipeline, start_server: Callable[..., RunningServer]
) -> None:
    server = start_server(gate)
    asked = [{"one": 0.5}, {"two": 0.5}, {"one": 0.5, "two": 0.0}, {"one": 0.7}, None, {}, {"one": 0.5}]
    with httpx.Client(base_url=server.url, timeout=LONG) as client, ThreadPoolExecutor(8) as pool:
        gate.gate.clear()
        first = pool.submit(client.post, GENERATIONS, json={**BODY, "prompt": "first"})
        wait_until(lambda: gate.calls == [["first"]])
        answers = []
        for i, adapters in enumerate(asked):
            body = {**BODY, "prompt": f"{i}", "adapters": adapters}
            answers.append(pool.submit(client.post, GENERATIONS, json=body))
            wait_until(lambda i=i: f"hypersd_queue_images {i + 1}" in client.get("/metrics").text)
        gate.gate.set()
        images = [generated(answer.result()) for answer in [first, *answers]][1:]
    assert gate.calls[1:] == [["0", "2", "6"], ["1"], ["3"], ["4", "5"]]
    for i, adapters in enumerate(asked):
        alone = gate.pipe(f"{i}", seed=BODY["seed"], adapters=adapters).images[0]
        assert np.array_equal(images[i], np.asarray(alone))


def test_waiting_requests_keep_their_file(
    gate: GatedPipeline, start_server: Callable[..., RunningServer], write, tmp_path: Path
) -> None:
    """A LoRA that is replaced or removed does not change or fail what was accepted; a later request is a call apart."""
    server = start_server(gate)
    before = np.asarray(gate.pipe("kept", seed=BODY["seed"], adapters={"one": 1.0}).images[0])
    with httpx.Client(base_url=server.url, timeout=LONG) as client, ThreadPoolExecutor(3) as pool:
        gate.gate.clear()
        first = pool.submit(client.post, GENERATIONS, json={**BODY, "prompt": "first"})
        wait_until(lambda: gate.calls == [["first"]])
        body = {**BODY, "prompt": "kept", "adapters": {"one": 1.0}}
        kept = pool.submit(client.post, GENERATIONS, json=body)
        wait_until(lambda: "hypersd_queue_images 1" in client.get("/metrics").text)
        gate.pipe.unload_lora_weights("one")
        gate.pipe.load_lora_weights(write(tmp_path / "one.safetensors", seed=2))
        replaced = pool.submit(client.post, GENERATIONS, json=body)
        wait_until(lambda: "hypersd_queue_images 2" in client.get("/metrics").text)
        gate.gate.set()
        images = [generated(answer.result()) for answer in (first, kept, replaced)]
    assert gate.calls[1:] == [["kept"], ["kept"]]
    assert np.array_equal(images[1], before)
    assert not np.array_equal(images[2], before)
