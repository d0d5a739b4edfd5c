"""Control images: preprocessed, and made into the tensors that ControlNets take."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import RequestError
from ..samplers.numbers import real_number
from .image_files import fit, to_rgb

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


def to_condition(image: Any, width: int, height: int, resize_mode: str = "crop") -> Tensor:
    """Control images as a ControlNet takes them: float32 [N, 3, height, width] in 0..1.

    Args:
        image: a ``PIL.Image`` of any size and mode; or of the output size an array [H, W, 3] or [N, H, W, 3] or
            a tensor [3, H, W] or [N, 3, H, W], floats in 0..1; or a list of some of one kind.
        width: of the output, in pixels.
        height: likewise.
        resize_mode: see :func:`fit`; of no meaning for arrays and tensors.

    Raises:
        RequestError: it is nothing of the kind, or of another size.
    """
    if isinstance(image, (list, tuple)):
        if not image:
            raise RequestError("image: an empty list: expected a control image")
        return torch.cat([to_condition(one, width, height, resize_mode) for one in image])
    if isinstance(image, Image.Image):
        pixels = np.asarray(fit(to_rgb(image), width, height, resize_mode))
        rows = np.ascontiguousarray(pixels.transpose(2, 0, 1), np.float32)
        return torch.from_numpy(rows / 255.0).unsqueeze(0)
    if isinstance(image, np.ndarray):
        if image.ndim not in (3, 4) or image.dtype.kind != "f":
            raise RequestError(f"image: an array {image.dtype}{list(image.shape)}: expected floats [H, W, 3] in 0..1")
        rows = torch.from_numpy(np.array(image, np.float32))  # a copy: torch takes no array that is mirrored or locked
        return _checked((rows if rows.ndim == 4 else rows[None]).permute(0, 3, 1, 2), width, height)
    if isinstance(image, Tensor):
        if image.ndim not in (3, 4) or not image.is_floating_point():
            raise RequestError(f"image: a tensor {image.dtype}{list(image.shape)}: expected floats [3, H, W] in 0..1")
        return _checked((image if image.ndim == 4 else image[None]).detach(), width, height)
    raise RequestError(f"image: {type(image).__name__}: expected a PIL image, an array, a tensor or a list of them")


def _checked(pixels: Tensor, width: int, height: int) -> Tensor:
    """Floats [N, C, H, W], if they are images of the output size."""
    if not len(pixels):
        raise RequestError("image: no images in it: expected one, or one for each prompt")
    if tuple(pixels.shape[1:]) != (3, height, width):
        raise RequestError(
            f"image: {pixels.shape[1]} channels of {pixels.shape[3]}x{pixels.shape[2]} pixels: expected 3 of "
            f"{width}x{height}, the output size; a PIL image is resized"
        )
    pixels = pixels.float().contiguous()
    least, most = (float(end) for end in pixels.aminmax())
    if not (least >= -1 and most <= 1):  # inpainting ControlNets mark pixels to repaint with -1; nan is rejected
        raise RequestError(f"image: values from {least:g} to {most:g}: expected floats in 0..1")
    return pixels
