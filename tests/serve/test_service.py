"""The service without its HTTP side: shared calls, dropped images, and failures.

Images are the demonstration checkpoint's. Where the order of things matters, a gate holds its pipeline back.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import shutil
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from stand_in_service import GatedPipeline, StandInService, until
from waiting import LONG

from hypersd import Pipeline
from hypersd.engines.specs import Range
from hypersd.errors import EngineError, HyperSDError, RequestError
from hypersd.runtime.params import Params
from hypersd.runtime.pipeline import PipelineOutput
from hypersd.serve.calls import images_at_once, make_jobs
from hypersd.serve.server import run_server
from hypersd.serve.service import LocalService
from hypersd.serve.service_errors import NotReadyError, QueueFullError, StoppingError, TimedOutError, UnknownModelError
from hypersd.serve.service_request import GeneratedImage, ServiceRequest
from hypersd.serve.settings import ServeSettings

MODEL = "demo15-canny"


def service_request(prompt: str = "a red circle", *seeds: int, **settings: Any) -> ServiceRequest:
    seeds = seeds or (0,)
    params = Params(prompt=prompt, seed=seeds, num_images_per_prompt=len(seeds), **settings)
    return ServiceRequest(model=MODEL, params=params)


async def begin(
    service: LocalService, *service_requests: ServiceRequest, timeout: float = LONG
) -> list[asyncio.Task[list[GeneratedImage]]]:
    """Requests that have come, one after the other, and wait."""
    tasks = []
    for one in service_requests:
        waiting = len(service._jobs)
        tasks.append(asyncio.create_task(service.generate(one, timeout)))
        await until(lambda waiting=waiting, one=one: len(service._jobs) == waiting + len(one.seeds))
    return tasks


async def hold(service: LocalService, pipe: GatedPipeline) -> asyncio.Task[list[GeneratedImage]]:
    """Keep the worker busy with an image until the gate is opened."""
    pipe.gate.clear()
    before = len(pipe.calls)
    task = asyncio.create_task(service.generate(service_request("first"), LONG))
    await pipe.begun(before + 1)
    return task


def counted(service: LocalService, name: str, **labels: str) -> float:
    return service.metrics.registry.get_sample_value(name, labels) or 0.0


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 2 * LONG))


# Shared calls


def test_alike_requests_share_a_call_while_the_device_is_busy(gated: GatedPipeline, start_service) -> None:
    """The first does not wait for others; requests that come meanwhile share a call, up to the size of a run."""
    service = start_service(gated)

    async def scenario() -> None:
        first = await hold(service, gated)
        others = await begin(service, *(service_request(str(i), i) for i in range(5)))
        gated.gate.set()
        images = [one for task in (first, *others) for one in await task]
        assert [one.batch for one in images] == [1, 4, 4, 4, 4, 1]

    run(scenario())
    assert gated.calls == [["first"], ["0", "1", "2", "3"], ["4"]]
    assert counted(service, "hypersd_batch_size_count", model=MODEL) == 3
    assert counted(service, "hypersd_images_total", model=MODEL) == 6


def test_max_batch_bounds_a_call(gated: GatedPipeline, start_service) -> None:
    service = start_service(gated, max_batch=2)

    async def scenario() -> None:
        first = await hold(service, gated)
        (others,) = await begin(service, service_request("x", 1, 2, 3))
        gated.gate.set()
        await asyncio.gather(first, others)

    run(scenario())
    assert gated.calls == [["first"], ["x", "x"], ["x"]]


def test_unlike_requests_are_generated_apart_the_oldest_first(gated: GatedPipeline, start_service) -> None:
    service = start_service(gated)

    async def scenario() -> None:
        first = await hold(service, gated)
        others = await begin(
            service, service_request("b", num_inference_steps=2), service_request("c"), service_request("d", eta=0.5)
        )
        others += await begin(
            service, service_request("e", num_inference_steps=2), service_request("f", num_inference_steps=1)
        )
        gated.gate.set()
        await asyncio.gather(first, *others)

    run(scenario())
    assert gated.calls == [["first"], ["b", "e"], ["c", "f"], ["d"]]


@pytest.mark.parametrize(
    ("change", "is_alike"),
    [
        ({"prompt": "another"}, True),
        ({"seed": (7, 8), "num_images_per_prompt": 2}, True),
        ({"num_inference_steps": 1, "eta": 1.0, "guidance_scale": 0.0, "height": 96, "width": 96}, True),
        ({"num_inference_steps": 2}, False),
        ({"eta": 0.5}, False),
        ({"guidance_scale": 2.0}, False),
        ({"negative_prompt": "blue"}, False),
    ],
)
def test_jobs_that_one_call_can_generate(change: dict[str, Any], is_alike: bool, demo_pipe: Pipeline) -> None:
    """A param that is left out counts as its default."""
    settings: dict[str, Any] = {"prompt": "a", "seed": (0,)}
    keys = [
        make_jobs(demo_pipe, ServiceRequest(model=model, params=Params(**one)))[0].key
        for model, one in ((MODEL, settings), (MODEL, settings | change), ("another", settings))
    ]
    assert (keys[0] == keys[1]) is is_alike
    assert keys[0] != keys[2]


def test_the_strength_of_a_controlnet_counts_and_its_image_does_not(demo_pipe: Pipeline) -> None:
    (net,) = demo_pipe.manifest.controlnets

    def key(colour: str, mode: str = "crop", **settings: Any) -> Any:
        image = {net: Image.new("RGB", (96, 96), colour)}
        return make_jobs(demo_pipe, service_request("", control_image=image, resize_mode=mode, **settings))[0].key

    assert key("red") == key("blue") == key("blue", "stretch") == key("red", controlnet_conditioning_scale=1.0)
    assert key("red") != key("red", controlnet_conditioning_scale=0.5)
    assert key("red") != key("red", control_guidance_end=0.5)
    assert key("red") != make_jobs(demo_pipe, service_request(""))[0].key


@pytest.mark.parametrize(("device", "expected"), [("cpu", 2), ("cuda", 6)])
def test_images_at_once(device: str, expected: int) -> None:
    """On a CPU kernels round by the number of rows, so that it must not change."""
    shapes = SimpleNamespace(batch=Range(name="batch", min=2, opt=3, max=6))
    pipe: Any = SimpleNamespace(manifest=SimpleNamespace(shapes=shapes), device=torch.device(device))
    assert images_at_once(pipe) == expected


@pytest.fixture(scope="module")
def batch_of_three(batch_of_three_bundle: Path) -> Pipeline:
    return Pipeline.load(batch_of_three_bundle, device="cpu")


def test_an_image_does_not_depend_on_its_neighbours(batch_of_three: Pipeline, start_service) -> None:
    """Alone, first, in the middle and last of a call, beside other prompts and seeds: the same bytes."""
    gated = GatedPipeline(batch_of_three, batch=3)
    service = start_service(gated)
    wanted, other = service_request("a cat", 5), service_request("a dog under a tree", 9)

    async def beside(*service_requests: ServiceRequest) -> bytes:
        """The wanted image, from a call that generates all of these."""
        first = await hold(service, gated)
        tasks = await begin(service, *service_requests)
        gated.gate.set()
        await first
        images = [(await task)[0] for task in tasks]
        assert {one.batch for one in images} == {len(service_requests)}
        return images[service_requests.index(wanted)].image.tobytes()

    async def scenario() -> set[bytes]:
        crowds = [(wanted,), (wanted, other, other), (other, wanted, other), (other, service_request("", 5), wanted)]
        return {await beside(*crowd) for crowd in crowds}

    (seen,) = run(scenario())
    assert seen == batch_of_three("a cat", seed=[5]).images[0].tobytes()
    assert seen != batch_of_three("a cat", seed=[6]).images[0].tobytes()


def test_two_workers_share_the_queue(demo_pipe: Pipeline, start_service) -> None:
    """Each generates while the other is busy."""
    pipes = [GatedPipeline(demo_pipe), GatedPipeline(demo_pipe)]
    service = start_service(*pipes)

    async def scenario() -> None:
        for pipe in pipes:
            pipe.gate.clear()
        tasks = [asyncio.create_task(service.generate(service_request(str(i)), LONG)) for i in range(2)]
        for pipe in pipes:
            await pipe.begun()
        for pipe in pipes:
            pipe.gate.set()
        await asyncio.gather(*tasks)

    run(scenario())
    assert sorted(pipe.prompts[0] for pipe in pipes) == ["0", "1"]


# Dropped images


def test_beyond_the_bound_requests_are_rejected_at_once_and_whole(gated: GatedPipeline, start_service) -> None:
    service = start_service(gated, queue=2)

    async def scenario() -> None:
        first = await hold(service, gated)
        waiting = await begin(service, service_request("waits"))
        for seeds in ((1, 2), (1, 2, 3)):
            with pytest.raises(QueueFullError) as raised:
                await service.generate(service_request("rejected", *seeds), LONG)
            assert raised.value.retry_after >= 1
        waiting += await begin(service, service_request("fits"))
        gated.gate.set()
        await asyncio.gather(first, *waiting)

    run(scenario())
    assert gated.prompts == ["first", "waits", "fits"]
    assert counted(service, "hypersd_rejected_total", reason="queue_full") == 2


def test_an_image_that_is_not_begun_in_time_is_not_generated(gated: GatedPipeline, start_service) -> None:
    service = start_service(gated)

    async def scenario() -> None:
        first = await hold(service, gated)
        with pytest.raises(TimedOutError, match=r"not finished within 0.01 s: ask"):
            await service.generate(service_request("late", 1, 2), 0.01)
        gated.gate.set()
        await first
        await service.generate(service_request("next"), LONG)

    run(scenario())
    assert gated.prompts == ["first", "next"]
    assert counted(service, "hypersd_dropped_images_total", reason="timeout") == 2


def test_the_later_images_of_a_request_under_way_are_dropped(gated: GatedPipeline, start_service) -> None:
    service = start_service(gated, max_batch=1)

    async def scenario() -> None:
        gated.gate.clear()
        gone = asyncio.create_task(service.generate(service_request("gone", 1, 2, 3), LONG))
        await gated.begun()
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        gated.gate.set()
        await service.generate(service_request("next"), LONG)

    run(scenario())
    assert gated.prompts == ["gone", "next"]


def test_a_cancelled_request_is_not_generated(gated: GatedPipeline, start_service) -> None:
    service = start_service(gated)

    async def scenario() -> None:
        first = await hold(service, gated)
        gone, stays = await begin(service, service_request("gone"), service_request("stays"))
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        gated.gate.set()
        await asyncio.gather(first, stays)

    run(scenario())
    assert gated.prompts == ["first", "stays"]
    assert counted(service, "hypersd_dropped_images_total", reason="cancelled") == 1


def test_superseded_images_are_dropped_and_begun_ones_are_finished(gated: GatedPipeline, start_service) -> None:
    service = start_service(gated, max_batch=1)

    async def scenario() -> tuple[list[GeneratedImage], list[GeneratedImage]]:
        gated.gate.clear()
        superseded = asyncio.Event()
        begun = asyncio.create_task(service.generate(service_request("begun", 1, 2), LONG, superseded))
        await gated.begun()
        waits = asyncio.create_task(service.generate(service_request("waits", 3), LONG, superseded))
        await until(lambda: len(service._jobs) == 2)
        superseded.set()
        await until(lambda: len(service._jobs) == 0)
        gated.gate.set()
        return await begun, await waits

    begun, waits = run(scenario())
    assert [one.seed for one in begun] == [1]
    assert waits == []
    assert gated.prompts == ["begun"]
    assert counted(service, "hypersd_dropped_images_total", reason="superseded") == 2


def test_the_end(gated: GatedPipeline, start_service) -> None:
    """Begun images are finished; waiting and new requests are rejected."""
    service = start_service(gated)

    async def scenario() -> None:
        first = await hold(service, gated)
        (waiting,) = await begin(service, service_request("waits"))
        service.stop()
        assert not service.is_ready()
        with pytest.raises(StoppingError):
            await waiting
        with pytest.raises(StoppingError):
            await service.generate(service_request("comes"), LONG)
        gated.gate.set()
        assert len(await first) == 1

    run(scenario())
    service.join(LONG)
    assert not any(worker.is_alive() for worker in service.workers)
    assert gated.prompts == ["first"]


# Failures


def raises(error: BaseException) -> Callable[[list[str]], object]:
    def on_call(prompts: list[str]) -> None:
        if "bad" in prompts:
            raise error

    return on_call


def test_one_that_fails_does_not_spoil_those_it_is_generated_with(gated: GatedPipeline, start_service) -> None:
    service = start_service(gated)
    gated.on_call = raises(RuntimeError("kernel"))

    async def scenario() -> None:
        first = await hold(service, gated)
        a, bad, c = await begin(service, service_request("a"), service_request("bad"), service_request("c"))
        gated.gate.set()
        await asyncio.gather(first, a, c)
        with pytest.raises(EngineError):
            await bad

    run(scenario())
    assert gated.calls == [["first"], ["a", "bad", "c"], ["a"], ["bad"], ["c"]]


def test_images_of_a_call_are_handed_out_together_or_not_at_all(
    gated: GatedPipeline, start_service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else those that were handed out before the failure would be generated again, for clients that have them."""
    service = start_service(gated)
    generate = gated.generate

    def one_image_too_few(params: Params) -> PipelineOutput:
        output = generate(params)
        kept = output.images[:-1] if len(output.images) > 1 else output.images
        return dataclasses.replace(output, images=kept)

    monkeypatch.setattr(gated, "generate", one_image_too_few)

    async def scenario() -> None:
        first = await hold(service, gated)
        a, b = await begin(service, service_request("a"), service_request("b"))
        gated.gate.set()
        await asyncio.gather(first, a, b)

    run(scenario())
    assert service.is_ready()
    assert gated.calls == [["first"], ["a", "b"], ["a"], ["b"]]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("a kernel\nbroke"), r"^generating failed \(RuntimeError: a kernel broke\)$"),
        (MemoryError(), "^out of memory: generate smaller images, or fewer at a time$"),
        (EngineError("out of memory for 1 image"), "^out of memory for 1 image$"),
    ],
)
def test_an_engine_that_fails(error: Exception, words: str, gated: GatedPipeline, start_service) -> None:
    """The request fails with one line; the service keeps running."""
    service = start_service(gated)
    gated.on_call = raises(error)

    async def scenario() -> None:
        with pytest.raises(EngineError, match=words):
            await service.generate(service_request("bad"), LONG)
        assert len(await service.generate(service_request("good"), LONG)) == 1

    run(scenario())
    assert service.is_ready()


