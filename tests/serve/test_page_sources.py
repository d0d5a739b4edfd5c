"""The live page's painting and camera in a real browser: what the user does there is what the image starts from."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live_page import needs_chromium, settled, shown
from PIL import Image

from hypersd import Pipeline
from hypersd.serve.image_codec import decode_mask

PROMPT = "a red circle on a yellow background"
START = f"#steps=4&seed=3&strength=0.35&prompt={PROMPT.replace(' ', '+')}"
YELLOW, RED = (250, 204, 21), (224, 36, 36)  # two of the palette
pytestmark = needs_chromium


class Frames(list[tuple[dict[str, Any], bytes]]):
    """The inputs that a page sends: the request, and the file of its init image, which is empty without one."""

    def note(self, message: str | bytes) -> None:
        if isinstance(message, str):
            self.append((json.loads(message), b""))
            return
        (length,) = struct.unpack_from(">I", message)
        self.append((json.loads(message[4 : 4 + length]), message[4 + length :]))

    def of_shown(self, page: Any) -> tuple[dict[str, Any], Image.Image]:
        """The input whose image the page shows."""
        number = int(page.get_attribute("body", "data-shown"))
        request, file = next(frame for frame in reversed(self) if frame[0]["id"] == number)
        return request, Image.open(io.BytesIO(file))


@pytest.fixture
def open_noting(open_page: Callable[..., Any]) -> Callable[..., tuple[Any, Frames]]:
    """``open_noting(**context)``: the page, and the inputs that it sends from the second one on."""

    def open_noting(fragment: str = START, **options: Any) -> tuple[Any, Frames]:
        frames = Frames()
        page = open_page("", wait=False, **options)
        page.on("websocket", lambda socket: socket.on("framesent", frames.note))
        page.evaluate(f"location.hash = {fragment!r}")
        page.reload()
        page.wait_for_selector("body[data-shown]")
        settled(page)
        return page, frames

    return open_noting


def press(page: Any, *controls: str) -> None:
    """Choose radio buttons by their group and value, such as ``tools=fill``."""
    for control in controls:
        group, _, value = control.partition("=")
        page.locator(f'label:has([name={group}][value="{value}"])').click()


def stroke(page: Any, *points: tuple[float, float]) -> None:
    """With the mouse, between points of the painting in parts of its sides."""
    page.locator("#painting").scroll_into_view_if_needed()
    box = page.locator("#painting").bounding_box()
    places = [(box["x"] + box["width"] * x, box["y"] + box["height"] * y) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places:
        page.mouse.move(*place)
    page.mouse.up()


def colour(image: Image.Image, x: float, y: float) -> np.ndarray:
    """In parts of the image's sides."""
    return np.array(image.convert("RGB").getpixel((int(x * image.width), int(y * image.height))), int)


def is_close(colour: np.ndarray, other: tuple[int, int, int]) -> bool:
    return bool(np.abs(colour - np.array(other)).max() < 24)


def generated(pipe: Pipeline, request: dict[str, Any], image: Image.Image) -> np.ndarray:
    """The runtime's own image for an input of the page."""
    mask = decode_mask("mask", request["mask"], 1 << 20) if "mask" in request else None
    call: dict[str, Any] = {"num_inference_steps": request["steps"], "eta": request["eta"], "seed": [request["seed"]]}
    call |= {"image": image, "mask_image": mask, "strength": request["strength"], "keep_steps": True}
    return np.asarray(pipe([request["prompt"]], **call).images[0])


