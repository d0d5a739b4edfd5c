"""Frames that are so much like the last one that its image can be given again."""

from __future__ import annotations

import random

import numpy as np

from ..errors import RequestError
from ..samplers.numbers import real_number

MOST_SKIPPED = 10  # in a row


class SimilarFrames:
    """Decides which frames to skip: the SimilarImageFilter of StreamDiffusion (arXiv 2312.12491, section 3.5).

    A frame is compared with the last one that was not skipped, by the cosine of the angle between their pixels in
    -1..1. It is skipped with the probability ``1 - (1 - cosine) / (1 - threshold)``, so that a slow change does not
    stall and then jump. After ten skipped frames in a row one is generated. Here the count starts again with every
    frame that is generated, and the random numbers come from the seed.

    Args:
        threshold: cosine from which on a frame may be skipped, 0 to below 1.
        seed: of the random numbers.

    Raises:
        RequestError: the threshold is out of range.
    """

    def __init__(self, threshold: float, seed: int) -> None:
        self._threshold = real_number("skip_similar", threshold, 0.0, 1.0)
        if self._threshold == 1.0:
            raise RequestError("skip_similar 1: expected a number below 1, such as 0.98; leave it out to skip nothing")
        self._random = random.Random(seed)
        self._last: np.ndarray | None = None
        self._skipped = 0

    def skips(self, pixels: np.ndarray) -> bool:
        """Whether to skip the next frame; ``pixels`` are its values in -1..1, of any shape."""
        vector = np.ascontiguousarray(pixels, np.float32).reshape(-1)
        draw = self._random.random()  # for every frame: a forced one does not shift the numbers of the next
        if self._last is not None and self._last.size == vector.size and self._skipped < MOST_SKIPPED:
            probability = 1 - (1 - cosine(self._last, vector)) / (1 - self._threshold)
            if draw < probability:
                self._skipped += 1
                return True
        self._last, self._skipped = vector, 0
        return False

    def forget(self) -> None:
        """Generate the next frame, whatever it is like."""
        self._last = None


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    """The cosine of the angle between two vectors; 0 if one of them has no length."""
    product = float(np.linalg.norm(first)) * float(np.linalg.norm(second))
    return float(np.dot(first, second)) / product if product > 1e-6 else 0.0
