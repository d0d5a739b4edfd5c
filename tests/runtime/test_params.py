"""The arguments of a call: one out of range is an error of one line that names the allowed values."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_manifests import shapes, small_manifest

from hypersd.engines import Manifest
from hypersd.engines.manifest import LARGEST_GUIDANCE, decode
from hypersd.errors import RequestError
from hypersd.runtime.params import LARGEST_SEED, Params, decide
from hypersd.runtime.request import Request

SPEC = {"dtype": "float32", "shape": [1]}
SHAPES = shapes(batch=(1, 1, 2), height=(512, 768, 1024), width=(640, 640, 640))
SAMPLER = {"num_inference_steps": 2, "allowed_steps": [1, 2, 3, 4, 5, 6, 7, 8], "eta": 0.5, "guidance_scale": 3.0}
LEFT_OUT: dict[str, Any] = {
    "negative_prompt": None,
    "num_inference_steps": None,
    "timesteps": None,
    "eta": None,
    "guidance_scale": None,
    "height": None,
    "width": None,
    "num_images_per_prompt": 1,
    "seed": None,
    "force": False,
}


def manifest(**sampler: Any) -> Manifest:
    return decode(json.dumps(small_manifest(SHAPES, sampler={**SAMPLER, **sampler})).encode(), "test")


MANIFEST = manifest()


def make(prompt: Any = "cat", *, of: Manifest = MANIFEST, **arguments: Any) -> Request:
    return decide(of, Params(prompt=prompt, **arguments))


def refusal(prompt: Any = "cat", *, of: Manifest = MANIFEST, **arguments: Any) -> str:
    """The one line with which a request is refused; callers that expect a ValueError get one."""
    with pytest.raises(RequestError) as caught:
        make(prompt, of=of, **arguments)
    assert isinstance(caught.value, ValueError)
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert "\n" not in message
    assert "\r" not in message
    return message


def test_what_is_left_out_comes_from_the_manifest() -> None:
    """A prompt alone is a whole request."""
    assert make() == Request(
        prompts=("cat",),
        negative_prompts=None,
        num_inference_steps=2,
        timesteps=None,
        eta=0.5,
        guidance_scale=3.0,
        height=768,
        width=640,
        num_images_per_prompt=1,
        seeds=None,
    )


def test_what_is_given_is_taken() -> None:
    """Nothing given is overruled, zeros included."""
    request = make(
        ["cat", "dog"], negative_prompt=["x", "y"], num_inference_steps=8, eta=0, guidance_scale=0, height=1024,
        width=640, num_images_per_prompt=2, seed=[0, 1, 2, LARGEST_SEED],
    )  # fmt: skip
    assert request.prompts == ("cat", "dog")
    assert request.negative_prompts == ("x", "y")
    assert (request.num_inference_steps, request.eta, request.guidance_scale) == (8, 0.0, 0.0)
    assert (request.height, request.width, request.batch) == (1024, 640, 4)
    assert request.seeds == (0, 1, 2, LARGEST_SEED)
    assert not request.is_guided


@pytest.mark.parametrize(("scale", "guided"), [(0, False), (1, False), (1.0, False), (1.001, True), (50, True)])
def test_guidance_begins_above_one(scale: float, guided: bool) -> None:
    """Diffusers' border: a scale of exactly 1 changes nothing and must not cost a second UNet row."""
    assert make(guidance_scale=scale).is_guided is guided


def test_the_checkpoints_own_timesteps_serve_its_own_step_count_only() -> None:
    """The one-step UNet starts at 800 and not at 999; other step counts and custom timesteps are taken as given."""
    unet = manifest(kind="lcm", num_inference_steps=1, allowed_steps=[1], timesteps=[800])
    for request in (make(of=unet), make(of=unet, num_inference_steps=1)):
        assert (request.num_inference_steps, request.timesteps) == (None, (800,))
    assert make(of=unet, timesteps=[999]).timesteps == (999,)
    forced = make(of=unet, num_inference_steps=2, force=True)
    assert (forced.num_inference_steps, forced.timesteps) == (2, None)


@pytest.mark.parametrize("steps", [9, 100, 1000])
def test_steps_not_distilled_for_are_refused_with_those_allowed(steps: int) -> None:
    """The usual mistake, diffusers' 50 steps: the message names the checkpoint, its steps and the way through."""
    message = refusal(num_inference_steps=steps)
    for part in ("Hyper-SD15-1step-lora", f"for {steps} steps", "1 to 8", "force=True"):
        assert part in message
    assert make(num_inference_steps=steps, force=True).num_inference_steps == steps
    assert f"for {steps} steps" in refusal(timesteps=list(range(steps, 0, -1)))
    assert len(make(timesteps=list(range(steps, 0, -1)), force=True).timesteps or ()) == steps


