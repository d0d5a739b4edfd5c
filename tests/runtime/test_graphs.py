"""The whole image as one graph: the same images as step by step, to the bit, whatever changes between calls.

Recording itself is a stand-in here (tests/capture_stand_in.py); tests/gpu/test_graphs.py has the real one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from capture_stand_in import Capturable, StandInCapture
from counting import load_engines
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from hypersd import Pipeline
from hypersd.engines import Bundle
from hypersd.engines.cuda.graphs import WARM_UPS, GraphWarning
from hypersd.errors import EngineError, RequestError
from hypersd.runtime.text import load_tokenizers

pytestmark = pytest.mark.filterwarnings("error::hypersd.engines.cuda.graphs.GraphWarning")
PROMPT = "a photo of a cat"
FAMILIES = pytest.mark.parametrize("family", ["sd15", "sdxl"])


def make_pipes(root: Path, backend: str = "onnxruntime", capture: Any = None) -> tuple[Pipeline, Pipeline, Any]:
    """A pipeline that records, one that does not, on the same engines; and the stand-in that counts."""
    bundle = Bundle.load(root)
    engines = load_engines(bundle, backend, "cpu")
    tokenizers = load_tokenizers(bundle)
    capture = capture or StandInCapture()
    capturable = {name: Capturable(engine) for name, engine in engines.items()}
    return (
        Pipeline(bundle.manifest, capturable, tokenizers, capture=capture),
        Pipeline(bundle.manifest, engines, tokenizers),
        capture,
    )


def as_array(images: Any) -> np.ndarray:
    if isinstance(images, list):
        return np.stack([np.asarray(image) for image in images])
    return images.numpy() if isinstance(images, Tensor) else images


def assert_same(graphed: Pipeline, plain: Pipeline, calls: list[dict[str, Any]], rounds: int = 4) -> None:
    """Both give equal images for every call of every round; seeds and prompts change from round to round."""
    for i in range(rounds):
        for call in calls:
            whole = {"prompt": [PROMPT, "blue dog", ""][i % 3], "seed": 10 + i, **call}
            ours, theirs = graphed(**whole), plain(**whole)
            assert type(ours.images) is type(theirs.images)
            assert np.array_equal(as_array(ours.images), as_array(theirs.images)), f"round {i}, {whole}"
            assert (ours.seed, ours.request) == (theirs.seed, theirs.request)


@FAMILIES
def test_a_run_from_an_image_is_one_graph(family: str, request: pytest.FixtureRequest) -> None:
    """The encoder is inside; image, mask and a strength that leaves as many steps are inputs, not keys."""
    graphed, plain, capture = make_pipes(request.getfixturevalue(f"{family}_bundle"))
    images = [Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5 + i), 20).convert("RGB") for i in range(2)]
    mask = Image.linear_gradient("L")
    for i in range(5):
        image = images[i % 2]
        for call in (
            {"image": image, "strength": [0.5, 0.6][i % 2], "num_inference_steps": 4, "eta": 1.0},
            {"image": image, "mask_image": mask.rotate(90 * i), "num_inference_steps": 2},
        ):
            assert_same(graphed, plain, [call], rounds=1)
    assert capture.image_captures == 2


@FAMILIES
def test_images_are_those_of_the_plain_pipeline(family: str, request: pytest.FixtureRequest) -> None:
    """Settings that alternate, each with a graph of its own, under prompts and seeds that share it."""
    graphed, plain, capture = make_pipes(request.getfixturevalue(f"{family}_bundle"))
    calls = [
        {"num_inference_steps": 1},
        {"num_inference_steps": 4, "eta": 1.0},
        {"num_inference_steps": 4, "eta": 0.3, "output_type": "np"},
        {"timesteps": [999, 500, 20], "force": True},
        {"num_inference_steps": 2, "num_images_per_prompt": 2, "output_type": "pt"},
        {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"},
        {"num_inference_steps": 2, "guidance_scale": 3.0, "negative_prompt": "red dog"},
    ]
    assert_same(graphed, plain, calls)
    assert capture.image_captures == len(calls), "one each"
    assert capture.image_replays == len(calls) * (4 - WARM_UPS)
    assert_same(graphed, plain, [{"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "pil"}], rounds=5)
    assert capture.image_captures == len(calls), "a negative prompt is no key, also where zeros stand for one"


def test_a_first_call_may_be_in_inference_mode(sd15_bundle: Path) -> None:
    """What is kept of it, buffers and embeddings, serves calls outside; results are tensors like any other."""
    graphed, plain, capture = make_pipes(sd15_bundle)
    calls: list[dict[str, Any]] = [
        {"num_inference_steps": 1},
        {"num_inference_steps": 1, "callback_on_step_end": lambda *_: None},
        {"num_inference_steps": 1, "output_type": "pt"},
    ]
    with torch.inference_mode():
        assert_same(graphed, plain, calls, rounds=1)
        encoded = graphed.encode_prompt([PROMPT])
    assert_same(graphed, plain, calls)
    assert capture.image_captures == 2
    assert not encoded.hidden_states.is_inference()
    assert not graphed(PROMPT, **calls[2]).images.is_inference()


def test_sizes_and_guidance_of_a_ranged_bundle(sdxl_dynamic_bundle: Path) -> None:
    """fp16, DDIM, sizes and batches that change: each shape is recorded apart, and the size conditioning follows it."""
    graphed, plain, capture = make_pipes(sdxl_dynamic_bundle)
    calls: list[dict[str, Any]] = [
        {"height": 64, "width": 64, "guidance_scale": 5.0},
        {"height": 104, "width": 96, "guidance_scale": 5.0, "eta": 0.5},
        {"height": 64, "width": 96, "guidance_scale": 1.0, "num_images_per_prompt": 3},
    ]
    assert_same(graphed, plain, calls)
    assert capture.image_captures == 3


def test_control_images_and_strengths_share_a_graph(export_controlled: Callable[[str], Path]) -> None:
    """They are inputs of the graph; which ControlNets act at which step is its key."""
    graphed, plain, capture = make_pipes(export_controlled("Hyper-SD15-1step-lora"))
    rng = np.random.default_rng(0)
    one, other = (Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)) for _ in range(2))
    base: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np"}
    for i, image in enumerate([one, other] * 3):
        call = {**base, "control_image": {"canny": image}, "controlnet_conditioning_scale": 0.3 + 0.1 * i}
        assert_same(graphed, plain, [call], rounds=1)
    assert capture.image_captures == 1
    others: list[dict[str, Any]] = [
        {},
        {"control_image": {"scribble": one}},
        {"control_image": [one, other]},
        {"control_image": [one, other], "control_guidance_start": [0.0, 0.5]},
        {"control_image": {"canny": one}, "control_guidance_end": 0.5},
        {"control_image": {"canny": one}, "guidance_scale": 3.0, "num_images_per_prompt": 2},
    ]
    assert_same(graphed, plain, [{**base, **call} for call in others])
    assert capture.image_captures == 1 + len(others)
    captures = capture.image_captures
    without_effect = {**base, "control_image": {"canny": one}, "controlnet_conditioning_scale": 0.0}
    assert_same(graphed, plain, [without_effect])
    assert capture.image_captures == captures, "that is the plain image's graph"


def test_other_operations_are_another_key(sd15_bundle: Path) -> None:
    """The number of steps, those that take noise, guidance or none, and the output type."""
    graphed, plain, capture = make_pipes(sd15_bundle)
    base: dict[str, Any] = {"num_inference_steps": 3, "eta": 0.5, "guidance_scale": 2.0, "output_type": "np"}
    changes: list[dict[str, Any]] = [
        {},
        {"eta": 0.0},
        {"guidance_scale": 0.0},
        {"num_inference_steps": 2},
        {"output_type": "pt"},
    ]
    assert_same(graphed, plain, [{**base, **change} for change in changes])
    assert capture.image_captures == len(changes)
    graphed(PROMPT, seed=1, num_inference_steps=3, eta=0.5, guidance_scale=0.0)
    captures = capture.image_captures
    for scale in (0.5, 1.0, 0.0):
        graphed(PROMPT, seed=1, num_inference_steps=3, eta=0.5, guidance_scale=scale)
    assert capture.image_captures == captures + 1, "no guidance is no guidance"


MANY = {"max_examples": 4, "deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
NUMBERS = st.fixed_dictionaries(
    {
        "eta": st.floats(0.01, 1.0),
        "guidance_scale": st.floats(1.01, 20.0),
        "steps": st.one_of(
            st.just({"num_inference_steps": 3}),
            st.sets(st.integers(1, 999), min_size=3, max_size=3).map(
                lambda steps: {"timesteps": sorted(steps, reverse=True)}
            ),
        ),
        "negative_prompt": st.sampled_from([None, "red dog"]),
        "prompts": st.sampled_from([(PROMPT, 2), ([PROMPT, "blue dog"], 1)]),
    }
)


@pytest.mark.parametrize("family", ["sd15", "sdxl_dynamic"])
@given(two=st.tuples(NUMBERS, NUMBERS))
@settings(**MANY)
def test_settings_that_differ_in_numbers_share_a_graph(two: Any, family: str, request: pytest.FixtureRequest) -> None:
    """Eta, guidance scale, timesteps, negative prompts and number of prompts, in float32 and in float16 (DDIM)."""
    graphed, plain, capture = make_pipes(request.getfixturevalue(f"{family}_bundle"))
    for i in range(2 * (WARM_UPS + 1)):
        numbers = dict(two[i % 2])
        (prompt, each), steps = numbers.pop("prompts"), numbers.pop("steps")
        if plain.manifest.sampler.kind == "ddim":  # without timesteps of one's own
            steps = {"num_inference_steps": 3}
        shape = {"prompt": prompt, "num_images_per_prompt": each, "output_type": "np", "force": True}
        assert_same(graphed, plain, [{**numbers, **steps, **shape}], rounds=1)
    assert capture.image_captures == 1
    assert capture.image_replays == WARM_UPS + 2


@given(strengths=st.tuples(st.floats(0.3, 0.99), st.floats(0.3, 0.99)), has_mask=st.booleans())
@settings(**MANY)
def test_strengths_share_a_graph(strengths: tuple[float, float], has_mask: bool, sd15_bundle: Path) -> None:
    """With ``keep_steps`` another strength is another schedule of as many steps."""
    graphed, plain, capture = make_pipes(sd15_bundle)
    image = Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 20).convert("RGB")
    call = {"image": image, "num_inference_steps": 3, "keep_steps": True, "eta": 0.7}
    mask = {"mask_image": Image.linear_gradient("L")} if has_mask else {}
    for i in range(2 * (WARM_UPS + 1)):
        assert_same(graphed, plain, [{**call, **mask, "strength": strengths[i % 2]}], rounds=1)
    assert capture.image_captures == 1


def test_generators_and_latents_are_used_as_without_a_graph(sd15_bundle: Path) -> None:
    """A list of generators, one generator, latents of another dtype: the same numbers, and as many of them."""
    graphed, plain, _ = make_pipes(sd15_bundle)
    for i in range(5):
        states = []
        for pipe in (graphed, plain):
            generators = [torch.Generator().manual_seed(i), torch.Generator().manual_seed(i + 50)]
            latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
            kept = latents.clone()
            arguments = {"num_inference_steps": 4, "eta": 1.0, "num_images_per_prompt": 2, "output_type": "np"}
            listed = pipe(PROMPT, generator=generators, **arguments).images
            given = pipe(PROMPT, generator=generators[0], latents=latents, **arguments).images
            assert torch.equal(latents, kept)
            states.append((listed, given, *(generator.get_state().numpy() for generator in generators)))
        for ours, theirs in zip(*states, strict=True):
            assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("kind", ["pil", "np", "pt", "latent"])
def test_results_outlive_the_next_call(kind: str, sd15_bundle: Path) -> None:
    """The graph's own outputs are overwritten by its next launch: what a call returned is the caller's."""
    graphed, _, capture = make_pipes(sd15_bundle)
    results = [graphed(PROMPT, seed=i, output_type=kind).images for i in range(WARM_UPS + 3)]
    kept = [as_array(result).copy() for result in results]
    graphed("blue dog", seed=99, output_type=kind)
    assert all(np.array_equal(as_array(result), copy) for result, copy in zip(results, kept, strict=True))
    assert not np.array_equal(kept[-1], kept[-2])
    assert capture.replays > 1


def test_callbacks_run_step_by_step(sd15_bundle: Path) -> None:
    """A callback looks into the loop, which a graph does not have; between its calls graphs go on."""
    graphed, plain, capture = make_pipes(sd15_bundle)
    seen: list[int] = []

    def halve(pipe: Any, i: int, t: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(i)
        assert pipe.decode(tensors["latents"]).shape == (1, 3, 64, 64), "a preview, inside a turn"
        return {"latents": tensors["latents"] * 0.5}

    for _ in range(4):
        assert_same(graphed, plain, [{"num_inference_steps": 3, "callback_on_step_end": halve}], rounds=1)
        assert_same(graphed, plain, [{"num_inference_steps": 3}], rounds=1)
    assert seen == [0, 1, 2] * 8
    assert capture.captures == 1 + 2, "the image, and step by step UNet and decoder; the prompt was encoded once"


@pytest.mark.parametrize(
    ("kind", "stages"),
    [
        ("pil", ["tokenize", "generate", "convert"]),
        ("np", ["tokenize", "generate", "convert"]),
        ("pt", ["tokenize", "generate"]),
    ],
)
def test_timings_of_a_graph(kind: str, stages: list[str], sd15_bundle: Path) -> None:
    """One launch is one stage, on the warm-ups too."""
    graphed, _, _ = make_pipes(sd15_bundle)
    for i in range(4):
        timings = graphed(PROMPT, seed=i, output_type=kind).timings
        assert list(timings) == [*stages, "total"]
        assert sum(timings[stage] for stage in stages) <= timings["total"]


def test_one_engine_that_cannot_be_recorded_is_enough(sd15_bundle: Path) -> None:
    """The image is recorded whole or not at all."""
    graphed, _, capture = make_pipes(sd15_bundle)
    engines = dict(graphed.engines)
    setattr(engines["vae_decoder"], "capturable", False)  # noqa: B010
    pipe = Pipeline(graphed.manifest, engines, graphed.tokenizers, capture=capture)
    for i in range(4):
        assert "denoise" in pipe(PROMPT, seed=i).timings
    assert capture.image_captures == 0


def test_a_failed_recording_is_a_warning_and_the_images_are_right(sd15_bundle: Path) -> None:
    """It is shown at the call of the pipeline, once; with callbacks, for every network."""

    def fail(work: Any, _memory: Any) -> Any:
        raise EngineError("CUDA graph: recording failed (no), expected work that only enqueues")

    graphed, plain, _ = make_pipes(sd15_bundle, capture=fail)
    assert_same(graphed, plain, [{}], rounds=WARM_UPS)
    with pytest.warns(GraphWarning, match="recording failed") as caught:
        assert_same(graphed, plain, [{}, {"output_type": "np"}, {"output_type": "pt"}], rounds=WARM_UPS + 3)
    assert [warning.filename for warning in caught] == [__file__] * 2, "the text encoder and the image"
    with pytest.warns(GraphWarning) as caught:
        assert_same(graphed, plain, [{"callback_on_step_end": lambda *_: None}], rounds=WARM_UPS + 3)
    assert len(caught) == 2, "UNet and decoder, which run by themselves now"


def test_bad_requests_leave_nothing_behind(sd15_bundle: Path) -> None:
    """Refused before anything runs, and the turn is over."""
    graphed, plain, capture = make_pipes(sd15_bundle)
    for i in range(3):
        for bad in (
            {"latents": torch.zeros(1, 4, 8, 9)},
            {"generator": [torch.Generator()] * 2},
            {"timesteps": [1, 2]},
        ):
            with pytest.raises(RequestError):
                graphed(PROMPT, **bad)
        assert_same(graphed, plain, [{"seed": i}], rounds=1)
    assert capture.image_captures == 1


def test_the_null_backend_is_recorded_too(sdxl_bundle: Path) -> None:
    """The loop without networks, as a graph: what a launch costs."""
    graphed, plain, capture = make_pipes(sdxl_bundle, "null")
    assert_same(graphed, plain, [{"num_inference_steps": 4, "guidance_scale": 4.0}], rounds=5)
    assert capture.image_captures == 1


def test_a_thread_for_every_call_gets_to_the_graph(sd15_bundle: Path) -> None:
    """As many services work, step by step too."""
    graphed, plain, capture = make_pipes(sd15_bundle)
    for _ in range(WARM_UPS + 2):
        for call in ({}, {"callback_on_step_end": lambda *_: None}):
            with ThreadPoolExecutor(1) as pool:
                pool.submit(assert_same, graphed, plain, [call], 1).result(60)
    assert capture.captures == 1 + 2, "the image, and step by step UNet and decoder; the prompt was encoded once"


def test_threads_take_turns_and_draw_what_they_draw_alone(sd15_bundle: Path) -> None:
    """Several users at once: one graph is launched by one of them at a time, and each gets its own image."""
    graphed, plain, capture = make_pipes(sd15_bundle)
    calls: list[dict[str, Any]] = [
        {"prompt": PROMPT, "seed": 1, "num_inference_steps": 2},
        {"prompt": "blue dog", "seed": 2, "num_inference_steps": 2},
        {"prompt": "red cat", "seed": 3, "num_inference_steps": 1, "output_type": "np"},
    ]
    alone = [as_array(plain(**call).images) for call in calls]
    barrier = threading.Barrier(len(calls))

    def work(i: int) -> list[np.ndarray]:
        barrier.wait(60)
        return [as_array(graphed(**calls[i]).images) for _ in range(8)]

    with ThreadPoolExecutor(len(calls)) as pool:
        for i, results in enumerate(pool.map(work, range(len(calls)))):
            assert all(np.array_equal(result, alone[i]) for result in results)
    assert capture.image_captures == 2
