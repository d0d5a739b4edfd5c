"""POST /v1/images/edits: images that start from an image, in forms and in JSON, and what is wrong with some of them."""

from __future__ import annotations

import base64
import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from PIL import Image
from serve_sockets import error_of, exchange, whole
from stand_in_service import LONG, GatedPipeline, RunningServer, file_of, wait_until

from hypersd import Pipeline
from hypersd.errors import RequestError
from hypersd.runtime.control_images import preprocess
from hypersd.runtime.image_files import fit
from hypersd.serve.intake import read_request
from hypersd.serve.schemas import GenerationRequest

EDITS = "/v1/images/edits"
PROMPT = "a red circle and a blue square"
USUAL = {"prompt": PROMPT, "seed": 5, "steps": 4}


@pytest.fixture(scope="module")
def mask(photo: Image.Image) -> Image.Image:
    """A part on the right of the photo is repainted."""
    mask = Image.new("L", photo.size)
    mask.paste(255, (60, 10, 105, 70))
    return mask


def base64_of(image: Image.Image) -> str:
    return base64.b64encode(file_of(image)).decode()


def with_alpha(image: Image.Image, mask: Image.Image) -> Image.Image:
    """The image, transparent where the mask is white."""
    image = image.convert("RGBA")
    image.putalpha(mask.point(lambda value: 255 - value))
    return image


def post_form(client: httpx.Client, files: dict[str, Image.Image], **fields: Any) -> httpx.Response:
    parts = {name: (f"{name}.png", file_of(image), "image/png") for name, image in files.items()}
    return client.post(EDITS, data={**USUAL, **fields}, files=parts)


def images(answer: httpx.Response) -> list[Image.Image]:
    assert answer.status_code == 200, answer.text
    return [Image.open(io.BytesIO(base64.b64decode(one["b64_json"]))) for one in answer.json()["data"]]


def edited(client: httpx.Client, files: dict[str, Image.Image], **fields: Any) -> bytes:
    (image,) = images(post_form(client, files, **fields))
    return image.tobytes()


def message(answer: httpx.Response, status: int = 400) -> str:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert "\n" not in error["message"]
    return error["message"]


# Images


@pytest.mark.parametrize(
    ("fields", "call", "has_mask"),
    [
        ({}, {}, False),
        ({"strength": 0.5}, {"strength": 0.5}, False),
        ({"strength": 0.5, "keep_steps": "false"}, {"strength": 0.5, "keep_steps": False}, False),
        ({"resize_mode": "stretch"}, {"resize_mode": "stretch"}, False),
        ({"resize_mode": "fill"}, {"resize_mode": "fill"}, False),
        ({"guidance_scale": 3, "negative_prompt": "blue"}, {"guidance_scale": 3.0, "negative_prompt": "blue"}, False),
        ({}, {}, True),
        ({"strength": 0.5}, {"strength": 0.5}, True),
        ({"mask_blur": 20}, {"mask_blur": 20}, True),
        ({"padding_mask_crop": 8}, {"padding_mask_crop": 8}, True),
    ],
)
def test_fields_are_the_pipelines_arguments(
    fields: dict[str, Any],
    call: dict[str, Any],
    has_mask: bool,
    client: httpx.Client,
    demo_pipe: Pipeline,
    photo: Image.Image,
    mask: Image.Image,
) -> None:
    """Same seed, same bytes; and every field changes the image."""
    files, given = {"image": photo}, {"image": photo}
    if has_mask:
        files, given = {**files, "mask": mask}, {**given, "mask_image": mask}
    usual: dict[str, Any] = {"seed": [5], "num_inference_steps": 4, "keep_steps": True, **given}
    expected = demo_pipe([PROMPT], **{**usual, **call}).images[0]
    answer = post_form(client, files, **fields)
    (image,) = images(answer)
    assert image.tobytes() == expected.tobytes()
    assert answer.json()["size"] == f"{expected.width}x{expected.height}"
    assert not fields or image.tobytes() != edited(client, files)


