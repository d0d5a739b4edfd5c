"""A local Ray cluster with two replicas on the CPU, of a bundle with a LoRA slot, and batches beside them.

All tests that need Ray's processes are in this file: it starts them once.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
import itertools
import json
import pickle
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import preloaded
import pytest
import ray
import websockets
from lora_writers import write_slot_lora
from PIL import Image, ImageChops
from ray import serve
from waiting import wait_until

from hypersd import Pipeline
from hypersd.cluster.application import app
from hypersd.cluster.bundles import BundleShelf, share
from hypersd.cluster.replica import Replica
from hypersd.runtime.params import Params
from hypersd.serve.service_request import ServiceRequest

ONGOING = 2  # requests that a replica takes with max_batch=1
QUEUE = 16
PROMPT = "a red circle on a blue background"
PHOTO = Image.linear_gradient("L").convert("RGB")


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A running service, and the folder of Ray's logs."""

    client: httpx.Client
    logs: Path

    def generate(self, **body: Any) -> httpx.Response:
        return self.client.post("/v1/images/generations", json={"prompt": PROMPT, **body})

    def calls(self, method: str, deployment: str = "default_Replica") -> list[tuple[str, str]]:
        """Calls that replicas finished: the replica's id, and the id of the request that they belong to."""
        calls = []
        for log in self.logs.glob(f"serve/replica_{deployment}_*.log"):
            for line in log.read_text().splitlines():
                if found := re.search(rf" (\S+) -- CALL {method} OK", line):
                    calls.append((log.stem.rpartition("_")[2], found[1]))
        return calls


@pytest.fixture(scope="module")
def ray_session() -> Iterator[dict[str, Any]]:
    """Ray on this machine, with a folder of its own; sockets need a short path."""
    folder = tempfile.mkdtemp(prefix="ray")
    context: Any = ray.init(
        address="local",
        num_cpus=4,  # two replicas, two actors of a batch; how many cores there really are does not matter
        include_dashboard=False,
        object_store_memory=100 << 20,
        log_to_driver=False,
        logging_level="warning",  # type: ignore[arg-type]
        _temp_dir=folder,
    )
    yield context.address_info
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def bundle(export_slotted: Callable[[str], Path]) -> Path:
    return export_slotted("Hyper-SD15-1step-lora")


@pytest.fixture(scope="module")
def pipeline(bundle: Path) -> Pipeline:
    return Pipeline.load(bundle, device="cpu")


