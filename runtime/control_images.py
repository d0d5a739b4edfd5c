"""Control images, preprocessed."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

from ..errors import RequestError
from ..samplers.numbers import real_number

CANNY_THRESHOLDS = 100, 200
LARGEST_THRESHOLD = 10_000  # gradients of 8-bit images end far below


def canny(image: Image.Image, low: float = CANNY_THRESHOLDS[0], high: float = CANNY_THRESHOLDS[1]) -> Image.Image:
    """The edges of an image, white on black (Canny, "A Computational Approach to Edge Detection", 1986).

    Args:
        image: an RGB image.
        low: gradient from which on a pixel beside an edge belongs to it.
        high: gradient from which on a pixel is an edge by itself.

    Raises:
        RequestError: OpenCV is missing, or the thresholds are out of order.
    """
    check_thresholds(low, high)
    check_opencv()
    import cv2

    return Image.fromarray(cv2.Canny(np.asarray(image), low, high)).convert("RGB")


def check_opencv() -> None:
    """Check that OpenCV, which an extra installs, is there.

    Raises:
        RequestError: it is missing.
    """
    try:
        import cv2  # noqa: F401
    except ImportError as error:
        raise RequestError("Canny's edges need OpenCV: pip install -e '.[control]' in hypersd's clone") from error


def check_thresholds(low: float, high: float) -> None:
    """Check two thresholds: OpenCV would swap them silently, and accept nan."""
    ends = [real_number("Canny threshold", number, 0, LARGEST_THRESHOLD) for number in (low, high)]
    if ends[0] > ends[1]:
        raise RequestError(f"Canny thresholds {low:g} and {high:g}: expected the lower one first")


def scribble(image: Image.Image) -> Image.Image:
    """Dark lines on white made light lines on black, with which scribble ControlNets were trained."""
    return ImageOps.invert(image)


def preprocess(image: Image.Image, kind: str, thresholds: tuple[float, float] = CANNY_THRESHOLDS) -> Image.Image:
    """The control image made from an RGB image of the output size; resized later, its edges would blur.

    Args:
        image: an RGB image.
        kind: ``"canny"``, ``"scribble"`` or ``"none"``.
        thresholds: those of :func:`canny`.

    Raises:
        RequestError: the kind is not known, or OpenCV is missing.
    """
    if kind == "canny":
        return canny(image, *thresholds)
    if kind == "scribble":
        return scribble(image)
    if kind == "none":
        return image
    raise RequestError(f"preprocess {kind!r} is not known: expected canny, scribble or none")