def test_a_form_and_json_are_alike(client: httpx.Client, photo: Image.Image, mask: Image.Image) -> None:
    """Files in a form, base64 in a form or in JSON, and the same fields in a request for images."""
    expected = edited(client, {"image": photo, "mask": mask}, strength=0.7)
    texts = {"image": base64_of(photo), "mask": f"data:image/png;base64,{base64_of(mask)}", "strength": 0.7}
    for path in (EDITS, "/v1/images/generations"):
        assert images(client.post(path, json={**USUAL, **texts}))[0].tobytes() == expected
    parts = {name: (None, str(value)) for name, value in {**USUAL, **texts}.items()}
    assert images(client.post(EDITS, files=parts))[0].tobytes() == expected


def test_the_image_itself_is_answered_where_it_is_accepted(client: httpx.Client, photo: Image.Image) -> None:
    files = {"image": ("a.jpg", file_of(photo, "JPEG"), "image/jpeg")}
    answer = client.post(EDITS, data=USUAL, files=files, headers={"Accept": "image/webp"})
    assert answer.headers["content-type"] == "image/webp"
    assert Image.open(io.BytesIO(answer.content)).size == (96, 96)


def test_several_images_start_from_the_same(client: httpx.Client, demo_pipe: Pipeline, photo: Image.Image) -> None:
    answer = post_form(client, {"image": photo}, n=2)
    for seed, image in zip((5, 6), images(answer), strict=True):
        call: dict[str, Any] = {"seed": [seed], "num_inference_steps": 4, "keep_steps": True}
        assert image.tobytes() == demo_pipe([PROMPT], image=photo, **call).images[0].tobytes()


def test_a_control_image_beside_it(client: httpx.Client, demo_pipe: Pipeline, photo: Image.Image, mask) -> None:
    (net,) = demo_pipe.manifest.controlnets
    seen = {net: [preprocess(fit(mask.convert("RGB"), 96, 96), "canny")]}
    call: dict[str, Any] = {"seed": [5], "num_inference_steps": 4, "keep_steps": True, "strength": 0.9}
    expected = demo_pipe([PROMPT], image=photo, control_image=seen, **call).images[0].tobytes()
    files = {"image": photo, "control_image": mask}
    assert edited(client, files, strength=0.9) == expected
    assert edited(client, {"image": photo, f"control_image[{net}]": mask}, strength=0.9) == expected


def test_a_mask_is_its_transparent_pixels_or_its_white_ones(
    client: httpx.Client, photo: Image.Image, mask: Image.Image
) -> None:
    """As OpenAI's API has them, and as everybody else has them."""
    white = edited(client, {"image": photo, "mask": mask})
    opaque = Image.merge("RGBA", (mask, mask, mask, Image.new("L", mask.size, 255)))
    for same in (
        with_alpha(Image.new("RGB", mask.size), mask),
        opaque,
        mask.convert("RGB"),
        mask.resize((240, 160), 0),
    ):
        assert edited(client, {"image": photo, "mask": same}) == white
    assert white != edited(client, {"image": photo})


def test_an_images_own_transparent_pixels_are_its_mask(
    client: httpx.Client, photo: Image.Image, mask: Image.Image
) -> None:
    """For an edit; elsewhere if the word asks for it, and otherwise they are laid on white."""
    transparent = with_alpha(photo, mask)
    on_white = Image.composite(Image.new("RGB", photo.size, "white"), photo, mask)
    expected = edited(client, {"image": on_white, "mask": mask})
    assert edited(client, {"image": transparent}) == expected
    body = {**USUAL, "image": base64_of(transparent)}
    generated = [
        images(client.post("/v1/images/generations", json={**body, **more}))[0] for more in ({}, {"mask": "alpha"})
    ]
    assert generated[0].tobytes() == edited(client, {"image": on_white})
    assert generated[1].tobytes() == expected


