"""Images that callers bring as tensors of the output size."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import RequestError
from .image_files import fit, to_rgb

CHANNELS = {"RGB": 3, "L": 1}


def to_tensor(
    image: Any, width: int, height: int, resize_mode: str = "crop", *, mode: str = "RGB", least: float = 0.0
) -> Tensor:
    """Images as rows of a tensor: float32 [N, 3, height, width] in 0..1, on the host.

    Args:
        image: a ``PIL.Image`` of any size and mode; or of the output size an array [H, W, 3] or [N, H, W, 3] or
            a tensor [3, H, W] or [N, 3, H, W], floats in 0..1; or a list of some of one kind.
        width: of the output, in pixels.
        height: likewise.
        resize_mode: see :func:`.image_files.fit`; of no meaning for arrays and tensors.
        mode: ``"RGB"``, or ``"L"`` for one channel; arrays and tensors [H, W] are accepted then, too.
        least: the smallest value that arrays and tensors may have.

    Raises:
        RequestError: it is nothing of the kind, or of another size.
    """
    if isinstance(image, (list, tuple)):
        if not image:
            raise RequestError("image: an empty list: expected an image, or one for each prompt")
        rows = [to_tensor(one, width, height, resize_mode, mode=mode, least=least) for one in image]
        return torch.cat(rows)
    if isinstance(image, Image.Image):
        return from_bytes(to_bytes(image, width, height, resize_mode, mode))
    return _checked(_rows(image, CHANNELS[mode]), CHANNELS[mode], width, height, least)


def to_bytes(image: Image.Image, width: int, height: int, resize_mode: str, mode: str = "RGB") -> Tensor:
    """An image as it lies in memory: uint8 [1, height, width, 3], for ``mode`` ``"L"`` [1, height, width, 1]."""
    fitted = fit(to_rgb(image), width, height, resize_mode)
    pixels = np.array(fitted if mode == "RGB" else fitted.convert(mode))  # a copy, which torch may write to
    return torch.from_numpy(pixels).view(1, height, width, CHANNELS[mode])


def from_bytes(pixels: Tensor) -> Tensor:
    """Bytes [N, H, W, C] on any device as float32 [N, C, H, W] in 0..1, with the rounding of diffusers."""
    return pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(255.0)


def _rows(image: Any, channels: int) -> Tensor:
    """An array or a tensor as [N, C, H, W]."""
    if isinstance(image, np.ndarray):
        kind, is_float, axis = "an array", image.dtype.kind == "f", -1
    elif isinstance(image, Tensor):
        kind, is_float, axis = "a tensor", image.is_floating_point(), -3
    else:
        raise RequestError(f"image: {type(image).__name__}: expected a PIL image, an array, a tensor or a list of them")
    fewest = 2 if channels == 1 else 3
    if not fewest <= image.ndim <= 4 or not is_float:
        expected = {"an array": f"[H, W, {channels}]", "a tensor": f"[{channels}, H, W]"}[kind]
        raise RequestError(f"image: {kind} {image.dtype}{list(image.shape)}: expected floats {expected} in 0..1")
    # A copy of an array: torch takes none that is mirrored or locked.
    rows = torch.from_numpy(np.array(image, np.float32)) if isinstance(image, np.ndarray) else image.detach()
    if rows.ndim == 2:
        rows = rows.unsqueeze(axis if axis == -1 else 0)
    rows = rows if rows.ndim == 4 else rows[None]
    return rows.permute(0, 3, 1, 2) if axis == -1 else rows


def _checked(pixels: Tensor, channels: int, width: int, height: int, least: float) -> Tensor:
    """Floats [N, C, H, W], if they are images of the output size."""
    if not len(pixels):
        raise RequestError("image: no images in it: expected one, or one for each prompt")
    if tuple(pixels.shape[1:]) != (channels, height, width):
        raise RequestError(
            f"image: {pixels.shape[1]} channels of {pixels.shape[3]}x{pixels.shape[2]} pixels: expected {channels} of "
            f"{width}x{height}, the output size; a PIL image is resized"
        )
    pixels = pixels.float().contiguous()
    low, high = (float(end) for end in pixels.aminmax())
    if not (low >= least and high <= 1):  # nan is rejected
        raise RequestError(f"image: values from {low:g} to {high:g}: expected floats in 0..1")
    return pixels
