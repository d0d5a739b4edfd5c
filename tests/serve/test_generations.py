"""POST /v1/images/generations: each field does what it says, and the images are the pipeline's own."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import httpx
import pytest
from PIL import Image
from stand_in_service import GENERATIONS, LONG, GatedPipeline

from hypersd import Pipeline
from hypersd.runtime.control_images import preprocess
from hypersd.runtime.image_files import fit

PROMPT = "a red circle and a blue square"


def decoded(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text, validate=True)))


def generate(client: httpx.Client, **body: Any) -> Image.Image:
    """The image of a request for one."""
    answer = client.post(GENERATIONS, json={"prompt": PROMPT, "seed": 5, **body})
    assert answer.status_code == 200, answer.text
    (image,) = answer.json()["data"]
    return decoded(image["b64_json"])


def rejected(client: httpx.Client, body: dict[str, Any], status: int = 400) -> dict[str, Any]:
    answer = client.post(GENERATIONS, json=body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert "\n" not in error["message"]
    return error


# Images


@pytest.mark.parametrize(
    ("body", "call"),
    [
        ({}, {}),
        ({"seed": 6}, {"seed": [6]}),
        ({"prompt": "a green triangle"}, {"prompt": ["a green triangle"]}),
        ({"steps": 4}, {"num_inference_steps": 4}),
        ({"steps": 4, "eta": 0}, {"num_inference_steps": 4, "eta": 0.0}),
        ({"steps": 2, "guidance_scale": 3}, {"num_inference_steps": 2, "guidance_scale": 3.0}),
        (
            {"steps": 2, "guidance_scale": 3, "negative_prompt": "blue"},
            {"num_inference_steps": 2, "guidance_scale": 3.0, "negative_prompt": ["blue"]},
        ),
    ],
)
def test_fields_are_the_pipelines_arguments(
    body: dict[str, Any], call: dict[str, Any], client: httpx.Client, demo_pipe: Pipeline
) -> None:
    """Same seed, same bytes; and every field changes the image."""
    usual = {"prompt": [PROMPT], "seed": [5]}
    image = generate(client, **body).tobytes()
    assert image == demo_pipe(**(usual | call)).images[0].tobytes()
    assert not call or image != demo_pipe(**usual).images[0].tobytes()


@pytest.mark.parametrize(
    ("body", "call"),
    [
        ({}, {}),
        ({"control_scale": 0.3}, {"controlnet_conditioning_scale": 0.3}),
        ({"steps": 4, "control_start": 0.5}, {"num_inference_steps": 4, "control_guidance_start": 0.5}),
        ({"steps": 4, "control_end": 0.5}, {"num_inference_steps": 4, "control_guidance_end": 0.5}),
        ({"preprocess": "none"}, {"preprocess": "none"}),
        ({"preprocess": "scribble"}, {"preprocess": "scribble"}),
        ({"resize_mode": "stretch"}, {"resize_mode": "stretch"}),
    ],
)
def test_fields_of_control_images(
    body: dict[str, Any], call: dict[str, Any], client: httpx.Client, demo_pipe: Pipeline, net: str, photo, photo_base64
) -> None:
    call = dict(call)
    seen = preprocess(fit(photo, 96, 96, call.pop("resize_mode", "crop")), call.pop("preprocess", "canny"))
    expected = demo_pipe([PROMPT], seed=[5], control_image={net: [seen]}, **call).images[0]
    image = generate(client, control_image=photo_base64, **body).tobytes()
    assert image == expected.tobytes()
    assert not body or image != generate(client, control_image=photo_base64).tobytes()


def test_ways_to_send_a_control_image(client: httpx.Client, net: str, photo_base64: str) -> None:
    plain = generate(client, control_image=photo_base64).tobytes()
    assert plain != generate(client).tobytes()
    assert generate(client, control_image=f"data:image/png;base64,{photo_base64}").tobytes() == plain
    assert generate(client, control_image={net: photo_base64}).tobytes() == plain


def test_several_images_have_seeds_in_a_row(client: httpx.Client, demo_pipe: Pipeline) -> None:
    answer = client.post(GENERATIONS, json={"prompt": PROMPT, "n": 3, "seed": 7}).json()
    assert [image["seed"] for image in answer["data"]] == [7, 8, 9]
    for image in answer["data"]:
        expected = demo_pipe([PROMPT], seed=[image["seed"]]).images[0]
        assert decoded(image["b64_json"]).tobytes() == expected.tobytes()


def test_a_request_without_a_seed_gets_a_random_one_and_the_answer_names_it(client: httpx.Client) -> None:
    """Another one for each request."""
    answers = [client.post(GENERATIONS, json={"prompt": PROMPT}).json()["data"][0] for _ in range(2)]
    assert answers[0]["seed"] != answers[1]["seed"]
    assert generate(client, seed=answers[0]["seed"]).tobytes() == decoded(answers[0]["b64_json"]).tobytes()


def test_fields_of_the_answer(client: httpx.Client) -> None:
    answer = client.post(GENERATIONS, json={"prompt": PROMPT, "steps": 2, "eta": 0.5, "size": "96x96"}).json()
    assert answer["model"] == "demo15-canny"
    assert (answer["size"], answer["steps"], answer["eta"], answer["output_format"]) == ("96x96", 2, 0.5, "png")
    assert answer["created"] > 1.7e9
    assert answer["waited"] >= 0
    assert {"tokenize", "encode", "denoise", "decode", "total"} <= answer["timings"].keys()


def test_the_model_is_the_first_bundle_or_the_one_that_is_named(client: httpx.Client, photo_base64: str) -> None:
    for model in ("demo15-canny", "demo15"):
        assert client.post(GENERATIONS, json={"prompt": "", "model": model}).json()["model"] == model
    error = rejected(client, {"prompt": "", "model": "demo15", "control_image": photo_base64})
    assert error["message"] == "control_image: demo15 has no ControlNet: leave control_image out"
    error = rejected(client, {"prompt": "", "model": "dall-e-3"}, 404)
    assert error["code"] == "model_not_found"
    assert "expected demo15-canny or demo15" in error["message"]


def test_other_fields_of_openais_clients_have_no_effect(client: httpx.Client) -> None:
    others = {
        "user": "me",
        "quality": "hd",
        "style": "vivid",
        "background": "auto",
        "moderation": "low",
        "stream": False,
        "partial_images": 0,
        "response_format": "b64_json",
        "size": "auto",
        "n": 1,
    }
    assert generate(client, **others).tobytes() == generate(client).tobytes()


# Formats


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_formats(kind: str, client: httpx.Client) -> None:
    image = generate(client, output_format=kind)
    assert image.format == kind.upper()
    assert image.size == (96, 96)


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_compression(kind: str, client: httpx.Client) -> None:
    sizes = [
        len(client.post(GENERATIONS, json={"prompt": PROMPT, "seed": 5, "output_format": kind, **more}).content)
        for more in ({"output_compression": 10}, {}, {"output_compression": 100})
    ]
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_a_client_that_accepts_images_gets_the_image(kind: str, client: httpx.Client) -> None:
    """The header has precedence over ``output_format``."""
    headers = {"Accept": f"text/html, image/{kind.upper()};q=0.9, */*"}
    answer = client.post(GENERATIONS, json={"prompt": PROMPT, "seed": 5}, headers=headers)
    assert answer.headers["content-type"] == f"image/{kind}"
    assert answer.headers["x-hypersd-seed"] == "5"
    assert json.loads(answer.headers["x-hypersd-timings"])["total"] > 0
    image = Image.open(io.BytesIO(answer.content))
    assert image.format == kind.upper()
    if kind == "png":
        assert image.tobytes() == generate(client).tobytes()


def test_several_images_are_json_whatever_is_accepted(client: httpx.Client) -> None:
    answer = client.post(GENERATIONS, json={"prompt": "", "n": 2}, headers={"Accept": "image/png"})
    assert len(answer.json()["data"]) == 2


def test_pngs_carry_the_settings_to_generate_them_again(client: httpx.Client, demo_pipe: Pipeline) -> None:
    """The settings include any prompt."""
    prompt = "ein Würfel 🎲 'quoted' \"twice\"\n\0 end"
    image = generate(client, prompt=prompt, seed=9, steps=2)
    settings = json.loads(image.info["hypersd"])  # type: ignore[arg-type]
    assert settings["prompt"] == prompt
    assert (settings["seed"], settings["num_inference_steps"], settings["eta"]) == (9, 2, 1.0)
    again = demo_pipe([settings["prompt"]], seed=[9], num_inference_steps=2, eta=settings["eta"])
    assert image.tobytes() == again.images[0].tobytes()


# Rejected requests


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": ["a"]}, "prompt"),
        ({"prompt": "", "n": 0}, "n"),
        ({"prompt": "", "n": True}, "n"),
        ({"prompt": "", "n": 1.5}, "n"),
        ({"prompt": "", "n": "2"}, "n"),
        ({"prompt": "", "size": "96"}, "size"),
        ({"prompt": "", "size": "-96x96"}, "size"),
        ({"prompt": "", "size": "٣x٣"}, "size"),
        ({"prompt": "", "response_format": "url"}, "response_format"),
        ({"prompt": "", "output_format": "gif"}, "output_format"),
        ({"prompt": "", "output_compression": 101}, "output_compression"),
        ({"prompt": "", "stream": True}, "stream"),
        ({"prompt": "", "background": "transparent"}, "background"),
        ({"prompt": "", "seed": -1}, "seed"),
        ({"prompt": "", "seed": 2**63}, "seed"),
        ({"prompt": "", "seed": 10**400}, "seed"),
        ({"prompt": "", "steps": 0}, "steps"),
        ({"prompt": "", "eta": 1.01}, "eta"),
        ({"prompt": "", "eta": True}, "eta"),
        ({"prompt": "", "guidance_scale": -1}, "guidance_scale"),
        ({"prompt": "", "preprocess": "depth"}, "preprocess"),
        ({"prompt": "", "control_image": 3}, "control_image"),
        ({"prompt": "", "num_inference_steps": 2}, "num_inference_steps"),
        ({"prompt": "", "\ud800": 2}, None),
    ],
)
def test_wrong_fields_are_named(body: dict[str, Any], param: str | None, client: httpx.Client) -> None:
    answer = client.post(GENERATIONS, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert param is None or error["param"] == param
    assert error["code"] == "invalid_request"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"n": 9}, "n 9: expected 1 to 8"),
        ({"prompt": "x" * 201}, "prompt: 201 characters: expected at most 200"),
        ({"negative_prompt": "x" * 201}, "negative_prompt: 201 characters: expected at most 200"),
        ({"size": "104x96"}, "width"),
        ({"size": "0x0"}, ""),
        ({"steps": 9}, "9"),
        ({"seed": 2**63 - 1, "n": 2}, "the last seed is above"),
        ({"control_scale": 1}, "control_scale has no effect without control_image"),
        ({"resize_mode": "crop"}, "resize_mode has no effect without image or control_image"),
        ({"control_image": {"depth": ""}}, "has no such ControlNet"),
    ],
)
def test_the_message_names_the_limit_that_a_request_exceeds(
    body: dict[str, Any], words: str, client: httpx.Client
) -> None:
    assert words in rejected(client, {"prompt": "", **body})["message"]


def test_a_request_that_takes_too_long_is_504(gated: GatedPipeline, start_server) -> None:
    server = start_server(gated, timeout=0.05)
    gated.gate.clear()
    answer = httpx.post(server.url + GENERATIONS, json={"prompt": "slow"}, timeout=LONG)
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "timeout"
