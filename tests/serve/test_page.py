"""The live page in a real browser, served by a real `hypersd serve`: a user's actions and their results."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live_page import Server, needs_chromium, settled, shown
from PIL import Image

from hypersd import Pipeline
from hypersd.runtime.metadata import METADATA_KEY
from hypersd.serve import service_errors as errors

PROMPT = "a blue circle on a yellow background"
pytestmark = needs_chromium


def draw_disc(page: Any, x: float, y: float) -> None:
    """With the mouse and a wide brush; the middle in parts of the sheet."""
    page.evaluate("document.getElementById('brush').value = 60")
    box = page.locator("#canvas").bounding_box()
    side = box["width"]
    left, top = box["x"] + side * x, box["y"] + side * y
    page.mouse.move(left, top)
    page.mouse.down()
    for radius in (0.03, 0.08, 0.13):
        for i in range(13):
            turn = i / 12 * 2 * math.pi
            page.mouse.move(left + side * radius * math.cos(turn), top + side * radius * math.sin(turn))
    page.mouse.up()


def test_the_image_follows_the_prompt(open_page, demo_canny_bundle: Path) -> None:
    """Typing changes the image; it equals the runtime's image for these settings."""
    page = open_page("#steps=4&seed=5")
    before = shown(page)
    page.fill("#prompt", PROMPT)
    settled(page)
    pipe = Pipeline.load(demo_canny_bundle, device="cpu")
    expected = np.asarray(pipe(PROMPT, num_inference_steps=4, seed=5).images[0])
    assert not np.array_equal(before, shown(page))
    assert np.array_equal(shown(page), expected)
    assert "ms" in page.inner_text("#latency")
    assert "images/s" in page.inner_text("#rate")


def test_the_image_follows_the_drawing(open_page) -> None:
    """The circle appears where the user draws a disc; after undo the earlier image returns."""
    page = open_page(f"#steps=4&seed=0&prompt={PROMPT.replace(' ', '+')}")
    settled(page)
    before = shown(page)
    assert page.is_visible(".hint")
    draw_disc(page, 0.7, 0.7)
    settled(page)
    assert not page.is_visible(".hint")
    followed = shown(page)
    is_blue = (followed[..., 2].astype(int) - followed[..., 0] > 60).nonzero()
    middle = [float(np.mean(places)) / followed.shape[0] for places in is_blue]
    assert middle == pytest.approx([0.7, 0.7], abs=0.1)
    page.click("#undo")
    settled(page)
    assert np.array_equal(shown(page), before)


def test_fifty_fast_keystrokes_end_in_the_last_ones_image(open_page, server: Server, demo_canny_bundle: Path) -> None:
    """Superseded inputs are dropped, none is generated twice, and the last is generated."""
    page = open_page("#seed=1&prompt=")
    settled(page)
    images, dropped = server.count("hypersd_images_total"), server.count("hypersd_dropped_images_total")
    asked = int(page.get_attribute("body", "data-asked"))
    text = (PROMPT + " ") * 2
    page.locator("#prompt").press_sequentially(text[:50])
    settled(page)
    images, dropped = (
        server.count("hypersd_images_total") - images,
        server.count("hypersd_dropped_images_total") - dropped,
    )
    sent = int(page.get_attribute("body", "data-asked")) - asked
    assert 1 <= images <= sent <= 50
    assert images + dropped == sent
    expected = Pipeline.load(demo_canny_bundle, device="cpu")(text[:50], seed=1).images[0]
    assert np.array_equal(shown(page), np.asarray(expected))


def test_controls_do_what_they_say(open_page) -> None:
    """Seed, steps, eta and count change the image; image i of several has seed + i."""
    page = open_page(f"#seed=7&prompt={PROMPT.replace(' ', '+')}")
    settled(page)
    images = [shown(page)]
    for change in (
        lambda: page.fill("#seed", "8"),
        lambda: page.select_option("#steps", "4"),
        lambda: page.locator("#eta").fill("0"),
    ):
        change()
        settled(page)
        assert not np.array_equal(shown(page), images[-1])
        images.append(shown(page))
    page.fill("#count", "3")
    settled(page)
    assert page.locator("#images img").count() == 3
    assert [image.get_attribute("data-seed") for image in page.locator("#images img").all()] == ["8", "9", "10"]
    assert np.array_equal(shown(page, 0), images[-1])
    page.fill("#count", "1")
    settled(page)
    assert page.locator("#images img").count() == 1


def test_a_saved_image_has_its_settings(open_page) -> None:
    """The same pixels as on the page, as a PNG with the settings to generate it again."""
    page = open_page(f"#steps=2&seed=11&prompt={PROMPT.replace(' ', '+')}")
    settled(page)
    with page.expect_download() as download:
        page.keyboard.press("Control+s")
    assert download.value.suggested_filename == "demo15-canny-11.png"
    with Image.open(download.value.path()) as image:
        assert f'"prompt": "{PROMPT}"' in image.info[METADATA_KEY]
        assert '"seed": 11' in image.info[METADATA_KEY]
        assert np.array_equal(np.asarray(image), shown(page))


def test_the_address_brings_the_settings_back(open_page) -> None:
    """A reload, or a link that was sent, shows the same image."""
    page = open_page()
    page.fill("#prompt", PROMPT)
    page.fill("#seed", "21")
    page.select_option("#steps", "3")
    settled(page)
    before = shown(page)
    page.wait_for_function("() => /steps=3.*seed=21/.test(location.hash)")
    page.reload()
    page.wait_for_selector("body[data-shown]")
    settled(page)
    assert page.input_value("#prompt") == PROMPT
    assert np.array_equal(shown(page), before)
    page.evaluate("location.hash = '#seed=22&prompt=a+red+star'")
    page.wait_for_function("() => document.getElementById('prompt').value === 'a red star'")
    assert page.input_value("#seed") == "22"


