"""The pipeline around the networks: outputs, noise, callbacks, how often each network runs, and threads.

That the images themselves are diffusers' is tested in tests/test_parity.py.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from counting import counting_pipe, null_pipe
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from hypersd import Pipeline
from hypersd.engines import Bundle, Manifest
from hypersd.engines.engine import NullEngine
from hypersd.engines.image_shapes import narrowed
from hypersd.engines.load import Choice
from hypersd.engines.specs import ImageShapes, Range, TensorSpec
from hypersd.errors import BundleError, EngineError, RequestError
from hypersd.runtime import pipeline as module
from hypersd.runtime.batching import run_rows

PROMPT = "a photo of a cat"
TOLERANCE = 2e-3  # of full scale, as in tests/test_parity.py
FAMILIES = pytest.mark.parametrize("family", ["sd15", "sdxl"])
NAMES = {"sd15": "Hyper-SD15-1step-lora", "sdxl": "Hyper-SDXL-1step-lora"}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pipes(sd15_bundle: Path, sdxl_bundle: Path) -> dict[str, Pipeline]:
    return {"sd15": Pipeline.load(sd15_bundle), "sdxl": Pipeline.load(sdxl_bundle)}


@pytest.fixture(scope="module")
def sd15(pipes: dict[str, Pipeline]) -> Pipeline:
    return pipes["sd15"]


def images_of(pipe: Pipeline, prompt: Any = PROMPT, **arguments: Any) -> np.ndarray:
    """Images [B, H, W, 3] in 0..1."""
    return pipe(prompt, output_type="np", **arguments).images


# Results


def test_the_four_output_types_are_one_image(sd15: Pipeline) -> None:
    """pil, np and pt are the same numbers in different clothes, and the latents decode to them."""
    arguments = {"num_inference_steps": 2, "num_images_per_prompt": 2, "seed": 3}
    pil, array, tensor, latents = (
        sd15(PROMPT, output_type=kind, **arguments).images for kind in ("pil", "np", "pt", "latent")
    )
    assert sd15(PROMPT, **arguments).images[1].tobytes() == pil[1].tobytes(), "pil is the default"
    assert isinstance(pil, list)
    assert isinstance(pil[0], Image.Image)
    assert array.shape == (2, 64, 64, 3)
    assert array.dtype == np.float32
    assert tensor.shape == (2, 3, 64, 64)
    assert latents.shape == (2, 4, 8, 8)
    assert np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    assert np.array_equal(np.stack([np.asarray(image) for image in pil]), (array * 255).round().astype(np.uint8))
    decoded = (sd15.decode(latents) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(decoded, tensor, rtol=0, atol=1e-6)
    assert not np.array_equal(array[0], array[1])


@pytest.mark.parametrize("kind", ["np", "pt", "latent"])
def test_results_outlive_the_next_call(kind: str, sd15: Pipeline) -> None:
    """The result belongs to the caller: the next call, which overwrites the engines' buffers, does not change it."""
    first = sd15(PROMPT, seed=1, output_type=kind).images
    kept = first.copy() if isinstance(first, np.ndarray) else first.clone()
    sd15("blue dog", seed=2, output_type=kind)
    assert (first == kept).all()


def test_decoded_images_outlive_the_next_call(sd15: Pipeline) -> None:
    """On a GPU threads share the decoder's buffers: what ``decode`` returned is the caller's."""
    latents = sd15(PROMPT, seed=1, output_type="latent").images
    decoded = sd15.decode(latents)
    kept = decoded.clone()
    sd15.decode(-latents)
    assert torch.equal(decoded, kept)


@pytest.mark.parametrize("kind", ["pt", "latent"])
def test_tensors_that_are_returned_are_ordinary_ones(kind: str, sd15: Pipeline) -> None:
    """As in diffusers, a caller may change them in place and differentiate through what it computes from them."""
    images = sd15(PROMPT, seed=1, output_type=kind).images
    images.mul_(0.5)
    weight = torch.ones(1, requires_grad=True)
    (images * weight).sum().backward()
    assert weight.grad is not None


