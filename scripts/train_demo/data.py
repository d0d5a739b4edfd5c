"""The training data: scenes drawn and described once, and kept as arrays in the work folder."""

from __future__ import annotations

import functools
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from .scenes import SIZE, Scene, describe, draw_scene, render, without_place

SCENES = 60_000
HELD_BACK_SEED = 20_000_000  # the first of those that the prompts to be judged are looked for among


def make_images(work: Path) -> None:
    """Draw the training images: ``images.npy``, uint8 [SCENES, SIZE, SIZE, 3], and ``captions.json``."""
    images = np.lib.format.open_memmap(work / "images.partial.npy", "w+", dtype=np.uint8, shape=(SCENES, SIZE, SIZE, 3))
    captions = []
    for index in range(SCENES):
        rng = np.random.default_rng(index)
        scene = draw_scene(rng)
        captions.append(describe(scene, rng))
        images[index] = render(scene, rng)
    images.flush()
    (work / "captions.json").write_text(json.dumps(captions))
    os.replace(work / "images.partial.npy", work / "images.npy")


def load_images(work: Path) -> np.ndarray:
    return np.load(work / "images.npy", mmap_mode="r")


def load_captions(work: Path) -> list[str]:
    return json.loads((work / "captions.json").read_text())


def scene_of(index: int) -> Scene:
    """The scene of a training image."""
    return draw_scene(np.random.default_rng(index))


@functools.cache
def seen() -> frozenset[Scene]:
    """Every scene of the training images, jitter apart."""
    return frozenset(map(scene_of, range(SCENES)))


def unseen_scenes(things: int) -> Iterator[tuple[Scene, np.random.Generator]]:
    """Scenes of so many things that no training has seen, each with the generator that drew it."""
    for index in itertools.count(HELD_BACK_SEED):
        rng = np.random.default_rng(index)
        scene = draw_scene(rng)
        if len(scene.things) == things and scene not in seen():
            yield scene, rng


def held_back(count: int) -> list[tuple[Scene, str]]:
    """Unseen scenes of one and of two things in turn, and prompts; the seed of each one's noise is its place here."""
    pairs = zip(unseen_scenes(1), unseen_scenes(2), strict=True)
    return [
        (scene, describe(scene, rng)) for scene, rng in itertools.islice(itertools.chain.from_iterable(pairs), count)
    ]


def held_back_for_edges(count: int) -> list[tuple[Scene, str]]:
    """Unseen scenes of one thing away from the middle, and prompts that leave to the edges where and how large."""
    aside = (pair for pair in unseen_scenes(1) if pair[0].things[0].place != "centre")
    return [(scene, describe(without_place(scene), rng)) for scene, rng in itertools.islice(aside, count)]


def to_samples(images: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, 3] to float32 [N, 3, H, W] in -1..1."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
