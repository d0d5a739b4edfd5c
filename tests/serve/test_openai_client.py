"""The official ``openai`` package, as people use it, against the service."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from PIL import Image
from stand_in_service import LONG, GatedPipeline, RunningServer, wait_until

from hypersd import Pipeline

PROMPT = "a red circle and a blue square"


def settings(server: RunningServer, key: str = "unused") -> dict[str, Any]:
    return {"base_url": f"{server.url}/v1", "api_key": key, "max_retries": 0, "timeout": LONG}


@pytest.fixture(scope="module")
def client(demo_server: RunningServer) -> Iterator[OpenAI]:
    with OpenAI(**settings(demo_server)) as client:
        yield client


def pixels(image: Any) -> bytes:
    return Image.open(io.BytesIO(base64.b64decode(image.b64_json))).tobytes()


def test_images(client: OpenAI, demo_pipe: Pipeline) -> None:
    answer = client.images.generate(
        model="demo15-canny",
        prompt=PROMPT,
        n=2,
        size="96x96",  # type: ignore[arg-type]  # theirs are others
        response_format="b64_json",
        extra_body={"seed": 3, "steps": 4},
    )
    assert answer.data is not None
    expected = [demo_pipe([PROMPT], seed=[seed], num_inference_steps=4).images[0].tobytes() for seed in (3, 4)]
    assert [pixels(image) for image in answer.data] == expected
    assert answer.output_format == "png"
    assert answer.created > 1.7e9
    assert answer.data[0].seed == 3  # type: ignore[attr-defined]
    assert answer.data[0].revised_prompt is None


def test_only_a_prompt(client: OpenAI) -> None:
    answer = client.images.generate(prompt="a cat")
    assert answer.data is not None
    assert len(pixels(answer.data[0])) == 96 * 96 * 3


def test_asynchronously(demo_server: RunningServer, demo_pipe: Pipeline) -> None:
    async def generate() -> list[bytes]:
        async with AsyncOpenAI(**settings(demo_server)) as client:
            ask = client.images.generate
            answers = await asyncio.gather(*(ask(prompt=PROMPT, extra_body={"seed": seed}) for seed in range(3)))
        return [pixels(answer.data[0]) for answer in answers if answer.data]

    assert asyncio.run(generate()) == [demo_pipe([PROMPT], seed=[seed]).images[0].tobytes() for seed in range(3)]


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo15-canny", "demo15"]


def test_errors_are_those_of_the_openai_package(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="size") as raised:
        client.images.generate(prompt="", size="large")  # type: ignore[arg-type]
    assert (raised.value.param, raised.value.code) == ("size", "invalid_request")
    with pytest.raises(openai.BadRequestError, match="response_format"):
        client.images.generate(prompt="", response_format="url")
    with pytest.raises(openai.NotFoundError, match="expected demo15-canny or demo15"):
        client.images.generate(prompt="", model="dall-e-3")


def test_a_body_that_is_too_large_is_no_network_error(client: OpenAI) -> None:
    with pytest.raises(openai.APIStatusError, match="the body has more than") as raised:
        client.images.generate(prompt="x" * (12 << 20))
    assert raised.value.status_code == 413


def test_the_key_is_the_token(gated: GatedPipeline, start_server) -> None:
    server = start_server(gated, token="sesame")
    with OpenAI(**settings(server, "wrong")) as client, pytest.raises(openai.AuthenticationError):
        client.images.generate(prompt="")
    with OpenAI(**settings(server, "sesame")) as client:
        assert client.images.generate(prompt="").data


def test_a_full_queue_is_503(gated: GatedPipeline, start_server) -> None:
    server = start_server(gated, queue=1)
    gated.gate.clear()
    with OpenAI(**settings(server)) as client, ThreadPoolExecutor() as pool:
        waiting = [pool.submit(client.images.generate, prompt="first")]
        wait_until(lambda: gated.calls)
        waiting.append(pool.submit(client.images.generate, prompt="second"))
        wait_until(lambda: len(server.service._jobs) == 1)
        with pytest.raises(openai.InternalServerError) as raised:
            client.images.generate(prompt="third")
        gated.gate.set()
        assert all(future.result(LONG).data for future in waiting)
    assert raised.value.status_code == 503
    assert int(raised.value.response.headers["retry-after"]) >= 1