def test_the_image_starts_from_the_painting(open_noting, demo_pipe: Pipeline) -> None:
    """Fill, brush, eraser and undo are on it; nothing is painted, nothing is sent."""
    page, frames = open_noting()
    of_text = shown(page)
    press(page, "sources=paint")
    settled(page)
    assert page.is_visible("#strength")
    assert np.array_equal(shown(page), of_text)
    assert frames[-1][1] == b""
    press(page, "colours=#facc15", "tools=fill")
    stroke(page, (0.5, 0.5))
    press(page, "colours=#e02424", "tools=brush")
    page.locator("#painting-brush").fill("120")
    stroke(page, (0.3, 0.3), (0.31, 0.3))
    settled(page)
    request, painting = frames.of_shown(page)
    assert painting.format == "JPEG"
    assert is_close(colour(painting, 0.9, 0.9), YELLOW)
    assert is_close(colour(painting, 0.3, 0.3), RED)
    assert request["strength"] == 0.35
    assert np.array_equal(shown(page), generated(demo_pipe, request, painting))
    assert not np.array_equal(shown(page), of_text)
    press(page, "tools=eraser")
    stroke(page, (0.9, 0.9))
    settled(page)
    erased = frames.of_shown(page)[1]
    assert is_close(colour(erased, 0.9, 0.9), (255, 255, 255))
    page.click("#painting-undo")
    settled(page)
    assert is_close(colour(frames.of_shown(page)[1], 0.9, 0.9), YELLOW)
    page.locator("#strength").fill("0.8")
    settled(page)
    assert frames.of_shown(page)[0]["strength"] == 0.8
    page.click("#painting-clear")
    settled(page)
    assert np.array_equal(shown(page), of_text)


def test_a_mask_brush_marks_the_part_to_repaint(open_noting, demo_pipe: Pipeline) -> None:
    page, frames = open_noting()
    press(page, "sources=paint", "colours=#facc15", "tools=fill")
    stroke(page, (0.5, 0.5))
    press(page, "tools=mask")
    page.locator("#painting-brush").fill("100")
    stroke(page, (0.7, 0.7), (0.8, 0.8))
    settled(page)
    request, painting = frames.of_shown(page)
    mask = decode_mask("mask", request["mask"], 1 << 20)
    assert mask.size == painting.size
    assert [mask.getpixel((int(mask.width * x), int(mask.height * x))) for x in (0.3, 0.75)] == [0, 255]
    assert is_close(colour(painting, 0.75, 0.75), YELLOW), "the mask is shown over the painting, and is none of it"
    assert np.array_equal(shown(page), generated(demo_pipe, request, painting))
    press(page, "tools=eraser")
    stroke(page, (0.7, 0.7), (0.8, 0.8))
    settled(page)
    mask = decode_mask("mask", frames.of_shown(page)[0]["mask"], 1 << 20)
    assert mask.getpixel((int(mask.width * 0.75),) * 2) == 0


