"""Which ControlNets take part, how strongly, when and with which images: diffusers' rules, and none silently bent."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from small_manifests import small_manifest

from hypersd.engines import Manifest
from hypersd.engines.manifest import decode
from hypersd.errors import shown
from hypersd.runtime.controls import LARGEST_SCALE, Control, images_by_name, make_conditions, make_controls

from .test_control_images import refusal
from .test_params import SHAPES, SPEC

KINDS = ("controlnet", "controlnet_cond_embedding")


def manifest(**scales: float | None) -> Manifest:
    """A bundle with ControlNets in this order; None leaves the recommended scale at the schema's default."""
    changed = small_manifest(SHAPES)
    changed["controlnets"] = {
        name: {} if scale is None else {"conditioning_scale": scale} for name, scale in scales.items()
    }
    for component in ["unet", *(f"{kind}/{name}" for name in scales for kind in KINDS)]:
        file = f"{component}.onnx"
        changed["files"][file] = {"size": 1, "sha256": "0" * 64}
        changed["components"][component] = {
            "inputs": {"mid_block_additional_residual": SPEC},
            "outputs": {"mid_block_res_sample": SPEC},
            "files": [file],
            "key": "0" * 64,
        }
    return decode(json.dumps(changed).encode(), "test")


NONE = manifest()
ONE = manifest(canny=0.5)
TWO = manifest(tile=0.5, depth=None)  # not in the order of the alphabet
NAMES = ["tile", "depth"]
NUMBERS = ("scale", "start", "end")


def make(of: Manifest = TWO, images: Any = NAMES, **numbers: Any) -> tuple[Control, ...]:
    return make_controls(of, images, **{"scale": None, "start": None, "end": None, **numbers})


def control(scale: float, start: float = 0.0, end: float = 1.0, name: str = "tile") -> Control:
    return Control(name=name, conditioning_scale=scale, start=start, end=end)


# Steps

ends = st.floats(0, 1) | st.builds(lambda n, of: min(n, of) / of, st.integers(0, 12), st.integers(1, 12))


@given(steps=st.integers(1, 12), start=ends, end=ends, scale=st.sampled_from([0.0, 1e-6, 0.5, 10.0]))
@settings(deadline=None)
@example(steps=3, start=1 / 3, end=2 / 3, scale=1.0)
@example(steps=10, start=0.3, end=0.7, scale=1.0)
@example(steps=1, start=0.0, end=1.0, scale=1.0)
@example(steps=6, start=math.nextafter(1 / 6, 1), end=math.nextafter(5 / 6, 0), scale=1.0)
def test_active_steps_are_diffusers(steps: int, start: float, end: float, scale: float) -> None:
    """Step for step, rounding of the fractions included; without effect it does not run."""
    for i in range(steps):
        keep = 1.0 - float(i / steps < start or (i + 1) / steps > end)
        assert control(scale, start, end).is_active(i, steps) is (keep != 0 and scale > 0)


def test_left_alone_it_acts_at_every_step_and_cut_in_half_in_half_of_them() -> None:
    """Four steps by hand: both ends belong to the span."""
    whole, early, late = control(1.0), control(1.0, end=0.5), control(1.0, start=0.5)
    assert [whole.is_active(i, 4) for i in range(4)] == [True] * 4
    assert [early.is_active(i, 4) for i in range(4)] == [True, True, False, False]
    assert [late.is_active(i, 4) for i in range(4)] == [False, False, True, True]
    assert not early.is_active(0, 1)  # one step's span is all of it


# Numbers


def test_what_is_left_out_comes_from_the_manifest() -> None:
    """The scale that each model card recommends, all of the steps."""
    assert make() == (control(0.5), control(1.0, name="depth"))
    assert make(ONE, ["canny"]) == (control(0.5, name="canny"),)


@pytest.mark.parametrize("numbers", [(0.1, 0.2, 0.3), (0, 0, 1), (np.float32(2), np.float64(0.25), np.int64(1))])
def test_one_number_is_for_all(numbers: tuple) -> None:
    """Zeros are not taken for left out, and numpy's numbers are numbers; what comes out are plain floats."""
    scale, start, end = numbers
    made = make(scale=scale, start=start, end=end)
    assert made == tuple(control(float(scale), float(start), float(end), name) for name in NAMES)
    assert {type(number) for one in made for number in (one.conditioning_scale, one.start, one.end)} == {float}


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_is_one_for_each_in_the_bundles_order(kind: type) -> None:
    """Each number reaches the ControlNet whose place it has."""
    made = make(scale=kind([0.1, 0.2]), start=kind([0.3, 0.4]), end=kind([0.5, 0.6]))
    assert made == (control(0.1, 0.3, 0.5), control(0.2, 0.4, 0.6, "depth"))


def test_a_dict_is_some_by_name() -> None:
    """The others keep their own, whatever the dict's order."""
    assert make(scale={"depth": 0}, start={"tile": 0.3}, end={"depth": 0.6, "tile": 0.5}) == (
        control(0.5, 0.3, 0.5),
        control(0.0, 0.0, 0.6, "depth"),
    )
    assert make(scale={}, start={}, end={}) == make()


