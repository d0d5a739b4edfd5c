"""Batches of graphs: padded to a few sizes, with the images of the batch itself, to the bit.

Recording is a stand-in here (tests/capture_stand_in.py), and the engines run on the CPU row by row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from capture_stand_in import Capturable, StandInCapture
from counting import load_engines
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hypersd import Pipeline
from hypersd.engines import Bundle
from hypersd.engines.cuda.graphs import WARM_UPS
from hypersd.engines.specs import Range
from hypersd.runtime.buckets import SIZES, bucket, buckets
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


@given(images=st.integers(1, 40), largest=st.integers(1, 40))
def test_a_bucket_is_no_smaller_than_the_batch_nor_larger_than_the_bundle(images: int, largest: int) -> None:
    rows = bucket(images, largest)
    assert images <= rows <= max(images, largest)
    assert rows in (*SIZES, largest, images)
    assert len(buckets(min(largest, SIZES[-1]), largest)) <= len(SIZES)
    if images <= min(largest, SIZES[-1]):
        assert rows < 2 * images or rows == 1


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