@pytest.fixture(scope="module")
def turned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A photograph whose upper half is red once it is turned as its EXIF says."""
    image = Image.new("RGB", (60, 80), "blue")
    image.paste((224, 36, 36), (0, 0, 30, 80))
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path_factory.mktemp("photos") / "turned.jpg"
    image.save(path, exif=exif, quality=95)
    return path


DROP = """([bytes, name, type]) => {
    const data = new DataTransfer();
    data.items.add(new File([new Uint8Array(bytes)], name, { type: "image/jpeg" }));
    document.body.dispatchEvent(
        type === "paste"
            ? new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true })
            : new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }),
    );
}"""


@pytest.mark.parametrize("way", ["open", "drop", "paste"])
def test_an_image_can_be_opened_dropped_and_pasted(way: str, open_noting, turned: Path, demo_pipe: Pipeline) -> None:
    """It becomes the ground of the painting, upright, and can be painted on; the eraser shows it again."""
    page, frames = open_noting()
    if way == "open":
        page.set_input_files("#file", turned)
    else:
        page.evaluate(DROP, [list(turned.read_bytes()), "turned.jpg", way])
    page.wait_for_selector("#painting", state="visible")
    settled(page)
    request, painting = frames.of_shown(page)
    assert is_close(colour(painting, 0.5, 0.2), RED)
    assert is_close(colour(painting, 0.5, 0.8), (0, 0, 255))
    assert np.array_equal(shown(page), generated(demo_pipe, request, painting))
    press(page, "colours=#ffffff")
    stroke(page, (0.5, 0.8))
    press(page, "tools=eraser")
    stroke(page, (0.5, 0.8))
    settled(page)
    assert is_close(colour(frames.of_shown(page)[1], 0.5, 0.8), (0, 0, 255))


def test_a_file_that_is_no_image_is_explained(open_page, tmp_path: Path) -> None:
    page = open_page(START)
    (tmp_path / "notes.txt").write_text("not an image")
    page.set_input_files("#file", tmp_path / "notes.txt")
    page.wait_for_selector("#error:not(:empty)")
    assert page.inner_text("#error").startswith("notes.txt is not an image that this browser can open")
    assert page.is_checked("[name=sources][value=text]")


def test_a_bundle_without_an_encoder_offers_text_alone(open_page, turned: Path) -> None:
    def without_encoder(route: Any) -> None:
        served = route.fetch().json()
        served["data"][0]["has_encoder"] = False
        route.fulfill(json=served)

    page = open_page(START)
    page.route("**/v1/models", without_encoder)
    page.reload()
    page.wait_for_selector("body[data-shown]")
    assert not page.is_visible("#sources")
    page.evaluate(DROP, [list(turned.read_bytes()), "turned.jpg", "drop"])
    page.wait_for_selector("#error:not(:empty)")
    assert "without --text-only" in page.inner_text("#error")


def test_a_saved_image_starts_from_the_painting_too(open_noting) -> None:
    page, _ = open_noting()
    press(page, "sources=paint", "colours=#facc15", "tools=fill")
    stroke(page, (0.5, 0.5))
    settled(page)
    with page.expect_download() as download:
        page.keyboard.press("Control+s")
    with Image.open(download.value.path()) as image:
        assert np.array_equal(np.asarray(image), shown(page))


# The camera


def wait_frames(page: Any, count: int) -> None:
    """Wait until so many more images were shown."""
    first = int(page.get_attribute("body", "data-shown"))
    page.wait_for_function("(number) => Number(document.body.dataset.shown) >= number", arg=first + count)


def test_the_image_follows_the_camera(open_noting, demo_pipe: Pipeline) -> None:
    """Frame after frame, mirrored, the newest each time; none is sent any more once another source is chosen."""
    page, frames = open_noting()
    press(page, "sources=camera")
    wait_frames(page, 10)
    page.wait_for_function("() => document.getElementById('dropped').textContent.includes('dropped/s')")
    assert float(page.inner_text("#rate").split()[0]) > 0
    assert "ms" in page.inner_text("#latency")
    page.click("#pause")
    page.wait_for_timeout(500)  # answers that were under way
    request, frame = frames.of_shown(page)
    assert np.array_equal(shown(page), generated(demo_pipe, request, frame))
    assert is_close(colour(frame, 0.05, 0.5), (0, 136, 0)), "the ground of Chromium's camera"
    count = len(frames)
    page.wait_for_timeout(300)
    assert len(frames) == count, "paused"
    page.click("#pause")
    wait_frames(page, 3)
    press(page, "sources=text")
    settled(page)
    assert page.evaluate("document.getElementById('video').srcObject") is None
    assert frames[-1][1] == b""


def test_frames_are_mirrored_as_they_are_shown(open_noting) -> None:
    """The time, which the camera writes at the upper left, is sent at the upper right."""
    page, frames = open_noting()
    press(page, "sources=camera")
    wait_frames(page, 2)
    _, frame = frames.of_shown(page)
    assert "matrix(-1" in page.evaluate("getComputedStyle(document.getElementById('video')).transform")
    pixels = np.asarray(frame.convert("L"), int)
    top = pixels[: len(pixels) // 8]
    is_text = np.abs(top - np.median(top)) > 25
    left, right = np.array_split(is_text.sum(0), 2)
    assert right.sum() > 3 * left.sum()


def test_a_frame_can_be_painted_on(open_noting) -> None:
    page, frames = open_noting()
    press(page, "sources=camera")
    wait_frames(page, 2)
    page.click("#take")
    settled(page)
    assert page.is_checked("[name=sources][value=paint]")
    assert is_close(colour(frames.of_shown(page)[1], 0.05, 0.5), (0, 136, 0))


def test_a_camera_that_goes_away_is_told_of(open_noting) -> None:
    """The event that a browser gives when it is unplugged. The image stays; choosing it again starts it again."""
    page, _ = open_noting()
    press(page, "sources=camera")
    wait_frames(page, 2)
    page.evaluate(
        """() => {
            const [track] = document.getElementById("video").srcObject.getTracks();
            track.stop();
            track.dispatchEvent(new Event("ended"));
        }"""
    )
    page.wait_for_selector("#camera-error:not(:empty)")
    assert page.inner_text("#camera-error").startswith("The camera has gone away: connect it again")
    assert page.locator("#images img").count() == 1
    press(page, "sources=text", "sources=camera")
    wait_frames(page, 2)
    assert page.inner_text("#camera-error") == ""


@pytest.mark.parametrize(
    ("permissions", "words"),
    [(["camera"], "There is no camera: connect one"), ([], "The camera may not be used: allow it")],
)
def test_a_camera_that_cannot_be_used_is_explained(permissions: list[str], words: str, chromium, open_page) -> None:
    """A browser without a camera, or one whose user does not allow it."""
    page = open_page(
        START,
        browser=chromium(*(["--use-fake-device-for-media-stream"] if not permissions else [])),
        permissions=permissions,
    )
    press(page, "sources=camera")
    page.wait_for_selector("#camera-error:not(:empty)")
    assert page.inner_text("#camera-error").startswith(words)
    press(page, "sources=paint")
    stroke(page, (0.5, 0.5))
    settled(page)


# Keyboard and phone


def test_sources_and_painting_work_by_keyboard(open_noting) -> None:
    """Arrow keys choose the source, the tool and the colour; the pen paints and fills."""
    page, frames = open_noting()
    page.focus("[name=sources][value=text]")
    page.keyboard.press("ArrowRight")
    assert page.is_visible("#painting")
    seen = set()
    for _ in range(12):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.id || document.activeElement.name"))
    assert {"open", "painting", "colours", "colour", "tools", "painting-brush", "strength"} <= seen
    page.focus("[name=tools]:checked")
    page.keyboard.press("ArrowRight")
    assert page.is_checked("[name=tools][value=fill]")
    page.focus("#painting")
    page.keyboard.press("Space")
    settled(page)
    filled = colour(frames.of_shown(page)[1], 0.1, 0.1)
    assert is_close(filled, (47, 95, 224))
    page.keyboard.press("Control+z")
    settled(page)
    assert frames[-1][1] == b""


@pytest.mark.parametrize("source", ["paint", "camera"])
def test_sources_fit_a_phone(source: str, open_noting) -> None:
    """Nothing scrolls sideways, and the image is in sight above the painting or the camera."""
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    page, frames = open_noting(**phone)
    press(page, f"sources={source}")
    place = page.locator({"paint": "#painting", "camera": "#video"}[source])
    place.evaluate("(element) => element.scrollIntoView({ block: 'end' })")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    image, box = page.locator(".image").bounding_box(), place.bounding_box()
    assert image["y"] >= 0
    assert image["y"] + image["height"] <= box["y"]
    assert box["y"] + box["height"] < 845
    if source == "paint":
        page.touchscreen.tap(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        settled(page)
        assert is_close(colour(frames.of_shown(page)[1], 0.5, 0.5), (47, 95, 224))
    else:
        wait_frames(page, 2)