def test_lists_count_all_of_the_bundle_also_if_some_have_an_image() -> None:
    """A list's places are the bundle's; who has no image takes no part, and may not refuse a call either."""
    assert make(images=["depth"], scale=[0.1, 0.2]) == (control(0.2, name="depth"),)
    assert make(images=["depth"], start=[0.9, 0.1], end=[0.1, 0.9]) == (control(1.0, 0.1, 0.9, "depth"),)
    assert make(images=[]) == ()
    assert make(NONE, images=[]) == ()


def test_they_come_in_the_bundles_order() -> None:
    """Residuals are added in this order: floating point would show another one."""
    assert [one.name for one in make(images=["depth", "tile"])] == NAMES
    assert [one.name for one in make(images={"depth": 1, "tile": 2})] == NAMES


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("given", [[], [0.5], [0.1, 0.2, 0.3], (0.5,)])
def test_more_or_fewer_numbers_than_controlnets_are_refused(number: str, given: Any) -> None:
    """Diffusers takes lists of scales of any length, and drops ControlNets without a word."""
    message = refusal(make, **{number: given})
    assert f": {len(given)} for 2 ControlNets (tile, depth)" in message
    assert "one for each" in message


ARGUMENTS = dict(
    zip(NUMBERS, ["controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end"], strict=True)
)
BAD = [-0.1, 10.1, float("nan"), float("inf"), -float("inf"), "0.5", True, 10**400, np.bool_(True), 1j]
GIVE: dict[str, Callable[[Any], Any]] = {
    "bare": lambda bad: bad,
    "in a list": lambda bad: [0.5, bad],
    "by name": lambda bad: {"depth": bad},
}


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("bad", BAD, ids=lambda bad: repr(bad)[:9])
@pytest.mark.parametrize("give", GIVE.values(), ids=GIVE)
def test_numbers_out_of_range_are_refused_with_the_range(number: str, bad: Any, give: Callable) -> None:
    """However they are given: the argument, the number and both ends are named."""
    message = refusal(make, **{number: give(bad)})
    assert ARGUMENTS[number] in message
    assert shown(bad) in message
    assert message.endswith(f"from 0 to {LARGEST_SCALE if number == 'scale' else 1:g}")


@pytest.mark.parametrize("bad", [None, [0.5], b"1"], ids=repr)
@pytest.mark.parametrize("give", [GIVE["in a list"], GIVE["by name"]], ids=["in a list", "by name"])
def test_only_numbers_are_numbers(bad: Any, give: Callable) -> None:
    """None means left out, but not within a list or dict; scales for each prompt diffusers refuses too."""
    assert f"controlnet_conditioning_scale {bad!r}" in refusal(make, scale=give(bad))


@pytest.mark.parametrize("value", [np.ones((3, 3)), torch.ones(3, 3), "two\nlines"], ids=["array", "tensor", "text"])
def test_what_prints_on_several_lines_is_refused_in_one(value: Any) -> None:
    """Errors are one line, whatever was passed."""
    assert "controlnet_conditioning_scale" in refusal(make, scale=value)


def test_both_ends_of_a_range_are_in_it() -> None:
    """The numbers that the message names are allowed themselves."""
    assert make(scale=LARGEST_SCALE, start=0, end=1) == tuple(control(LARGEST_SCALE, name=name) for name in NAMES)


@pytest.mark.parametrize(
    ("start", "end"), [(0.5, 0.5), (0.7, 0.3), (1, None), (None, 0), ([0, 0.8], [0.5, 0.8]), ({"depth": 0.6}, 0.6)]
)
def test_a_span_that_is_empty_is_refused(start: Any, end: Any) -> None:
    """As in diffusers; the message names the ControlNet if only one is wrong."""
    message = refusal(make, start=start, end=end)
    assert "expected the start before the end" in message
    assert ("depth" if isinstance(start, (list, dict)) else "tile") in message


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("unknown", ["canny", "Tile", 0, "two\nlines"])
def test_names_that_the_bundle_has_not_got_are_refused(number: str, unknown: Any) -> None:
    """The unknown one is named, and those that there are."""
    message = refusal(make, **{number: {"tile": 0.5, unknown: 0.5}})
    assert ARGUMENTS[number] in message
    assert str(unknown).split("\n")[0] in message
    assert "it has tile, depth" in message


# Images


@pytest.mark.parametrize("image", ["one", ["one", "two"], {"canny": "one"}, None], ids=repr)
def test_without_a_controlnet_an_image_is_refused(image: Any) -> None:
    """Most bundles have none: the message says how to get one."""
    message = refusal(images_by_name, NONE, image)
    assert "Hyper-SD15-1step-lora" in message
    assert "--controlnet" in message


@pytest.mark.parametrize("image", ["one", ["one", "two"], ("one",)], ids=repr)
def test_the_only_controlnet_gets_all(image: Any) -> None:
    """One image or one for each prompt: nothing to share out."""
    assert images_by_name(ONE, image) == {"canny": image}


@pytest.mark.parametrize("kind", [list, tuple])
def test_several_get_one_each_in_the_bundles_order(kind: type) -> None:
    """A list's first is the bundle's first."""
    assert images_by_name(TWO, kind(["one", "two"])) == {"tile": "one", "depth": "two"}