def test_readiness_ends_with_three_failures_in_a_row_and_returns_with_a_success(
    gated: GatedPipeline, start_service
) -> None:
    service = start_service(gated)
    gated.on_call = raises(RuntimeError("the device is lost"))

    async def after(prompt: str) -> bool:
        await asyncio.gather(service.generate(service_request(prompt), LONG), return_exceptions=True)
        return service.is_ready()

    async def scenario() -> list[bool]:
        return [await after(prompt) for prompt in ("bad", "bad", "good", "bad", "bad", "bad", "bad", "good")]

    assert run(scenario()) == [True, True, True, True, True, False, False, True]
    assert counted(service, "hypersd_failed_images_total", error="RuntimeError") == 6


class Catastrophe(BaseException):
    """An error that no handler expects."""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_readiness_ends_when_the_worker_ends(gated: GatedPipeline, start_service) -> None:
    """Its image fails at once, and so do later requests: nobody is left to answer them."""
    service = start_service(gated)
    gated.on_call = raises(Catastrophe())

    async def scenario() -> None:
        with pytest.raises(EngineError, match=r"^the device's worker has ended \(Catastrophe\)$"):
            await service.generate(service_request("bad"), 5.0)
        await until(lambda: not service.workers[0].is_alive())
        assert not service.is_ready()
        with pytest.raises(NotReadyError, match="no device is left"):
            await service.generate(service_request("next"), LONG)

    run(scenario())


