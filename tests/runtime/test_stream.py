"""Streams: an image for each frame, in order, beside the caller's own work.

A stand-in for the pipeline shows the threads; the images themselves are those of single calls of a real one.
"""

from __future__ import annotations

import gc
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from frame_pipe import SIZE, FramePipe, stream_threads
from PIL import Image

from hypersd import Pipeline
from hypersd.errors import RequestError
from hypersd.runtime.control_images import canny
from hypersd.runtime.image_files import fit
from hypersd.runtime.params import Params
from hypersd.runtime.similar_frames import MOST_SKIPPED, SimilarFrames
from hypersd.runtime.stream import Stream

WAIT = 20.0  # seconds after which a thread is taken for stuck


def frame(value: int) -> Image.Image:
    return Image.new("RGB", (SIZE, SIZE), (value, value, value))


def value(image: Image.Image) -> int:
    return int(np.asarray(image)[0, 0, 0])


def stream(frames: Any, begin: Callable[[Params], None] = lambda params: None, **words: Any) -> Stream:
    options = {name: words.pop(name) for name in ("control", "skip_similar", "look_ahead") if name in words}
    pipe: Any = FramePipe(begin)
    return Stream(pipe, frames, Params(**{"prompt": "a cat", "seed": 1, **words}), **options)


def calls_of(images: Stream) -> list[Params]:
    pipe: Any = images._pipe
    return pipe.calls


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@pytest.fixture(autouse=True)
def no_threads_stay() -> Iterator[None]:
    yield
    wait_until(lambda: not stream_threads())


def test_images_come_in_order_one_for_each_frame() -> None:
    with stream(map(frame, range(0, 60, 2)), look_ahead=3) as images:
        assert [value(image) for image in images] == list(range(0, 60, 2))
    assert images.given == 30
    assert next(images, None) is None, "an ended stream stays ended"


def test_the_next_image_is_generated_while_the_caller_handles_the_last_one() -> None:
    """And no more than that is read or generated."""
    read, generated = [], [threading.Event() for _ in range(5)]

    def frames() -> Iterator[Image.Image]:
        for i in range(5):
            read.append(i)
            yield frame(i)

    pipe = stream(frames(), lambda params: generated[value(params.image)].set())
    for i, _ in enumerate(pipe):
        if i < 4:
            assert generated[i + 1].wait(WAIT)
        time.sleep(0.02)
        assert len(read) <= i + 2


def test_a_frame_is_read_while_another_is_generated() -> None:
    is_read = threading.Event()

    def frames() -> Iterator[Image.Image]:
        yield frame(2)
        is_read.set()
        yield frame(4)

    def begin(params: Params) -> None:
        assert is_read.wait(WAIT)

    assert [value(image) for image in stream(frames(), begin)] == [2, 4]


def test_two_images_ahead_are_generated_side_by_side() -> None:
    both = threading.Barrier(2, timeout=WAIT)
    assert len(list(stream(map(frame, range(6)), lambda params: both.wait() and None, look_ahead=2))) == 6


def test_memory_is_constant() -> None:
    frames: list[weakref.ref[Image.Image]] = []

    def source() -> Iterator[Image.Image]:
        for i in range(100):
            made = frame(i)
            frames.append(weakref.ref(made))
            yield made

    most = 0
    for _ in stream(source(), skip_similar=0.5):
        most = max(most, sum(reference() is not None for reference in frames))
    assert most <= 3


def test_params_change_while_it_runs() -> None:
    """At most ``look_ahead`` images come before the change; frames keep the seed until it is changed."""
    pipe = stream(map(frame, range(9)), strength=0.5)
    for i, _ in enumerate(pipe):
        if i == 2:
            pipe.update(prompt="a dog", strength=0.75, seed=5)
    calls = calls_of(pipe)
    assert [(call.prompt, call.strength, call.seed) for call in calls[:3]] == [("a cat", 0.5, 1)] * 3
    assert [(call.prompt, call.strength, call.seed) for call in calls[4:]] == [("a dog", 0.75, 5)] * 5
    assert pipe.params.prompt == "a dog"