def test_a_base_for_inpainting(start_server, export_inpainting, photo: Image.Image, mask: Image.Image) -> None:
    """Its UNet takes a mask in any case: everywhere if none is sent, as in diffusers."""
    pipe = Pipeline.load(export_inpainting("Hyper-SD15-1step-lora"), device="cpu")
    server = start_server(pipe)
    with httpx.Client(base_url=server.url, timeout=LONG) as client:
        files = {"image": photo, "mask": mask}
        got = [
            edited(client, files),
            edited(client, {"image": photo}),
            images(client.post("/v1/images/generations", json=USUAL))[0].tobytes(),
        ]
    calls: list[dict[str, Any]] = [
        {"image": photo, "mask_image": mask, "keep_steps": True},
        {"image": photo, "keep_steps": True},
        {},
    ]
    for image, call in zip(got, calls, strict=True):
        assert image == pipe([PROMPT], seed=[5], num_inference_steps=4, **call).images[0].tobytes()
    assert len({*got}) == 3


# OpenAI's client


def test_openais_client_edits(demo_server: RunningServer, demo_pipe: Pipeline, photo: Image.Image, mask) -> None:
    hole = with_alpha(Image.new("RGB", mask.size), mask)
    call: dict[str, Any] = {"num_inference_steps": 4, "keep_steps": True, "image": photo}
    with OpenAI(base_url=f"{demo_server.url}/v1", api_key="unused", max_retries=0, timeout=LONG) as client:
        edit = client.images.edit
        answers = [
            edit(
                image=io.BytesIO(file_of(photo)), mask=file_of(hole), prompt=PROMPT, extra_body={"seed": 5, "steps": 4}
            ),
            edit(image=[("a.png", file_of(photo))], prompt=PROMPT, n=1, extra_body={"seed": 5, "steps": 4}),
            edit(image=file_of(photo), prompt=PROMPT, size="96x96", response_format="b64_json", user="me"),  # type: ignore[call-overload]
        ]
        with pytest.raises(openai.BadRequestError, match="n 9: expected 1 to 8"):
            edit(image=file_of(photo), prompt=PROMPT, n=9)
        with pytest.raises(openai.BadRequestError, match="comes more than once"):
            edit(image=[file_of(photo), file_of(photo)], prompt=PROMPT)
    got = [Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json))) for answer in answers]
    assert got[0].tobytes() == demo_pipe([PROMPT], seed=[5], mask_image=mask, **call).images[0].tobytes()
    assert got[1].tobytes() == demo_pipe([PROMPT], seed=[5], **call).images[0].tobytes()
    assert got[2].size == (96, 96)


# Rejected requests


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"strength": "0"}, "strength: Input should be greater than 0"),
        ({"strength": "nan"}, "strength: Input should be a finite number"),
        ({"strength": "1.01"}, "strength: Input should be less than or equal to 1"),
        ({"strength": "much"}, "strength: Input should be a valid number"),
        ({"strength": "0.05", "keep_steps": "false"}, "strength 0.05 of 4 steps leaves none: expected at least 0.25"),
        ({"keep_steps": "perhaps"}, "keep_steps: "),
        ({"mask_blur": "3"}, "mask_blur has no effect without a mask"),
        ({"padding_mask_crop": "3"}, "padding_mask_crop has no effect without a mask"),
        ({"padding_mask_crop": "-1"}, "padding_mask_crop: Input should be greater than or equal to 0"),
        ({"mask": "alpha"}, "mask alpha: image has no transparent pixel"),
        ({"mask": ""}, "mask is empty"),
        ({"mask": "file:///etc/passwd"}, "mask: addresses are not opened"),
        ({"resize_mode": "zoom"}, "resize_mode: "),
        ({"n": "two"}, "n: "),
        ({"nothing": "1"}, "'nothing' is not known: leave it out"),
        ({"stream": "true"}, "stream: "),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, str], words: str, client: httpx.Client, photo: Image.Image) -> None:
    assert message(post_form(client, {"image": photo}, **fields)).startswith(words)


