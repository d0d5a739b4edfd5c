"""Scenes that no training of the demonstration has seen, and their prompts.

The first call takes seconds, since it draws the scenes of all trainings: call it in a test and not at import.
"""

from __future__ import annotations

import functools

from train_demo.data import held_back
from train_demo.scenes import Scene


@functools.cache
def scenes(count: int) -> tuple[Scene, ...]:
    return tuple(scene for scene, _ in held_back(count))


@functools.cache
def captions(count: int) -> tuple[str, ...]:
    return tuple(caption for _, caption in held_back(count))