def test_a_wrong_change_changes_nothing() -> None:
    with stream(map(frame, range(9)), strength=0.5) as pipe:
        with pytest.raises(RequestError, match="strength 2"):
            pipe.update(prompt="a dog", strength=2.0)
        with pytest.raises(RequestError, match="width cannot change within a stream"):
            pipe.update(width=8)
        assert (pipe.params.prompt, pipe.params.strength) == ("a cat", 0.5)
        pipe.update(seed=None)
        assert pipe.seed == 1


def test_a_stream_without_a_seed_draws_one_for_all_frames() -> None:
    pipe = stream(map(frame, range(5)), seed=None)
    list(pipe)
    assert {call.seed for call in calls_of(pipe)} == {pipe.seed}


def test_an_error_of_the_source_comes_after_the_images_before_it() -> None:
    def frames() -> Iterator[Image.Image]:
        yield from map(frame, (2, 4, 6))
        raise OSError("the camera has gone")

    pipe, values = stream(frames(), look_ahead=2), []
    with pytest.raises(OSError, match="the camera has gone"):
        for image in pipe:
            values.append(value(image))
    assert values == [2, 4, 6]
    assert next(pipe, None) is None


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (np.zeros((8, 8), np.uint8), r"uint8\[8, 8\]: expected \[H, W, 3\]"),
        (np.zeros((8, 8, 4), np.uint8), r"uint8\[8, 8, 4\]"),
        (Image.new("RGB", (3, 3)), "3x3"),
    ],
)
def test_a_wrong_frame_is_an_error_in_its_place(bad: Any, words: str) -> None:
    pipe = stream([frame(2), bad, frame(4)])
    assert value(next(pipe)) == 2
    with pytest.raises(RequestError, match=words):
        next(pipe)
    assert next(pipe, None) is None


def test_an_error_of_a_network_is_raised_in_its_place() -> None:
    def begin(params: Params) -> None:
        if value(params.image) == 4:
            raise RuntimeError("out of memory")

    pipe = stream(map(frame, (2, 4, 6)), begin)
    assert value(next(pipe)) == 2
    with pytest.raises(RuntimeError, match="out of memory"):
        next(pipe)


