"""The live page's sliders for LoRAs, in a real browser: files come and go, and the image follows the sliders."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live_page import Server, needs_chromium, settled, shown
from lora_writers import write_slot_lora
from waiting import wait_until

from hypersd import Pipeline
from hypersd.engines import Bundle

PROMPT = "a photo of a cat"
START = f"#seed=4&prompt={PROMPT.replace(' ', '+')}"
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
pytestmark = needs_chromium


@pytest.fixture(scope="module")
def bundle(export_slotted: Callable[[str], Path]) -> Path:
    return export_slotted("Hyper-SD15-1step-lora")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("loras")


@pytest.fixture(scope="module")
def lora_server(bundle: Path, folder: Path) -> Iterator[Server]:
    server = Server(str(bundle), "--lora-folder", str(folder))
    server.start()
    server.wait_ready()
    yield server
    server.end()


def offered(server: Server) -> list[str]:
    """The names of the LoRAs that the service offers."""
    with urllib.request.urlopen(f"{server.url}v1/models", timeout=30) as answer:
        (card,) = json.load(answer)["data"]
    return [adapter["name"] for adapter in card["adapters"]]


@pytest.fixture
def write(bundle: Path, folder: Path, lora_server: Server) -> Iterator[Callable[..., Path]]:
    """``write(name, seed)``: a LoRA in the service's folder until the test ends."""
    slot = Bundle.load(bundle).manifest.lora_slot
    assert slot is not None
    yield lambda name, seed=0: write_slot_lora(slot, folder / f"{name}.safetensors", seed)
    for file in folder.iterdir():
        file.unlink()
    wait_until(lambda: not offered(lora_server))


def slider(page: Any, name: str) -> Any:
    return page.get_by_role("slider", name=name)


def sent(page: Any) -> list[dict[str, Any]]:
    """The requests that the page sends from now on, as they come."""
    requests: list[dict[str, Any]] = []
    page.on("websocket", lambda socket: socket.on("framesent", lambda frame: requests.append(json.loads(frame))))
    page.reload()  # playwright tells of new connections only
    page.wait_for_selector("body[data-shown]")
    settled(page)
    return requests


def drag(page: Any, name: str, to: float) -> None:
    """With the mouse, from where the slider is to a strength, by small movements."""
    page.locator("#adapters").scroll_into_view_if_needed()
    box = slider(page, name).bounding_box()
    knob = 16  # pixels
    middle = box["y"] + box["height"] / 2

    def x(strength: float) -> float:
        return box["x"] + knob / 2 + (box["width"] - knob) * (strength + 1) / 3

    page.mouse.move(x(float(slider(page, name).input_value())), middle)
    page.mouse.down()
    page.mouse.move(x(to), middle, steps=12)
    page.mouse.up()


@pytest.mark.parametrize("options", [{}, PHONE], ids=["desktop", "phone"])
def test_dragging_a_slider_changes_the_image(
    options: dict[str, Any], open_page, lora_server: Server, write, folder: Path, bundle: Path
) -> None:
    """From a file dropped into the folder to the image with it, without a reload; the requests carry the strengths."""
    page = open_page(START, lora_server.url, **options)
    settled(page)
    plain = shown(page)
    assert not page.is_visible("#adapters")
    assert slider(page, "style").count() == 0
    requests = sent(page)
    assert "adapters" not in requests[-1]

    file = write("style")
    page.wait_for_selector("#adapters:not([hidden])")
    settled(page)
    assert np.array_equal(shown(page), plain)
    assert slider(page, "style").input_value() == "0"
    before = len(requests)
    drag(page, "style", 1.0)
    settled(page)
    strength = float(slider(page, "style").input_value())
    assert strength == pytest.approx(1.0, abs=0.11)
    strengths = [request["adapters"]["style"] for request in requests[before:]]
    assert len({*strengths}) > 3
    assert strengths[-1] == strength
    pipe = Pipeline.load(bundle, device="cpu")
    pipe.load_lora_weights(file)
    expected = pipe(PROMPT, seed=4, adapters={"style": strength}).images[0]
    assert np.array_equal(shown(page), np.asarray(expected))
    assert not np.array_equal(shown(page), plain)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out"


def test_two_at_once_and_off_again(open_page, lora_server: Server, write) -> None:
    """With the keyboard; a LoRA that is off is not in the request."""
    write("one")
    write("two", 1)
    page = open_page(START, lora_server.url)
    page.wait_for_function("() => document.querySelectorAll('#adapters input').length === 2")
    settled(page)
    requests, images = sent(page), [shown(page)]
    for name, key in (("one", "End"), ("two", "Home")):
        slider(page, name).press(key)
        settled(page)
        images.append(shown(page))
    assert requests[-1]["adapters"] == {"one": 2, "two": -1}
    assert len({image.tobytes() for image in images}) == 3
    slider(page, "one").fill("0")
    settled(page)
    assert requests[-1]["adapters"] == {"two": -1}
    slider(page, "two").fill("0")
    settled(page)
    assert "adapters" not in requests[-1]
    assert np.array_equal(shown(page), images[0])


def test_a_file_that_goes_takes_its_slider_along(open_page, lora_server: Server, write) -> None:
    """The others keep their strengths and the focus; the image follows."""
    goes = write("goes")
    write("stays", 1)
    page = open_page(START, lora_server.url)
    page.wait_for_function("() => document.querySelectorAll('#adapters input').length === 2")
    slider(page, "stays").fill("0.5")
    settled(page)
    with_one = shown(page)
    slider(page, "goes").fill("1")
    settled(page)
    assert not np.array_equal(shown(page), with_one)
    slider(page, "stays").focus()
    goes.unlink()
    page.wait_for_function("() => document.querySelectorAll('#adapters input').length === 1")
    write("another", 2)
    page.wait_for_function("() => document.querySelectorAll('#adapters input').length === 2")
    settled(page)
    assert slider(page, "stays").input_value() == "0.5"
    assert slider(page, "stays").evaluate("element => element === document.activeElement")
    assert np.array_equal(shown(page), with_one)
    assert page.inner_text("#error") == ""


def test_the_address_brings_the_strengths_back(open_page, lora_server: Server, write) -> None:
    write("night sky & stars")
    page = open_page(START, lora_server.url)
    page.wait_for_selector("#adapters:not([hidden])")
    slider(page, "night sky").fill("0.75")
    settled(page)
    before = shown(page)
    page.wait_for_function("() => location.hash.includes('0.75')")
    page.reload()
    page.wait_for_selector("body[data-shown]")
    settled(page)
    assert slider(page, "night sky").input_value() == "0.75"
    assert page.locator("#adapters output").inner_text() == "0.75"
    assert np.array_equal(shown(page), before)