@pytest.mark.parametrize("kind", [list, tuple])
def test_lists_for_each_prompt_are_transposed(kind: type) -> None:
    """Diffusers' nested lists: outside the prompts, inside the ControlNets."""
    image = [kind(["tile 1", "depth 1"]), kind(["tile 2", "depth 2"]), kind(["tile 3", "depth 3"])]
    expected = {"tile": ["tile 1", "tile 2", "tile 3"], "depth": ["depth 1", "depth 2", "depth 3"]}
    assert images_by_name(TWO, image) == expected
    assert images_by_name(TWO, image[:1]) == {"tile": ["tile 1"], "depth": ["depth 1"]}


def test_a_dict_selects_some_in_the_bundles_order() -> None:
    """A ControlNet without an image does not run; the order of the dict has no meaning."""
    assert [*images_by_name(TWO, {"depth": "two", "tile": "one"}).items()] == [("tile", "one"), ("depth", "two")]
    assert images_by_name(TWO, {"depth": ["two", "three"]}) == {"depth": ["two", "three"]}
    assert images_by_name(ONE, {"canny": "one"}) == {"canny": "one"}


ARRAY = np.zeros((2, 8, 8, 3))


@pytest.mark.parametrize(
    ("image", "telling"),
    [
        ("one", "2 ControlNets (tile, depth)"),
        (ARRAY, "expected a list of one for each"),
        ([], "expected a list of one for each"),
        (["one"], "1 for 2 ControlNets"),
        (["one", "two", "three"], "3 for 2 ControlNets"),
        ([["one"], ["two"]], "2 ControlNets (tile, depth)"),
        ([["one", "two"], ["three"]], "2 ControlNets (tile, depth)"),
        ([["one", "two"], "ab"], "2 ControlNets (tile, depth)"),
        ([[]], "2 ControlNets (tile, depth)"),
        ({}, "tile, depth"),
        ({"canny": "one"}, "no ControlNet 'canny', it has tile, depth"),
        ({"tile": "one", 0: "two"}, "no ControlNet 0"),
        ({"two\nlines": "one"}, "it has tile, depth"),
    ],
    ids=lambda part: type(part).__name__,
)
def test_images_that_cannot_be_shared_out_are_refused(image: Any, telling: str) -> None:
    """Never guessed, never one dropped: the message says how many there are and which."""
    message = refusal(images_by_name, TWO, image)
    assert message.startswith("control_image: ")
    assert telling in message


def source(grey: int = 0) -> Image.Image:
    return Image.new("RGB", (20, 12), (grey,) * 3)


@pytest.mark.parametrize(
    ("image", "prompts", "levels"),
    [
        (source(51), 1, [0.2]),
        (source(51), 3, [0.2]),
        ([source(51)], 2, [0.2]),
        ([source(51), source(255)], 2, [0.2, 1.0]),
        (np.full((2, 16, 24, 3), 0.2, np.float32), 2, [0.2, 0.2]),
        (torch.full((3, 16, 24), 0.2), 2, [0.2]),
    ],
    ids=["one", "one for three", "list of one", "one each", "array", "tensor"],
)
def test_conditions_are_one_for_all_prompts_or_one_each(image: Any, prompts: int, levels: list[float]) -> None:
    """Each in its place, by the ControlNet's name and in the order of the names."""
    conditions = make_conditions({"tile": image, "depth": source(255)}, 24, 16, "crop", prompts)
    assert list(conditions) == NAMES
    assert conditions["tile"].shape == (len(levels), 3, 16, 24)
    assert conditions["tile"].mean(dim=(1, 2, 3)).tolist() == pytest.approx(levels)
    assert torch.equal(conditions["depth"], torch.ones(1, 3, 16, 24))


def test_the_resize_mode_reaches_the_images() -> None:
    """The left half black, the right half white: cut, the middle remains; stretched, all of it."""
    image = Image.new("RGB", (32, 8))
    image.paste("white", (20, 0, 32, 8))
    light = {mode: make_conditions({"a": image}, 8, 8, mode, 1)["a"].mean().item() for mode in ("crop", "stretch")}
    assert light["crop"] == 0
    assert light["stretch"] == pytest.approx(12 / 32, abs=0.02)


@pytest.mark.parametrize(("sources", "prompts"), [(2, 1), (2, 3), (3, 2)])
def test_neither_one_nor_as_many_images_as_prompts_are_refused(sources: int, prompts: int) -> None:
    """Both numbers are named, and the ControlNet."""
    images = {"tile": source(), "depth": [source()] * sources}
    message = refusal(make_conditions, images, 24, 16, "crop", prompts)
    assert f"depth: {sources} control images and {prompts} prompts" in message


@pytest.mark.parametrize("bad", ["photo.jpg", None, [], [source(), 5], ARRAY])
def test_what_is_no_image_is_refused(bad: Any) -> None:
    """Also beside one that is."""
    assert "expected" in refusal(make_conditions, {"tile": source(), "depth": bad}, 24, 16, "crop", 2)