def test_unknown_output_types_are_refused_before_any_work(sd15_bundle: Path) -> None:
    """A slip in the last argument must not cost a whole image first."""
    pipe, engines = counting_pipe(sd15_bundle)
    with pytest.raises(RequestError, match="pil, np, pt, latent"):
        pipe(PROMPT, output_type="jpg")
    assert [engine.rows for engine in engines.values()] == [[]] * 4


@pytest.mark.parametrize(
    ("kind", "stages"),
    [
        ("pil", ["tokenize", "encode", "denoise", "decode", "convert"]),
        ("np", ["tokenize", "encode", "denoise", "decode", "convert"]),
        ("latent", ["tokenize", "encode", "denoise"]),
    ],
)
def test_timings_name_every_stage(kind: str, stages: list[str], sd15: Pipeline) -> None:
    """Seconds by stage in order, a total that holds them all, and the steps that denoising is made of."""
    timings = sd15(PROMPT, seed=0, output_type=kind, num_inference_steps=3).timings
    steps = ["step_1", "step_2", "step_3"]
    assert [name for name in timings if name not in steps] == [*stages, "total"]
    assert all(seconds > 0 for seconds in timings.values())
    assert sum(timings[stage] for stage in stages) <= timings["total"] < 60
    assert sum(timings[step] for step in steps) <= timings["denoise"]


def test_a_callbacks_time_is_its_steps(sd15: Pipeline) -> None:
    """A slow callback does not show as a slow network of the next step."""
    timings = sd15(
        PROMPT,
        seed=0,
        num_inference_steps=2,
        callback_on_step_end=lambda _pipe, i, _t, _tensors: time.sleep(0.5) if i == 0 else None,
    ).timings
    assert timings["step_1"] > 0.5 > timings["step_2"]


# Noise


@FAMILIES
def test_images_of_a_list_of_seeds_do_not_depend_on_their_neighbours(family: str, pipes: dict[str, Pipeline]) -> None:
    """Each image of a batch equals the one that its seed gives alone, fresh noise of every step included."""
    pipe, seeds = pipes[family], [11, 5, 2**63 - 1]
    arguments = {"num_inference_steps": 3, "eta": 1.0}
    batch = pipe(PROMPT, num_images_per_prompt=3, seed=seeds, output_type="np", **arguments)
    assert batch.seed == tuple(seeds)
    for image, seed in zip(batch.images, seeds, strict=True):
        alone = images_of(pipe, seed=seed, **arguments)[0]
        np.testing.assert_allclose(image, alone, atol=1e-5)
    assert np.abs(batch.images[0] - batch.images[1]).max() > 0.05
    by_prompt = images_of(pipe, ["red dog", PROMPT], seed=[1, 11], **arguments)
    np.testing.assert_allclose(by_prompt[1], batch.images[0], atol=1e-5)


def test_without_a_seed_one_is_drawn_and_reported(sd15: Pipeline) -> None:
    """An image without a seed can be generated again with the seed that was chosen for it; two calls differ."""
    first, second = (sd15(PROMPT, num_inference_steps=2, num_images_per_prompt=2, output_type="np") for _ in range(2))
    assert isinstance(first.seed, int)
    assert first.seed != second.seed
    assert not np.array_equal(first.images, second.images)
    again = images_of(sd15, num_inference_steps=2, num_images_per_prompt=2, seed=first.seed)
    assert np.array_equal(again, first.images)


def test_torchs_own_randomness_is_neither_used_nor_touched(sd15: Pipeline) -> None:
    """A service's global seed does not decide its images, and generating does not advance it."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = sd15(PROMPT, num_inference_steps=2).seed
    assert torch.equal(torch.get_rng_state(), before)
    assert sd15(PROMPT, num_inference_steps=2).seed != first


@FAMILIES
def test_generators_are_seeds(family: str, pipes: dict[str, Pipeline]) -> None:
    """diffusers' way to give a seed means the same as ours, one or one an image."""
    pipe, arguments = pipes[family], {"num_inference_steps": 2, "num_images_per_prompt": 2, "eta": 0.7}
    one = pipe(PROMPT, generator=seeded(7), output_type="np", **arguments)
    assert one.seed is None
    assert np.array_equal(one.images, images_of(pipe, seed=7, **arguments))
    several = images_of(pipe, generator=[seeded(7), seeded(9)], **arguments)
    assert np.array_equal(several, images_of(pipe, seed=[7, 9], **arguments))
    assert not np.array_equal(several, one.images)