def test_wrong_requests_do_not_count_against_the_device(gated: GatedPipeline, start_service) -> None:
    """Else a client could take the service from the others."""
    service = start_service(gated)
    gated.on_call = raises(RequestError("bad prompt: expected another"))

    async def scenario() -> None:
        for _ in range(4):
            with pytest.raises(RequestError):
                await service.generate(service_request("bad"), LONG)

    run(scenario())
    assert service.is_ready()


def test_nothing_is_generated_before_the_bundles_are_loaded(gated: GatedPipeline, demo_canny_bundle: Path) -> None:
    service = StandInService(demo_canny_bundle, gated)
    assert not service.is_ready()
    with pytest.raises(NotReadyError):
        service.models()
    with pytest.raises(NotReadyError):
        run(service.generate(service_request(), LONG))


@pytest.mark.parametrize(
    ("wrong", "error"),
    [(service_request(num_inference_steps=9), RequestError), (service_request(height=64), RequestError)],
)
def test_requests_outside_the_bundles_range_are_rejected_at_once(
    wrong: ServiceRequest, error: type[Exception], gated, start_service
) -> None:
    service = start_service(gated)
    with pytest.raises(error):
        run(service.generate(wrong, LONG))
    with pytest.raises(UnknownModelError):
        run(service.generate(ServiceRequest(model="another", params=Params(prompt="", seed=(0,))), LONG))
    assert gated.calls == []