@pytest.mark.parametrize(
    ("allowed", "named"), [([4], "expected 4;"), ([8, 4], "expected 4 or 8;"), ([3, 2, 4], "expected 2 to 4;")]
)
def test_the_allowed_steps_are_named(allowed: list[int], named: str) -> None:
    """One, two or a run of step counts, in order."""
    assert named in refusal(of=manifest(allowed_steps=allowed), num_inference_steps=9)


def test_no_step_is_promised_that_is_refused() -> None:
    """The message must not promise 3 steps to who may take 1, 2 or 8."""
    message = refusal(of=manifest(allowed_steps=[1, 2, 8]), num_inference_steps=9)
    assert "1 to 8" not in message
    assert [n for n in "128" if n not in message.partition("expected")[2]] == []


@pytest.mark.parametrize("steps", [0, -1, 1001, 1.0, 2.5, "2", True, [2], float("nan")])
@pytest.mark.parametrize("force", [False, True])
def test_steps_out_of_range_are_refused_even_by_force(steps: Any, force: bool) -> None:
    """``force`` lifts what the checkpoint was distilled for, not what a step count is."""
    message = refusal(num_inference_steps=steps, force=force)
    assert "num_inference_steps" in message
    assert repr(steps) in message


def test_steps_and_timesteps_that_disagree_are_refused() -> None:
    """Both may be given only if they say the same."""
    message = refusal(num_inference_steps=3, timesteps=[999, 500])
    assert "give one of the two" in message
    assert "3" in message
    assert make(num_inference_steps=2, timesteps=[999, 500]).timesteps == (999, 500)


@pytest.mark.parametrize("timesteps", [[], ()])
def test_no_timesteps_are_no_steps(timesteps: Any) -> None:
    """An empty list is a mistake and not a request for the default."""
    assert "0 steps" in refusal(timesteps=timesteps)


@pytest.mark.parametrize("timesteps", [5, 800.0, True, object()], ids=["int", "float", "bool", "object"])
def test_timesteps_that_are_no_list_are_refused(timesteps: Any) -> None:
    """``timesteps=800`` is an easy slip for ``[800]``."""
    assert "timesteps" in refusal(timesteps=timesteps)


@pytest.mark.parametrize("name", ["eta", "guidance_scale"])
@pytest.mark.parametrize("value", [-0.1, 50.1, float("nan"), float("inf"), -float("inf"), "0.5", True, [0.5], 10**400])
def test_numbers_out_of_range_are_refused_with_the_range(name: str, value: Any) -> None:
    """Both ends are named; nan, infinity, text and integers beyond any float are no numbers here."""
    message = refusal(**{name: value})
    assert name in message
    assert f"0 to {1 if name == 'eta' else 50}" in message


@pytest.mark.parametrize(("name", "most"), [("eta", 1.0), ("guidance_scale", LARGEST_GUIDANCE)])
def test_both_ends_of_a_range_are_in_it(name: str, most: float) -> None:
    """The numbers that the message names are allowed themselves."""
    for value in (0, 0.0, int(most), most):
        assert getattr(make(**{name: value}), name) == value


@pytest.mark.parametrize("side", ["height", "width"])
@pytest.mark.parametrize("extent", [513, 764, 1023, 641])
def test_sizes_off_the_grid_are_refused_with_the_nearest_one(side: str, extent: int) -> None:
    """The nearest multiple of 8 that the bundle takes is named."""
    message = refusal(**{side: extent})
    assert f"{side} {extent} is not a multiple of 8" in message
    nearest = int(message.rsplit(" ", 1)[1])
    assert nearest % 8 == 0
    assert nearest == 640 if side == "width" else abs(nearest - extent) <= 4


@pytest.mark.parametrize(
    ("side", "extent", "range_"),
    [("height", 504, "512..1024"), ("height", 1032, "512..1024"), ("width", 512, "640"), ("width", 8, "640")],
)
def test_sizes_outside_the_bundle_are_refused_with_its_range(side: str, extent: int, range_: str) -> None:
    """The message names the bundle's range and how to make a bundle of another."""
    message = refusal(**{side: extent})
    assert f"{side} {extent} is outside this bundle's {range_}" in message
    assert "export" in message


@pytest.mark.parametrize("side", ["height", "width"])
@pytest.mark.parametrize("extent", [0, -8, 1 << 17, 640.0, "640", True, [640]])
def test_sizes_that_are_none_are_refused(side: str, extent: Any) -> None:
    """No number of pixels at all."""
    message = refusal(**{side: extent})
    assert side in message
    assert repr(extent) in message


