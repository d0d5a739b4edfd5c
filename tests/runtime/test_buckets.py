"""Batches of graphs: padded to a few sizes, with the images of the batch itself, to the bit.

Recording is a stand-in here (tests/capture_stand_in.py), and the engines run on the CPU row by row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from capture_stand_in import Capturable, StandInCapture
from counting import load_engines
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hypersd import Pipeline
from hypersd.engines import Bundle
from hypersd.engines.cuda.graphs import WARM_UPS
from hypersd.engines.specs import Range
from hypersd.errors import DeviceMemoryError, EngineError
from hypersd.runtime.buckets import bucket, buckets
from hypersd.runtime.image_function import ImageFunction
from hypersd.runtime.params import Params
from hypersd.runtime.runner import KEPT_GRAPHS
from hypersd.runtime.text import load_tokenizers
from hypersd.serve import calls

PROMPTS = ["a photo of a cat", "blue dog", "", "red cat", "green", "two", "a", "dog", "photo"]


def make_pipes(root: Path, largest: int) -> tuple[Pipeline, Pipeline, StandInCapture]:
    """A pipeline that records and pads, one that does neither, and the stand-in that counts."""
    bundle = Bundle.load(root)
    batch = Range(name="batch", min=1, opt=1, max=largest)
    shapes = msgspec.structs.replace(bundle.manifest.shapes, batch=batch)
    manifest = msgspec.structs.replace(bundle.manifest, shapes=shapes)
    engines, tokenizers = load_engines(bundle, "onnxruntime", "cpu"), load_tokenizers(bundle)
    capturable = {name: Capturable(engine) for name, engine in engines.items()}
    capture = StandInCapture()
    plain = Pipeline(manifest, engines, tokenizers, capture=None)
    return Pipeline(manifest, capturable, tokenizers, capture=capture), plain, capture


def assert_same(pipes: tuple[Pipeline, Pipeline], images: int, **words: Any) -> None:
    """Equal images for so many prompts, each with a seed of its own."""
    call = {"prompt": PROMPTS[:images], "seed": list(range(images)), "output_type": "np", **words}
    ours, theirs = (pipe(**call).images for pipe in pipes)
    assert ours.shape == theirs.shape == (images, 64, 64, 3)
    assert np.array_equal(ours, theirs), f"{images}, {words}"


@given(images=st.integers(1, 70), largest=st.integers(1, 70))
def test_a_bucket_is_no_smaller_than_the_batch_nor_larger_than_the_bundle(images: int, largest: int) -> None:
    """A warm-up of a bundle for 70 images leaves room for a second kind of call among the graphs that are kept."""
    rows = bucket(images, largest)
    assert images <= rows <= max(images, largest)
    assert rows < 2 * images
    assert (rows & (rows - 1)) == 0 or rows in (largest, images)
    assert len(buckets(min(images, largest), largest)) <= KEPT_GRAPHS // 2


@pytest.mark.parametrize(("family", "guidance"), [("sd15", 0.0), ("sdxl", 4.0)])
def test_batches_of_one_bucket_share_a_graph(family: str, guidance: float, request: pytest.FixtureRequest) -> None:
    """With and without guidance; the noise of later steps too is that of the batch."""
    graphed, plain, capture = make_pipes(request.getfixturevalue(f"{family}_bundle"), largest=4)
    words = {"num_inference_steps": 2, "eta": 1.0, "guidance_scale": guidance}
    for images in (3, 4, 3):
        assert_same((graphed, plain), images, **words)
    assert_same((graphed, plain), 3, **words, negative_prompt=["red", "", "dog"])
    assert capture.image_captures == 1
    assert_same((graphed, plain), 5)  # more than the bundle takes at once: in its own size


def test_a_bundle_for_fewer_than_a_bucket_is_its_own_bucket(sd15_bundle: Path) -> None:
    """Of a bundle for three, two and three images run in their size; a first batch of one is not padded."""
    graphed, plain, _ = make_pipes(sd15_bundle, largest=3)
    assert graphed.graph_batches(3) == [1, 2, 3]
    assert graphed.graph_batches(2) == [1, 2]
    assert plain.graph_batches(3) == []


def test_init_images_and_masks_of_each_prompt_are_padded(sd15_bundle: Path) -> None:
    """One for all images, or one for each prompt, which makes two images each: rows for each image then."""
    *pipes, capture = make_pipes(sd15_bundle, largest=8)
    images = [Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5 + i), 20).convert("RGB") for i in range(3)]
    words = {"num_inference_steps": 2, "strength": 0.5, "num_images_per_prompt": 2, "output_type": "np"}
    for seed in (7, list(range(6))):
        for _ in range(WARM_UPS + 1):
            for image, mask in ((images, None), (images[0], Image.linear_gradient("L"))):
                call = {"prompt": PROMPTS[:3], "seed": seed, "image": image, "mask_image": mask, **words}
                ours, theirs = (pipe(**call).images for pipe in pipes)
                assert np.array_equal(ours, theirs)
    assert capture.image_captures >= 2


def test_a_service_records_every_batch_before_it_is_ready(sd15_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first batch of any size is a replay."""
    graphed, _, capture = make_pipes(sd15_bundle, largest=8)
    monkeypatch.setattr(calls, "images_at_once", lambda pipe: pipe.manifest.shapes.batch.max)  # as on a GPU
    calls.warm_up(graphed, 4)
    assert capture.image_captures == 3
    for images in (1, 2, 3, 4):
        replays = capture.image_replays
        graphed(PROMPTS[:images], seed=list(range(images)))
        assert capture.image_replays == replays + 1
    assert capture.image_captures == 3
    assert graphed.recorded_graphs == [True] * 3