@pytest.fixture
def own_copy(demo_canny_bundle: Path, tmp_path: Path) -> Path:
    """The bundle's files themselves, not links to them."""
    return Path(shutil.copytree(demo_canny_bundle, tmp_path / MODEL))


def test_a_bundle_that_cannot_be_loaded_ends_the_server(own_copy: Path) -> None:
    service, heard = LocalService([own_copy], devices=["cpu"]), list[str]()
    damaged = own_copy / "unet" / "model.onnx"
    damaged.write_bytes(bytes(damaged.stat().st_size))
    with pytest.raises(HyperSDError, match=r"model\.onnx"):
        run_server(service, ServeSettings(), "127.0.0.1", 0, heard.append)
    assert not service.is_ready()
    assert len(heard) == 1, "it answered /healthz meanwhile"


def test_folders_are_told_apart_by_name(demo_canny_bundle: Path, own_copy: Path) -> None:
    with pytest.raises(RequestError, match=f"two bundles are named {MODEL}"):
        LocalService([demo_canny_bundle, own_copy])


def replace(folder: Path, other: Path) -> None:
    folder.rename(folder.with_name("old"))
    shutil.copytree(other, folder)


def rewrite(folder: Path, other: Path) -> None:
    """As an export does that writes to the same folder: file by file."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            new = path.with_name("new")
            new.write_bytes(b"something else")
            new.rename(path)


@pytest.mark.parametrize("change", [replace, rewrite, lambda folder, other: shutil.rmtree(folder)])
def test_a_bundle_that_changes_while_it_is_served(
    change: Callable[[Path, Path], object], own_copy: Path, demo_bundle: Path
) -> None:
    """The loaded bundle is used, and reported as changed."""
    service = LocalService([own_copy], devices=["cpu"])
    service.start()
    service.wait_ready()

    def image() -> bytes:
        return run(service.generate(service_request("a red circle", 3), LONG))[0].image.tobytes()

    before = image()
    assert not service.models()[0].changed_on_disk
    change(own_copy, demo_bundle)
    assert image() == before
    assert service.models()[0].changed_on_disk
    service.stop()


def test_requests_do_not_read_manifests(own_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A manifest is read again only after its file has changed, and a touched file has not changed."""
    service = LocalService([own_copy], devices=["cpu"])
    service.start()
    service.wait_ready()
    manifest, reads, read_bytes = own_copy / "bundle.json", list[Path](), Path.read_bytes

    def counting(path: Path) -> bytes:
        reads.append(path)
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", counting)
    assert not any(service.models()[0].changed_on_disk for _ in range(3))
    assert reads == []
    os.utime(manifest, (0, 0))
    assert not any(service.models()[0].changed_on_disk for _ in range(3))
    assert reads == [manifest]
    service.stop()