@pytest.fixture(scope="module")
def loras(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a LoRA, ``style``, which the pipeline has, too."""
    assert pipeline.manifest.lora_slot is not None
    folder = tmp_path_factory.mktemp("loras")
    pipeline.load_lora_weights(write_slot_lora(pipeline.manifest.lora_slot, folder / "style.safetensors"))
    return folder


@pytest.fixture(scope="module")
def cluster(ray_session: dict[str, Any], bundle: Path, loras: Path) -> Iterator[Cluster]:
    """The service as ``serve run`` starts it."""
    port = free_port()
    serve.start(http_options={"port": port})
    arguments = {"bundles": bundle, "num_gpus": 0, "min_replicas": 2, "max_replicas": 2, "lora_folder": loras}
    serve.run(app({**arguments, "max_batch": 1, "queue": QUEUE, "timeout": 120}))
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200)
        yield Cluster(client, Path(ray_session["session_dir"]) / "logs")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def image(response: httpx.Response) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(response.json()["data"][0]["b64_json"])))


def is_image_of(pipe: Pipeline, image: Image.Image, prompt: str, /, **call: Any) -> bool:
    return ImageChops.difference(image, pipe(prompt, **call).images[0]).getbbox() is None


def all_at_once(generate: Callable[..., httpx.Response], seeds: Sequence[int], clients: int) -> list[httpx.Response]:
    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(lambda seed: generate(seed=seed), seeds))


def test_it_answers_as_the_service_on_one_machine(cluster: Cluster, pipeline: Pipeline, bundle: Path) -> None:
    """The same application: the same fields, errors and images, and no trace of Ray in them."""
    response = cluster.generate(seed=11)
    assert response.status_code == 200
    assert is_image_of(pipeline, image(response), PROMPT, seed=11)
    assert [card["id"] for card in cluster.client.get("/v1/models").json()["data"]] == [bundle.name]
    wrong, unknown = cluster.generate(size="8x8"), cluster.generate(model="other")
    assert (wrong.status_code, unknown.status_code) == (400, 404)
    assert re.match(r"(height|width) 8 is outside this bundle's 64", wrong.json()["error"]["message"])
    file = io.BytesIO()
    PHOTO.save(file, "PNG")
    form: dict[str, Any] = {"data": {"prompt": PROMPT, "seed": 11, "steps": 2}, "files": {"image": file.getvalue()}}
    call: dict[str, Any] = {"seed": 11, "num_inference_steps": 2, "image": PHOTO, "keep_steps": True}
    assert is_image_of(pipeline, image(cluster.client.post("/v1/images/edits", **form)), PROMPT, **call)
    assert cluster.client.get("/healthz").status_code == 200
    assert b'code="200",path="/v1/images/generations"' in cluster.client.get("/metrics").content


def test_the_live_page_works_through_ray(cluster: Cluster) -> None:
    """Its files are served, and its WebSocket answers the newest input."""
    assert cluster.client.get("/").status_code == 200

    async def talk() -> list[int]:
        url = f"ws://127.0.0.1:{cluster.client.base_url.port}/v1/live"
        async with websockets.connect(url, subprotocols=["hypersd.live"]) as connection:  # type: ignore[list-item]
            for number in range(1, 31):
                await connection.send(json.dumps({"id": number, "prompt": f"{PROMPT} {number}", "seed": 1}))
            answered = [0]
            while answered[-1] < 30:
                frame = await asyncio.wait_for(connection.recv(), 60)
                assert isinstance(frame, bytes)
                answered.append(json.loads(frame[4 : 4 + int.from_bytes(frame[:4], "big")])["id"])
            return answered[1:]

    answered = asyncio.run(talk())
    assert answered == sorted(answered)
    assert len(answered) < 30


def test_load_is_spread_over_both_replicas(cluster: Cluster) -> None:
    """Neither idles while the other has all of it."""
    responses = all_at_once(cluster.generate, range(40), clients=8)
    assert {response.status_code for response in responses} == {200}
    ids = {response.headers["x-request-id"] for response in responses}
    wait_until(lambda: ids <= {request for _, request in cluster.calls("generate")})  # the log comes after the answer
    counts = Counter(replica for replica, request in cluster.calls("generate") if request in ids)
    assert sum(counts.values()) == len(ids) == 40
    assert len(counts) == 2
    assert min(counts.values()) >= 5


def test_a_full_queue_rejects_at_once(cluster: Cluster) -> None:
    """Rejections come before the waiting images are generated, with a time to retry; all others are generated."""
    ended, order = [], itertools.count()

    def generate(seed: int) -> httpx.Response:
        with httpx.Client(base_url=cluster.client.base_url, timeout=120) as client:
            response = Cluster(client, cluster.logs).generate(seed=seed, steps=8)
        ended.append((next(order), response.status_code))
        return response

    responses = all_at_once(generate, range(64), clients=64)
    by_status = Counter(response.status_code for response in responses)
    assert set(by_status) == {200, 503}
    assert by_status[200] >= QUEUE
    rejected = next(response for response in responses if response.status_code == 503)
    assert rejected.json()["error"]["code"] == "queue_full"
    assert int(rejected.headers["retry-after"]) >= 1
    assert max(i for i, status in ended if status == 503) < max(i for i, status in ended if status == 200)
    assert cluster.generate(seed=1).status_code == 200


def test_a_replica_that_is_killed_under_load_loses_no_request(cluster: Cluster, pipeline: Pipeline) -> None:
    """Each request has one answer, with the image of its seed; only those in the dead replica are generated again."""
    victim = cluster.calls("generate")[-1][0]
    killed: list[str] = []

    def generate(seed: int) -> httpx.Response:
        if seed == 1020:
            replica = ray.get_actor(f"SERVE_REPLICA::default#Replica#{victim}", namespace="serve")
            wait_until(lambda: ray.get(replica.get_num_ongoing_requests.remote()) == ONGOING)
            ray.kill(replica)
            killed.append(victim)
        return cluster.generate(seed=seed, steps=4)

    seeds = range(1000, 1060)
    responses = all_at_once(generate, seeds, clients=8)
    assert killed
    assert [response.status_code for response in responses] == [200] * len(seeds)
    for seed, response in zip(seeds, responses, strict=True):
        assert response.json()["data"][0]["seed"] == seed
        assert is_image_of(pipeline, image(response), PROMPT, seed=seed, num_inference_steps=4), seed
    ids = {response.headers["x-request-id"] for response in responses}
    counts = Counter(request for _, request in cluster.calls("generate") if request in ids)
    assert sum(counts.values()) <= len(seeds) + ONGOING  # only requests in the dead replica are generated again
    figures = cluster.client.get("/metrics").text
    assert 1 <= float(re.findall(r'failed_images_total\{error="ReplicaDied"\} (\S+)', figures)[0]) <= ONGOING


def test_a_node_without_the_bundle_copies_it_once(cluster: Cluster, bundle: Path, tmp_path: Path) -> None:
    """Two replicas that start together on another node, which does not have the head node's folder."""
    shared = share(bundle)
    away = dataclasses.replace(shared, folder=Path("/nowhere") / shared.name)
    environment = {"env_vars": {"XDG_CACHE_HOME": str(tmp_path)}}
    replica = serve.deployment(
        name="Replica", num_replicas=2, ray_actor_options={"num_cpus": 0, "runtime_env": environment}
    )(Replica)
    shelf = serve.deployment(name="BundleShelf", ray_actor_options={"num_cpus": 0})(BundleShelf).bind([shared])
    handle = serve.run(replica.bind([away], shelf, device="cpu", queue=8, max_batch=1), name="away", route_prefix=None)
    assert [card.id for card in handle.models.remote().result()] == [bundle.name]
    assert len(list((tmp_path / "hypersd/bundles").glob("*/*/bundle.json"))) == 1
    reads = len(cluster.calls("read", "away_BundleShelf"))
    assert reads == 2 * (len(shared.files) + 1)  # each file, which is smaller than a message, and its end
    serve.delete("away")


def test_replicas_offer_the_loras_of_a_folder(cluster: Cluster, pipeline: Pipeline, bundle: Path, loras: Path) -> None:
    """They find new files by themselves; what comes back does not carry the file's contents."""
    handle = serve.get_deployment_handle("Replica", "default")

    def names() -> list[list[str]]:
        """The LoRAs that some replicas know."""
        answers = [handle.models.remote() for _ in range(8)]
        return [[adapter.name for adapter in answer.result()[0].adapters] for answer in answers]

    assert names() == [["style"]] * 8
    asked = ServiceRequest(model=bundle.name, params=Params(prompt=PROMPT, seed=(3,), adapters={"style": 0.5}))
    (one,) = handle.generate.remote(asked, 60.0).result()
    assert is_image_of(pipeline, one.image, PROMPT, seed=3, adapters={"style": 0.5})
    assert one.metadata["adapters"]["style"]["sha256"] == pipeline.adapters[0].sha256
    assert len(pickle.dumps(one.request)) < 10_000
    other = dataclasses.replace(asked, params=dataclasses.replace(asked.params, adapters={"other": 1.0}))
    assert "expected some of: style" in str(handle.generate.remote(other, 60.0).result())
    shutil.copy(loras / "style.safetensors", loras / "later.safetensors")
    wait_until(lambda: names() == [["later", "style"]] * 8)


@pytest.fixture
def run_batch(ray_session: dict[str, Any], bundle: Path, tmp_path: Path) -> Callable[..., Any]:
    """``run_batch(lines, *options)``: the command on these lines, into ``images`` in the test's folder."""

    def start(
        lines: Sequence[dict[str, Any]], *options: str, fresh: bool = False
    ) -> subprocess.Popen[str] | preloaded.Process:
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text("\n".join(map(json.dumps, lines)))
        command = ["batch", str(bundle), str(prompts), "-o", str(tmp_path / "images"), "--num-gpus", "0"]
        words = ["-m", "hypersd.cli", *command, "--address", ray_session["gcs_address"], *options]
        if fresh:
            return subprocess.Popen(
                [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        return preloaded.start(*words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    return start


def test_a_killed_batch_continues(run_batch, pipeline: Pipeline, loras: Path, tmp_path: Path) -> None:
    """Finished images are kept, missing and changed ones generated, LoRAs too; a line that fails stops no other."""
    lines: list[dict[str, Any]] = [{"prompt": f"{PROMPT} {i}", "steps": 4} for i in range(48)]
    lines[40]["size"] = "96x96"  # which the bundle does not support
    lines[27] |= {"image": "photo.png", "strength": 0.5}  # a path, from the file of prompts
    adapters = {36: {"style": 0.5}, 45: {"style": -1.0}}
    for i, asked in adapters.items():
        lines[i]["adapters"] = asked
    options = ["--lora-folder", str(loras)]
    PHOTO.save(tmp_path / "photo.png")
    folder = tmp_path / "images"
    first = run_batch(lines, "--actors", "1", *options, fresh=True)
    wait_until(lambda: first.poll() is not None or len(list(folder.glob("*.png"))) >= 8)
    first.kill()
    first.communicate()
    kept = times_of(folder)  # Ray ends the killed driver's actors after it: another image may still come

    lines[0]["prompt"] = "a green square"
    second = run_batch(lines, "--actors", "2", *options)
    said, _ = second.communicate()
    assert second.returncode == 1, said
    found = re.search(r"48 images: (\d+) exist, (\d+) to generate", said)
    assert found, said
    exist, missing = map(int, found.groups())
    assert len(kept) - 1 <= exist < 46, said
    assert exist + missing == 48, said
    assert "1 of them again because their settings changed" in said
    assert "prompts.jsonl line 41: height 96 is outside this bundle's 64" in said
    assert "1 of 48 images failed" in said
    times = times_of(folder)
    assert {name for name in kept if times[name] != kept[name]} == {"000001-0.png"}
    listed = [json.loads(line) for line in (folder / "images.jsonl").read_text().splitlines()]
    assert sorted(entry["file"] for entry in listed if not entry["error"]) == sorted(times)
    for entry in listed[::9]:
        call = {"seed": entry["seed"], "num_inference_steps": 4, "adapters": adapters.get(entry["line"] - 1)}
        if entry["line"] == 28:
            call |= {"image": PHOTO, "strength": 0.5, "keep_steps": True}
        with Image.open(folder / entry["file"]) as image:
            assert is_image_of(pipeline, image, entry["prompt"], **call)


def times_of(folder: Path) -> dict[str, int]:
    """When each image was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}