def test_bad_generators_are_refused(sd15: Pipeline) -> None:
    """One line for a generator that is none, a list of the wrong length, and a seed besides."""
    bad: list[dict[str, Any]] = [
        {"generator": seeded(1), "seed": 1},
        {"generator": [seeded(1), seeded(2)]},
        {"generator": 7},
        {"generator": ["x"]},
        {"generator": []},
    ]
    for arguments in bad:
        with pytest.raises(RequestError, match="generator") as caught:
            sd15(PROMPT, **arguments)
        assert "\n" not in str(caught.value)


def test_latents_are_the_first_noise(sd15: Pipeline) -> None:
    """Latents drawn by the caller give the image of the same generator, and are not changed."""
    generator = seeded(7)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    kept = latents.clone()
    arguments = {"num_inference_steps": 3, "eta": 1.0}
    assert np.array_equal(
        images_of(sd15, latents=latents, generator=generator, **arguments), images_of(sd15, seed=7, **arguments)
    )
    assert torch.equal(latents, kept)
    assert np.array_equal(
        images_of(sd15, latents=latents.double(), num_inference_steps=1),
        images_of(sd15, latents=latents, num_inference_steps=1),
    )


@pytest.mark.parametrize(
    "latents",
    [torch.zeros(1, 4, 8, 9), torch.zeros(2, 4, 8, 8), torch.zeros(4, 8, 8), [[0.0]], 5],
    ids=lambda x: str(type(x)),
)
def test_latents_of_another_shape_are_refused(latents: Any, sd15: Pipeline) -> None:
    """The message names the shape that this call needs."""
    with pytest.raises(RequestError, match="latents") as caught:
        sd15(PROMPT, latents=latents)
    assert "[1, 4, 8, 8]" in str(caught.value)


@pytest.mark.parametrize("timesteps", [["x"], [1, 2], [1000], [-1], [5.5], [True], "999"], ids=repr)
def test_bad_custom_timesteps_are_refused(timesteps: Any, sd15: Pipeline) -> None:
    """Custom timesteps must be a schedule: whole, in range, descending."""
    with pytest.raises(RequestError, match="timesteps") as caught:
        sd15(PROMPT, timesteps=timesteps, seed=0)
    assert "\n" not in str(caught.value)


# Callbacks


def recorder(calls: list[Any], change: Callable[[int, dict[str, Any]], dict[str, Any]]) -> Callable[..., Any]:
    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        calls.append((pipe, step, timestep, {name: tensor.clone() for name, tensor in tensors.items()}))
        return change(step, tensors)

    return callback