def test_arrays_of_a_camera_are_fitted_like_images() -> None:
    """uint8 of any size; floats go to the pipeline as they are."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
    pipe = stream([pixels, Image.fromarray(pixels)])
    first, second = pipe
    assert first.tobytes() == second.tobytes()
    assert first.size == (SIZE, SIZE)


def test_closing_ends_the_threads_of_a_source_that_waits() -> None:
    """The reader is not waited for: its thread ends when its read does."""
    goes_on = threading.Event()

    def frames() -> Iterator[Image.Image]:
        yield frame(2)
        goes_on.wait(WAIT)
        yield frame(4)

    pipe = stream(frames())
    next(pipe)
    began = time.monotonic()
    pipe.close()
    assert time.monotonic() - began < WAIT / 2
    assert next(pipe, None) is None
    goes_on.set()


def test_another_thread_may_close_a_stream_that_waits() -> None:
    goes_on = threading.Event()

    def frames() -> Iterator[Image.Image]:
        goes_on.wait(WAIT)
        yield frame(2)

    pipe = stream(frames())
    closing = threading.Timer(0.05, pipe.close)
    closing.start()
    assert list(pipe) == []
    closing.join()
    goes_on.set()


def test_a_stream_that_is_dropped_ends_its_threads() -> None:
    pipe = stream(map(frame, range(9)))
    next(pipe)
    assert stream_threads()
    del pipe
    gc.collect()
    wait_until(lambda: not stream_threads())


# Images


def test_images_are_those_of_single_calls(demo_canny_bundle: Path) -> None:
    """To the pixel: of any size, with two at a time, with a ControlNet that sees the frames, and after a change."""
    pipe, generator = Pipeline.load(demo_canny_bundle), np.random.default_rng(0)
    (name,) = pipe.manifest.controlnets
    frames = [Image.fromarray(generator.integers(0, 256, (90 + 8 * i, 130, 3), np.uint8)) for i in range(4)]
    floats = np.asarray(fit(frames[0], 96, 96), np.float32) / 255
    words: dict[str, Any] = {"strength": 0.5, "keep_steps": True, "seed": 3}
    with pipe.stream([*frames, floats], "a red circle", control=name, look_ahead=2, **words) as images:
        streamed = list(images)
    for source, image in zip([*frames, frames[0]], streamed, strict=True):
        edges = {name: canny(fit(source, 96, 96))}
        single = pipe("a red circle", image=source, control_image=edges, **words).images[0]
        assert image.tobytes() == single.tobytes()
    with pipe.stream(frames * 2, "a red circle", output_type="np", **words) as images:
        first = next(images)
        images.update(prompt="a green star", strength=0.75)
        last = list(images)[-1]
    assert np.array_equal(first, pipe("a red circle", image=frames[0], output_type="np", **words).images[0])
    words["strength"] = 0.75
    assert np.array_equal(last, pipe("a green star", image=frames[3], output_type="np", **words).images[0])


# Similar frames


def test_similar_frames_are_skipped_as_in_streamdiffusion() -> None:
    """Its SimilarImageFilter, with the same random numbers, on frames that change slowly."""
    generator = np.random.default_rng(0)
    frames = [generator.uniform(-1, 1, (8, 8, 3)).astype(np.float32)]
    for _ in range(200):
        frames.append(frames[-1] + generator.normal(0, 0.05, (8, 8, 3)).astype(np.float32))
    similar, draws, last, count, expected = SimilarFrames(0.9, seed=4), random.Random(4), None, 0, []
    for pixels in frames:
        draw, skips = draws.random(), False
        if last is not None:
            cosine = torch.nn.functional.cosine_similarity(*(torch.tensor(x).flatten() for x in (last, pixels)), dim=0)
            skips = draw < max(0.0, 1 - (1 - cosine.item()) / (1 - 0.9)) and count < MOST_SKIPPED
        last, count = (last, count + 1) if skips else (pixels, 0)
        expected.append(skips)
    assert [similar.skips(pixels) for pixels in frames] == expected
    assert 20 < sum(expected) < 180


def test_a_still_scene_is_generated_every_eleventh_frame() -> None:
    pipe = stream([frame(200)] * 23, skip_similar=0.98)
    images = list(pipe)
    assert (pipe.given, pipe.skipped, len(calls_of(pipe))) == (23, 20, 3)
    images[0].paste((255, 0, 0), (0, 0, SIZE, SIZE))
    assert {value(image) for image in images[1:]} == {200}, "a repeated image is the caller's own"


def test_a_change_of_params_is_seen_in_a_still_scene() -> None:
    pipe = stream([frame(200)] * 8, skip_similar=0.98)
    for i, _ in enumerate(pipe):
        if i == 1:
            pipe.update(prompt="a dog")
    assert [call.prompt for call in calls_of(pipe)] == ["a cat", "a dog"]


# Wrong words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"prompt": ["a", "b"]}, "2 images for each frame: a stream takes one prompt and makes one image"),
        ({"num_images_per_prompt": 3}, "3 images for each frame"),
        ({"generator": torch.Generator()}, "generator is not for a stream: give a seed"),
        ({"latents": torch.zeros(1)}, "latents is not for a stream"),
        ({"image": frame(0)}, "image is not for a stream: the frames are the images"),
        ({"padding_mask_crop": 8}, "padding_mask_crop is not for a stream"),
        ({"output_type": "latent"}, "output_type 'latent' is not for a stream: expected pil, np or pt"),
        ({"skip_similar": 1.0}, "skip_similar 1: expected a number below 1"),
        ({"skip_similar": float("nan")}, "skip_similar nan"),
        ({"look_ahead": 0}, "look_ahead 0"),
        ({"strength": 0.0}, "strength 0"),
        ({"control": "canny"}, "control 'canny': the bundle has no such ControlNet, it was exported without any"),
        ({"seed": [1]}, None),
    ],
)
def test_wrong_words_are_rejected_before_anything_is_read(words: dict[str, Any], message: str | None) -> None:
    def frames() -> Iterator[Image.Image]:
        raise AssertionError("was read")
        yield

    if message is None:
        stream(iter(()), **words).close()
        return
    with pytest.raises(RequestError, match=message.replace("(", r"\(")):
        stream(frames(), **words)