def test_wrong_json_is_named_as_elsewhere(client: httpx.Client) -> None:
    wrong: list[tuple[Any, str]] = [
        ({}, "prompt is missing"),
        ({"prompt": ""}, "image is missing"),
        ({"prompt": "", "image": 3}, "image: expected a PNG, JPEG or WebP file in base64"),
        ({"prompt": "", "image": "", "n": "2"}, "n: "),
        ([], "the body: "),
    ]
    for body, words in wrong:
        assert message(client.post(EDITS, json=body)).startswith(words)
    answer = client.post(EDITS, content=b"{", headers={"Content-Type": "application/json"})
    assert "not valid JSON" in message(answer)
    assert "expected multipart/form-data or application/json" in message(client.post(EDITS, content=b"x"))


def test_a_mask_of_another_aspect_is_rejected(client: httpx.Client, photo: Image.Image) -> None:
    words = message(post_form(client, {"image": photo, "mask": Image.new("L", (80, 120), 255)}))
    assert words == ("mask of 80x120 pixels for an image of 120x80: expected the same size, or the same aspect")


def test_a_cropped_part_of_another_size_is_rejected(client: httpx.Client, photo: Image.Image) -> None:
    files = {"image": photo, "mask": Image.new("L", (240, 160), 255)}
    assert "expected the same size" in message(post_form(client, files, padding_mask_crop=4))


@pytest.mark.parametrize("field", ["mask", "strength", "keep_steps"])
def test_fields_that_have_no_effect_without_an_image(field: str, client: httpx.Client) -> None:
    body = {"prompt": "", field: {"mask": "alpha", "strength": 0.5, "keep_steps": True}[field]}
    answer = client.post("/v1/images/generations", json=body)
    assert message(answer) == f"{field} has no effect without image: send image, or leave {field} out"


def test_a_bundle_without_an_encoder(demo_server: RunningServer, photo: Image.Image) -> None:
    """The error comes before the image is decoded."""
    cards = [card.model_copy(update={"has_encoder": False}) for card in demo_server.service.models()]
    body = GenerationRequest(prompt="", image=b"no image")
    with pytest.raises(RequestError, match="image: demo15-canny was exported with --text-only: export it again"):
        read_request(body, cards, demo_server.settings)


def part(name: str, content: bytes, *more: str) -> bytes:
    disposition = "; ".join([f'form-data; name="{name}"', *more])
    return f"--B\r\nContent-Disposition: {disposition}\r\n\r\n".encode() + content + b"\r\n"


END = b"--B--\r\n"
FORM = "multipart/form-data; boundary=B"
FORMS: dict[str, tuple[str, bytes, str]] = {
    "no boundary": ("multipart/form-data", END, "names no boundary"),
    "another boundary": ("multipart/form-data; boundary=C", part("prompt", b"a") + END, "not valid multipart"),
    "nothing": (FORM, b"", "is cut off"),
    "no parts": (FORM, END, ""),
    "no end": (FORM, part("prompt", b"a"), "is cut off"),
    "cut in a header": (FORM, b"--B\r\nContent-Dispos", "is cut off"),
    "no name": (FORM, b"--B\r\nContent-Disposition: form-data\r\n\r\na\r\n" + END, "has no name"),
    "no disposition": (FORM, b"--B\r\nX: y\r\n\r\na\r\n" + END, "has no name"),
    "a name twice": (FORM, part("prompt", b"a") + part("prompt", b"b") + END, "'prompt' comes more than once"),
    "a name and a list": (FORM, part("image", b"a") + part("image[]", b"b") + END, "'image[]' comes more than once"),
    "a text and an object": (
        FORM,
        part("image", b"a") + part("image[x]", b"b") + END,
        "'image[x]' comes more than once",
    ),
    "an object of a number": (FORM, part("prompt", b"a") + part("image", b"x") + part("n[x]", b"1") + END, "n: "),
    "not UTF-8": (FORM, part("prompt", b"\xff") + END, "'prompt' is not UTF-8"),
    "many parts": (FORM, b"".join(part(f"p{i}", b"") for i in range(100)) + END, "more than 64 parts"),
    "many small parts": (FORM, b"--B\r\n" * 50_000, ""),
    "a long header": (FORM, part("x" * 100_000, b"") + END, ""),
    "an empty file": (FORM, part("prompt", b"a") + part("image", b"", 'filename="a.png"') + END, "image is empty"),
    "no file chosen": (FORM, part("prompt", b"a") + part("image", b"", 'filename=""') + END, "image is missing"),
    "no image": (FORM, part("prompt", b"a") + part("image", b"GIF89a", 'filename="a"') + END, "image is not an image"),
    "a file for a text": (FORM, part("prompt", b"a", 'filename="a"') + part("image", b"x") + END, "prompt is a file"),
}