@FAMILIES
@pytest.mark.parametrize("guidance", [0.0, 3.0])
@pytest.mark.parametrize("kind", ["look", "latents", "prompt_embeds"])
def test_callbacks_see_and_change_what_they_do_in_diffusers(
    family: str, guidance: float, kind: str, pipes: dict[str, Pipeline], reference: Callable[[str], Any]
) -> None:
    """Same steps, timesteps and tensors as in diffusers, and what is returned replaces the same thing."""

    def change(step: int, tensors: dict[str, Any]) -> dict[str, Any]:
        if kind != "look" and step == 0:
            return {kind: tensors[kind] * (0.5 if kind == "latents" else -20)}
        return {}

    arguments: Any = {
        "num_inference_steps": 3,
        "guidance_scale": guidance,
        "eta": 0.5,
        "output_type": "np",
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    }
    pipe, judge = pipes[family], reference(NAMES[family])
    ours: list[Any] = []
    theirs: list[Any] = []
    image = pipe(PROMPT, seed=7, callback_on_step_end=recorder(ours, change), **arguments).images
    expected = judge(PROMPT, generator=seeded(7), callback_on_step_end=recorder(theirs, change), **arguments).images
    assert all(call[0] is pipe for call in ours)
    assert [call[1] for call in ours] == [call[1] for call in theirs] == [0, 1, 2]
    assert [int(call[2]) for call in ours] == [int(call[2]) for call in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one[3].keys() == other[3].keys()
        for name in one[3]:
            torch.testing.assert_close(one[3][name], other[3][name], rtol=1e-3, atol=1e-3)
    assert np.abs(image - expected).max() < TOLERANCE
    if kind != "look":
        plain = images_of(pipe, seed=7, num_inference_steps=3, guidance_scale=guidance, eta=0.5)
        assert np.abs(image - plain).max() > 5 * TOLERANCE, "the change must show"


def test_callbacks_get_latents_unless_they_ask_otherwise(sd15: Pipeline) -> None:
    """diffusers' default; a callback that returns nothing changes nothing."""
    seen: list[list[str]] = []
    image = images_of(
        sd15, seed=7, num_inference_steps=2, callback_on_step_end=lambda pipe, i, t, tensors: seen.append(list(tensors))
    )
    assert seen == [["latents"], ["latents"]]
    assert np.array_equal(image, images_of(sd15, seed=7, num_inference_steps=2))
    seen.clear()
    sd15(
        PROMPT,
        seed=7,
        callback_on_step_end=lambda pipe, i, t, tensors: seen.append(list(tensors)),
        callback_on_step_end_tensor_inputs=[],
    )
    assert seen == [[]]


def test_a_callback_may_change_latents_in_place(sd15: Pipeline) -> None:
    """The callback gets the loop's own tensor, as in diffusers."""

    def clear(pipe: Any, step: int, timestep: int, tensors: dict[str, Tensor]) -> None:
        tensors["latents"].zero_()

    changed = images_of(sd15, seed=7, num_inference_steps=2, callback_on_step_end=clear)
    returned = images_of(
        sd15,
        seed=7,
        num_inference_steps=2,
        callback_on_step_end=lambda pipe, i, t, tensors: {"latents": torch.zeros_like(tensors["latents"])},
    )
    assert np.array_equal(changed, returned)


@pytest.mark.parametrize("names", [["latent"], ["latents", "noise_pred"], "latents"], ids=repr)
def test_unknown_callback_tensors_are_refused_with_the_known_ones(names: Any, sd15: Pipeline) -> None:
    """A misspelt tensor is found before the first step, not inside the callback."""
    calls: list[int] = []
    with pytest.raises(RequestError, match="latents, prompt_embeds"):
        sd15(
            PROMPT,
            callback_on_step_end=lambda pipe, i, t, tensors: calls.append(i),
            callback_on_step_end_tensor_inputs=names,
        )
    assert calls == []


def test_an_error_in_a_callback_comes_out_and_leaves_the_pipeline_usable(sd15: Pipeline) -> None:
    """The way to stop an image half-way."""

    class StopError(Exception):
        pass

    def stop(*_: Any) -> None:
        raise StopError

    expected = images_of(sd15, seed=1, num_inference_steps=4)
    with pytest.raises(StopError):
        sd15(PROMPT, seed=1, num_inference_steps=4, callback_on_step_end=stop)
    assert np.array_equal(images_of(sd15, seed=1, num_inference_steps=4), expected)


# Too little memory


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_decoder"])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has 9 MiB free."),
        RuntimeError("CUDA error: out of memory\nGPU 0 has 9 MiB free."),  # torch's, of pinned memory
    ],
    ids=["device", "pinned"],
)
def test_too_little_device_memory_is_one_line_of_what_to_do(
    component: str, error: RuntimeError, sd15_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the size, torch's words and the remedy; a smaller call succeeds."""
    pipe, engines = counting_pipe(sd15_bundle, "null")

    def refuse(feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        raise error

    monkeypatch.setattr(engines[component], "run", refuse)
    with pytest.raises(EngineError, match=r"^out of device memory, generating 3 of 64x64") as caught:
        pipe(PROMPT, num_images_per_prompt=3)
    message = str(caught.value)
    assert "\n" not in message
    for part in ("CUDA", "GPU 0 has 9 MiB free", "smaller images or fewer at a time", "free the device"):
        assert part in message
    assert caught.value.__cause__ is error
    monkeypatch.undo()
    assert len(pipe(PROMPT).images) == 1


@pytest.mark.parametrize(
    ("component", "doing", "call"),
    [
        ("text_encoder", "encoding prompts", lambda pipe: pipe.encode_prompt(["a prompt of its own"])),
        ("vae_decoder", "decoding latents", lambda pipe: pipe.decode(torch.zeros(1, 4, 8, 8))),
    ],
)
def test_single_stages_say_what_did_not_fit(
    component: str, doing: str, call: Any, sd15_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parts of a pipeline that callers run by themselves."""
    pipe, engines = counting_pipe(sd15_bundle, "null")

    def refuse(feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(engines[component], "run", refuse)
    with pytest.raises(EngineError, match=rf"^out of device memory, {doing} \(CUDA out of memory.*free the device$"):
        call(pipe)


def test_other_errors_are_not_taken_for_too_little_memory(sd15_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come out as they are."""
    pipe, engines = counting_pipe(sd15_bundle, "null")
    error = RuntimeError("CUDA error: an illegal memory access was encountered")

    def fail(feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        raise error

    monkeypatch.setattr(engines["unet"], "run", fail)
    with pytest.raises(RuntimeError) as caught:
        pipe(PROMPT)
    assert caught.value is error


# How often each network runs


@FAMILIES
@pytest.mark.parametrize("steps", [1, 2, 8])
@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_without_guidance_the_unet_runs_once_a_step_with_one_row(
    family: str, steps: int, guidance: float, request: pytest.FixtureRequest
) -> None:
    """The cost that Hyper-SD is about: a step is one row through the UNet, and nothing runs twice."""
    pipe, engines = counting_pipe(request.getfixturevalue(f"{family}_bundle"))
    pipe(PROMPT, num_inference_steps=steps, guidance_scale=guidance, negative_prompt="red dog", seed=0)
    assert engines["unet"].rows == [1] * steps
    assert engines["unet"].timesteps == pipe.sampler.timesteps(steps)
    assert engines["vae_decoder"].rows == [1]
    assert engines["vae_encoder"].rows == []
    for name in set(engines) - {"unet", "vae_decoder", "vae_encoder"}:
        assert engines[name].rows == [1], "the negative prompt has no effect, so it is not encoded"


@FAMILIES
def test_a_fixed_batch_of_one_serves_any_number_of_images(family: str, request: pytest.FixtureRequest) -> None:
    """One UNet row a step and image, two with guidance; each prompt is encoded once, however many images it has."""
    pipe, engines = counting_pipe(request.getfixturevalue(f"{family}_bundle"))
    arguments: Any = {"num_inference_steps": 2, "num_images_per_prompt": 3, "seed": 0}
    pipe([PROMPT, "blue dog"], guidance_scale=0.0, **arguments)
    assert engines["unet"].rows == [1] * (2 * 6)
    assert engines["vae_decoder"].rows == [1] * 6
    assert engines["text_encoder"].rows == [1] * 2
    for engine in engines.values():
        engine.rows.clear()
    pipe([PROMPT, "blue dog"], guidance_scale=2.0, **arguments)
    assert engines["unet"].rows == [1] * (2 * 2 * 6)
    zeroed = family == "sdxl"  # SDXL's missing negative prompt is zeros and needs no encoder
    assert engines["text_encoder"].rows == ([] if zeroed else [1]), "the prompts are known, the empty text is not"


def test_a_ranged_batch_is_used(sdxl_dynamic_bundle: Path) -> None:
    """A bundle of one or two images makes two guided images in one UNet run a step: four rows."""
    pipe, engines = counting_pipe(sdxl_dynamic_bundle, "null")
    arguments: Any = {"num_inference_steps": 8, "seed": 0, "output_type": "np"}
    for count, guidance, rows in [(1, 1.0, [1]), (1, 5.0, [2]), (2, 1.0, [2]), (2, 5.0, [4]), (3, 1.0, None)]:
        for engine in engines.values():
            engine.rows.clear()
        images = pipe(PROMPT, num_images_per_prompt=count, guidance_scale=guidance, **arguments).images
        assert images.shape == (count, 64, 64, 3)
        if rows is not None:
            assert engines["unet"].rows == rows * 8
            assert engines["vae_decoder"].rows == [count]
        assert sum(engines["unet"].rows) == 8 * count * (2 if guidance > 1 else 1)


# Backends


@FAMILIES
def test_null_engines_run_the_loop_and_count(family: str, request: pytest.FixtureRequest) -> None:
    """The loop without networks: grey images, checked inputs, and how often each engine was run."""
    pipe = null_pipe(request.getfixturevalue(f"{family}_bundle"))
    output = pipe([PROMPT, "blue dog"], num_inference_steps=4, seed=0)
    assert [image.size for image in output.images] == [(64, 64)] * 2
    assert {image.getpixel((9, 9)) for image in output.images} == {(128, 128, 128)}
    engines = {name: engine for name, engine in pipe.engines.items() if isinstance(engine, NullEngine)}
    assert engines.keys() == pipe.engines.keys()
    assert engines["unet"].runs == 8
    assert engines["vae_decoder"].runs == 2
    assert engines["text_encoder"].runs == 2
    with pytest.raises(EngineError, match="expected the inputs"):
        engines["unet"].run({})


def load_narrow(root: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    """A bundle loaded with "TensorRT engines" that take what ``manifest`` says; they compute nothing."""
    choice = Choice(backend="tensorrt", target="tensorrt-10.16_h64", manifest=manifest, passed_over={})
    monkeypatch.setattr(module, "choose", lambda *_: choice)
    engines = {name: NullEngine(name, component) for name, component in manifest.components.items()}
    monkeypatch.setattr(module, "load_choice", lambda *_: engines)
    return Pipeline.load(root, "tensorrt")


def test_engines_narrower_than_their_bundle_say_what_else_to_take(
    sdxl_dynamic_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another export would not help where the bundle has the size, and other engines not where it has not."""
    wide = Bundle.load(sdxl_dynamic_bundle).manifest
    fixed = {name: Range(name=name, min=n, opt=n, max=n) for name, n in (("batch", 1), ("height", 64), ("width", 64))}
    pipe = load_narrow(sdxl_dynamic_bundle, narrowed(wide, ImageShapes(**fixed)), monkeypatch)
    assert pipe(PROMPT, seed=0, num_inference_steps=8).images[0].size == (64, 64)
    with pytest.raises(RequestError) as caught:
        pipe(PROMPT, height=96)
    message = str(caught.value)
    assert message.startswith("height 96 is outside what the engines tensorrt-10.16_h64 were built for (64): ")
    for part in ("--target", "`hypersd build`", "--backend onnxruntime"):
        assert part in message
    assert "export" not in message
    assert "\n" not in message
    with pytest.raises(RequestError, match=r"width 128 is outside this bundle's 64\.\.96: export"):
        pipe(PROMPT, width=128)


def test_engines_as_wide_as_their_bundle_are_not_to_blame(sd15_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundle itself is of one size."""
    pipe = load_narrow(sd15_bundle, Bundle.load(sd15_bundle).manifest, monkeypatch)
    with pytest.raises(RequestError, match="height 96 is outside this bundle's 64: export one with another --size"):
        pipe(PROMPT, height=96)


@pytest.mark.parametrize("backend", ["", "tensor", "ONNXRuntime"])
def test_unknown_backends_are_refused(backend: str, sd15_bundle: Path) -> None:
    """The message names the backends that there are."""
    with pytest.raises(RequestError, match="auto, onnxruntime") as caught:
        Pipeline.load(sd15_bundle, backend=backend)
    assert "\n" not in str(caught.value)


def test_unknown_devices_are_refused(sd15_bundle: Path) -> None:
    """Likewise the devices."""
    with pytest.raises(RequestError, match="auto, cpu, cuda"):
        Pipeline.load(sd15_bundle, device="tpu")


# Threads


@FAMILIES
def test_threads_share_a_pipeline_and_draw_what_they_draw_alone(family: str, pipes: dict[str, Pipeline]) -> None:
    """A service answers several users with one pipeline: each gets the very bytes that it would get alone."""
    pipe = pipes[family]
    calls: list[dict[str, Any]] = [
        {"prompt": PROMPT, "seed": 1, "num_inference_steps": 4},
        {"prompt": "blue dog", "seed": 2, "num_inference_steps": 2, "guidance_scale": 3.0},
        {"prompt": ["red cat", "the dog"], "seed": 3, "num_inference_steps": 1},
        {"prompt": "", "seed": [4, 5], "num_images_per_prompt": 2, "num_inference_steps": 3, "eta": 0.3},
    ]
    alone = [[image.tobytes() for image in pipe(**call).images] for call in calls]
    barrier = threading.Barrier(len(calls))

    def work(i: int) -> list[list[bytes]]:
        barrier.wait(60)
        return [[image.tobytes() for image in pipe(**calls[i]).images] for _ in range(6)]

    with ThreadPoolExecutor(len(calls)) as pool:
        for i, results in enumerate(pool.map(work, range(len(calls)))):
            assert results == [alone[i]] * 6


# Any number of rows through an engine of a certain batch


class Fake:
    """y [B, 2] = 10 x [B, 2] + timestep, in a buffer that every run overwrites, as the real engines do."""

    def __init__(self, least: int, most: int) -> None:
        batch = least if least == most else Range(name="batch", min=least, opt=least, max=most)
        spec = TensorSpec(dtype="float32", shape=(batch, 2))
        self.inputs = {"timestep": TensorSpec(dtype="float32", shape=(1,)), "x": spec, "z": spec}
        self.outputs = {"y": spec, "w": spec}
        self.device = torch.device("cpu")
        self.capturable = False
        self.least, self.most = least, most
        self.batches: list[int] = []
        self.buffers: dict[tuple[str, int], Tensor] = {}

    def run(self, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        x, rows = feeds["x"], len(feeds["x"])
        assert self.least <= rows <= self.most
        assert feeds["z"].shape == x.shape
        assert feeds["timestep"].shape == (1,)
        assert all(tensor.is_contiguous() for tensor in feeds.values())
        self.batches.append(rows)
        for name, value in (("y", 10 * x + feeds["timestep"]), ("w", feeds["z"] - x)):
            self.buffers.setdefault((name, rows), torch.empty(rows, 2)).copy_(value)
        return {name: self.buffers[name, rows] for name in ("y", "w")}


def run_fake(least: int, most: int, rows: int) -> Fake:
    """Run ``rows`` distinct rows, check every one, and return the engine."""
    engine = Fake(least, most)
    x = torch.arange(2.0 * rows).reshape(rows, 2)
    outputs = run_rows(engine, {"timestep": torch.tensor([0.5]), "x": x, "z": x * x})
    assert torch.equal(outputs["y"], 10 * x + 0.5)
    assert torch.equal(outputs["w"], x * x - x)
    return engine


@pytest.mark.parametrize(
    ("least", "most", "rows", "batches"),
    [
        (1, 1, 1, [1]),
        (1, 1, 3, [1, 1, 1]),
        (3, 3, 1, [3]),
        (3, 3, 3, [3]),
        (3, 3, 4, [3, 3]),
        (3, 3, 6, [3, 3]),
        (2, 4, 1, [2]),
        (2, 4, 2, [2]),
        (2, 4, 3, [3]),
        (2, 4, 4, [4]),
        (2, 4, 5, [4, 2]),
        (2, 4, 7, [4, 3]),
        (2, 4, 9, [4, 4, 2]),
    ],
)
def test_rows_are_run_in_the_batches_that_the_engine_takes(
    least: int, most: int, rows: int, batches: Sequence[int]
) -> None:
    """As few runs as the range allows; rows too few for the engine are padded, and the padding does not come out."""
    assert run_fake(least, most, rows).batches == list(batches)


@given(least=st.integers(1, 5), more=st.integers(0, 4), rows=st.integers(1, 23))
def test_any_number_of_rows_comes_out_right(least: int, more: int, rows: int) -> None:
    """Every row is that of its input, whatever the range, in the smallest number of runs."""
    most = least + more
    assert len(run_fake(least, most, rows).batches) == -(-rows // most)


def test_a_bundle_of_an_unknown_sampler_is_rejected(sd15_bundle: Path, copy_bundle) -> None:
    """The message names the samplers that there are."""
    with pytest.raises(
        BundleError, match=r"'euler' is not known: expected ddim or tcd or lcm; export the bundle again"
    ):
        Pipeline.load(copy_bundle(sd15_bundle, kind="euler").root)