def test_the_seed_is_kept_or_new_for_every_input(open_page) -> None:
    page = open_page("#seed=6")
    page.fill("#prompt", "a red star")
    settled(page)
    assert page.input_value("#seed") == "6"
    page.uncheck("#keep-seed")
    page.fill("#prompt", "a red ring")
    settled(page)
    assert page.input_value("#seed") != "6"
    assert page.get_attribute("#images img", "data-seed") == page.input_value("#seed")


def test_a_bad_input_is_explained_and_the_image_stays(open_page) -> None:
    page = open_page("#seed=3")
    settled(page)
    before = shown(page)
    page.fill("#prompt", "x" * 2001)
    page.wait_for_function("() => document.getElementById('error').textContent.includes('expected at most 2000')")
    assert page.get_attribute("#prompt", "aria-invalid") == "true"
    assert np.array_equal(shown(page), before)
    page.fill("#prompt", "x")
    settled(page)
    assert page.text_content("#error") == ""
    page.fill("#count", "9")
    page.wait_for_selector("label:has(#count[aria-invalid=true]) + #error:not(:empty)")


def test_a_killed_server_is_told_of_and_comes_back(open_page, demo_canny_bundle: Path, demo_bundle: Path) -> None:
    """The page reports it, reconnects, and generates from the current form with the bundle served by then."""
    server = Server(str(demo_canny_bundle))
    server.start()
    try:
        server.wait_ready()
        page = open_page("#seed=2", url=server.url)
        server.kill()
        page.wait_for_selector("body.offline")
        assert "does not answer" in page.inner_text("#status")
        assert "Trying again in" in page.inner_text("#wait")
        assert page.is_visible("#retry")
        page.fill("#prompt", PROMPT)
        page.wait_for_function("() => location.hash.includes('blue')")
        server.arguments[0] = str(demo_bundle)
        server.start()
        page.wait_for_selector("body:not(.offline)")
        settled(page)
        expected = Pipeline.load(demo_bundle, device="cpu")(PROMPT, seed=2).images[0]
        assert np.array_equal(shown(page), np.asarray(expected))
        assert not page.is_visible("#canvas"), "this one has no ControlNet"
        page.context.close()  # before the server ends: it would try again, and the browser notes what is rejected
        page.problems.clear()
    finally:
        server.end()


def test_a_token_is_asked_for(open_page, demo_canny_bundle: Path, tmp_path: Path) -> None:
    """It is kept for the tab, out of the address, and the WebSocket carries it."""
    (tmp_path / "token").write_text("sesame\n")
    server = Server(str(demo_canny_bundle), "--token-file", str(tmp_path / "token"))
    server.start()
    server.wait_ready()
    try:
        page = open_page(url=server.url, wait=False)
        for token in ("wrong", "sesame"):
            page.wait_for_selector("#token", state="visible")
            page.fill("#token", token)
            page.keyboard.press("Enter")
        page.wait_for_selector("body[data-shown]")
        assert "sesame" not in page.url
        page.context.close()  # before the server ends, as above
        page.problems.clear()  # the answers 401
    finally:
        server.end()


def test_it_works_by_keyboard_alone(open_page) -> None:
    """Every control can be reached with Tab, has a name, and Ctrl+Enter throws the dice."""
    page = open_page("#seed=4")
    settled(page)
    seen = set()
    for _ in range(25):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.id"))
    assert {"prompt", "steps", "seed", "dice", "count", "eta", "canvas", "control-scale", "undo", "save"} <= seen
    page.focus("#prompt")
    page.keyboard.press("Control+Enter")
    settled(page)
    assert page.input_value("#seed") != "4"
    before = shown(page)
    page.focus("#canvas")
    for key in ("ArrowRight", "Space", *["ArrowDown"] * 6, *["ArrowRight"] * 6, "Space", "ArrowUp"):
        page.keyboard.press(key)
    settled(page)
    assert not np.array_equal(shown(page), before)
    page.keyboard.press("Control+z")
    settled(page)
    assert np.array_equal(shown(page), before), "one stroke, and undone"
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, textarea, canvas")]
            .filter((e) => !(e.labels?.length || e.ariaLabel || e.textContent.trim())).map((e) => e.id)"""
    )
    assert nameless == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(open_page, scheme: str) -> None:
    """The page does not scroll sideways; it has a light and a dark look; a finger draws and does not scroll."""
    page = open_page(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    level = np.mean([int(part) for part in background.strip("rgb()").split(",")[:3]])
    assert (level > 128) == (scheme == "light")
    assert page.evaluate("getComputedStyle(document.getElementById('canvas')).touchAction") == "none"


def test_a_phone_shows_image_and_drawing_at_once(open_page) -> None:
    """The image stays in sight while the page is scrolled, and does not cover the drawing."""
    page = open_page(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page.evaluate("document.getElementById('canvas').scrollIntoView({ block: 'end' })")
    image, canvas = (page.locator(name).bounding_box() for name in (".image", "#canvas"))
    assert image["y"] >= 0
    assert image["y"] + image["height"] <= canvas["y"]
    assert canvas["y"] + canvas["height"] < 845  # scrolling ends at whole pixels


def test_the_page_knows_which_rejections_pass() -> None:
    """It asks again by itself where the service, not the input, was to blame: the codes are the service's."""
    script = (Path(errors.__file__).parent / "static" / "live.js").read_text("utf-8")
    named = re.search(r"const PASSING = (\[.*?\])", script)
    assert named is not None
    assert set(json.loads(named[1])) == {kind.code for kind in errors.UnavailableError.__subclasses__()}