def test_a_warm_up_ends_at_the_first_batch_without_memory(
    sd15_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The service starts, and generates such batches image by image; one image must fit. The full device is a fake."""
    pipe, _, _ = make_pipes(sd15_bundle, largest=8)
    tried: list[int] = []
    monkeypatch.setattr(calls, "images_at_once", lambda pipe: 8)
    for fitting in (2, 0):

        def generate(params: Params, fitting: int = fitting) -> None:
            tried.append(params.num_images_per_prompt)
            if params.num_images_per_prompt > fitting:
                raise DeviceMemoryError("out of device memory,\ngenerating")

        monkeypatch.setattr(pipe, "generate", generate)
        if fitting:
            calls.warm_up(pipe)
        else:
            with pytest.raises(DeviceMemoryError):
                calls.warm_up(pipe)
    assert tried == [1, 1, 1, 2, 2, 2, 4, 1]
    (record,) = caplog.records
    assert record.getMessage().startswith("no memory for 4 images at once")
    assert "--max-batch 2 (" in record.getMessage()
    assert "\n" not in record.getMessage()


@pytest.fixture
def rows_run(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every run of a whole image."""
    rows: list[int] = []
    generate = ImageFunction.generate

    def watched(self: ImageFunction, settings: Any, inputs: Any) -> Any:
        rows.append(len(inputs["latents"]))
        return generate(self, settings, inputs)

    monkeypatch.setattr(ImageFunction, "generate", watched)
    return rows


def test_a_batch_that_fits_without_added_rows_is_generated(
    sd15_bundle: Path, rows_run: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory for three images and not for four, which is a fake; the noise is drawn once."""
    generate = ImageFunction.generate

    def in_little_memory(self: ImageFunction, settings: Any, inputs: Any) -> Any:
        outputs = generate(self, settings, inputs)
        if len(inputs["latents"]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return outputs

    monkeypatch.setattr(ImageFunction, "generate", in_little_memory)
    graphed, plain, _ = make_pipes(sd15_bundle, largest=4)
    assert_same((graphed, plain), 3, num_inference_steps=2, eta=1.0)
    assert rows_run == [4, 3]
    with pytest.raises(DeviceMemoryError, match="generating 4 of 64x64"):
        graphed(PROMPTS[:4])


@pytest.mark.filterwarnings("ignore::hypersd.engines.cuda.graphs.GraphWarning")
def test_rows_are_not_added_where_nothing_can_be_recorded(
    sd15_bundle: Path, rows_run: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would cost time at every call."""

    def fail(*_: Any) -> Any:
        raise EngineError("CUDA graph: recording failed")

    monkeypatch.setattr(StandInCapture, "__call__", fail)
    graphed, plain, _ = make_pipes(sd15_bundle, largest=4)
    for _ in range(WARM_UPS + 1):
        assert_same((graphed, plain), 3)
    assert set(rows_run) == {4}
    rows_run.clear()
    assert_same((graphed, plain), 3)
    assert rows_run == [3]