@pytest.mark.parametrize("name", FORMS)
def test_damaged_forms(name: str, demo_server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    """They do not fill the log."""
    content_type, body, words = FORMS[name]
    status, _, answer = exchange(demo_server.address, whole(body, EDITS, Content_Type=content_type))
    assert status == 400, answer
    assert words in error_of(answer)["message"]
    assert len(error_of(answer)["message"]) < 300
    assert caplog.records == []


def test_pages_of_other_sites_cannot_send_forms(demo_server: RunningServer, photo: Image.Image) -> None:
    """A browser sends a form for any page without asking the service first."""
    body = part("prompt", b"a") + part("image", file_of(photo), 'filename="a.png"') + END
    statuses = [
        exchange(demo_server.address, whole(body, EDITS, Content_Type=FORM, **origin))[0]
        for origin in ({"Origin": "http://a.b"}, {"Origin": "null"}, {"Origin": "http://127.0.0.1"}, {})
    ]
    assert statuses == [403, 403, 200, 200]


# In the queue


def test_images_share_a_call_where_their_kinds_agree(
    gated: GatedPipeline, start_server, photo: Image.Image, mask: Image.Image
) -> None:
    """Each starts from its own image; another strength, a mask or none makes another call."""
    server = start_server(gated)
    green = Image.new("RGB", (64, 64), "green")
    asked = {
        "a": {"image": photo},
        "b": {"image": green},
        "c": {"image": photo, "strength": 0.5},
        "d": {"image": photo, "mask": mask},
        "e": {"image": green, "mask": Image.new("L", (64, 64), 255)},
        "f": {},
        "g": {"image": photo, "mask": mask, "padding_mask_crop": 8},
        "h": {"image": photo, "mask": mask, "padding_mask_crop": 8},
    }

    def post(prompt: str) -> bytes:
        fields = {name: base64_of(v) if isinstance(v, Image.Image) else v for name, v in asked[prompt].items()}
        body = {"prompt": prompt, "seed": 1, "steps": 2, **fields}
        return images(httpx.post(server.url + "/v1/images/generations", json=body, timeout=LONG))[0].tobytes()

    gated.gate.clear()
    with ThreadPoolExecutor(16) as pool:
        first = pool.submit(httpx.post, server.url + "/v1/images/generations", json={"prompt": "first"}, timeout=LONG)
        wait_until(lambda: gated.calls)
        waiting = {}
        for i, prompt in enumerate(asked):
            waiting[prompt] = pool.submit(post, prompt)
            wait_until(lambda i=i: len(server.service._jobs) == i + 1)
        gated.gate.set()
        assert first.result().status_code == 200
        together = {prompt: future.result() for prompt, future in waiting.items()}
    assert sorted(gated.calls[1:]) == [["a", "b"], ["c"], ["d", "e"], ["f"], ["g"], ["h"]]
    assert together == {prompt: post(prompt) for prompt in asked}
    assert len({*together.values()}) == len(asked)