@pytest.mark.parametrize("count", [0, -1, 1025, 1.0, "1", None, True])
def test_image_counts_out_of_range_are_refused(count: Any) -> None:
    """At least one image, and a bound against slips of the keyboard."""
    message = refusal(num_images_per_prompt=count)
    assert "num_images_per_prompt" in message
    assert "from 1 to 1024" in message


@pytest.mark.parametrize("seed", [-1, LARGEST_SEED + 1, 0.0, "0", True, [True], ["x"], [-1], [[0]], 10**400])
def test_seeds_out_of_range_are_refused(seed: Any) -> None:
    """Seeds that torch's generator would take differently, or not at all."""
    message = refusal(seed=seed)
    assert "seed" in message
    assert str(LARGEST_SEED) in message


@pytest.mark.parametrize("seeds", [[], [1], [1, 2, 3], (1, 2, 3, 4, 5)])
def test_seed_lists_are_one_a_image(seeds: Any) -> None:
    """A list of the wrong length names the number of images."""
    message = refusal(["cat", "dog"], num_images_per_prompt=2, seed=seeds)
    assert f"got {len(seeds)}" in message
    assert "4" in message
    assert make(["cat", "dog"], num_images_per_prompt=2, seed=(1, 2, 3, 4)).seeds == (1, 2, 3, 4)
    assert make(["cat", "dog"], num_images_per_prompt=2, seed=1).seeds == (1,)


@pytest.mark.parametrize("prompt", [None, 5, b"cat", [], (), ["cat", 5], ["cat", None], [["cat"]], {"cat"}, {"cat": 1}])
def test_prompts_of_other_types_are_refused(prompt: Any) -> None:
    """A string, or a list of strings."""
    assert "prompt: expected a string or a list of strings" in refusal(prompt)


@pytest.mark.parametrize("prompt", ["", " ", "x" * 100_000, "猫 🐈", "a\nb\0c", ["", ""], ("cat",)])
def test_every_text_is_a_prompt(prompt: Any) -> None:
    """Empty, very long, emoji, Chinese, control characters: the tokenizer's business, not refused here."""
    assert make(prompt).prompts == ((prompt,) if isinstance(prompt, str) else tuple(prompt))


@pytest.mark.parametrize("negative", [["x"], ["x", "y", "z"], []])
def test_negative_prompts_are_one_or_as_many_as_prompts(negative: list[str]) -> None:
    """A list is matched to the prompts one by one, as in diffusers."""
    message = refusal(["cat", "dog"], negative_prompt=negative)
    assert "negative_prompt" in message
    assert make(["cat", "dog"], negative_prompt="x").negative_prompts == ("x", "x")
    assert make(["cat", "dog"], negative_prompt="").negative_prompts == ("", "")


@pytest.mark.parametrize("negative", [5, b"x", ["x", 5], {"x": 1}])
def test_negative_prompts_of_other_types_are_refused_by_their_name(negative: Any) -> None:
    """The message must blame the argument that is wrong."""
    assert "negative_prompt" in refusal(["cat", "dog"], negative_prompt=negative)


scalars = st.none() | st.booleans() | st.integers() | st.integers(0, 1100) | st.floats() | st.text(max_size=5)
values = scalars | st.lists(scalars, max_size=4) | st.tuples(scalars) | st.binary(max_size=3) | st.just({"a": 1})


@st.composite
def arguments(draw: st.DrawFn) -> dict[str, Any]:
    """Junk in some of the places, what is right in the others."""
    names = draw(st.lists(st.sampled_from([*LEFT_OUT, "prompt"]), unique=True, max_size=4))
    return {"prompt": "cat", **LEFT_OUT, **{name: draw(values) for name in names}}


@settings(max_examples=400, deadline=None)
@given(arguments=arguments())
@example(arguments={"prompt": "cat", **LEFT_OUT, "eta": 10**400})
def test_junk_is_a_request_or_a_request_error(arguments: dict[str, Any]) -> None:
    """Any arguments give a request in range or a RequestError of one line."""
    prompt = arguments.pop("prompt")
    try:
        request = decide(MANIFEST, Params(prompt=prompt, **arguments))
    except RequestError as error:
        message = str(error)
    else:
        check_in_range(request)
        return
    assert "\n" not in message


def check_in_range(request: Request) -> None:
    """Every value of a request lies in the manifest's ranges."""
    assert all(isinstance(text, str) for text in request.prompts)
    assert (request.num_inference_steps is None) != (request.timesteps is None)
    assert 0 <= request.eta <= 1
    assert 0 <= request.guidance_scale <= LARGEST_GUIDANCE
    assert 512 <= request.height <= 1024
    assert request.height % 8 == 0
    assert request.width == 640
    assert request.seeds is None or len(request.seeds) in (1, request.batch)
