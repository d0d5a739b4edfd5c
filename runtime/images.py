"""From the decoder's output to pictures, bit for bit as diffusers' ``VaeImageProcessor`` does it."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..errors import RequestError

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def check_output_type(output_type: str) -> None:
    """Refuse what ``to_output`` does not make."""
    if output_type not in OUTPUT_TYPES:
        raise RequestError(f"output_type {output_type!r} is not known: expected one of {', '.join(OUTPUT_TYPES)}")


def to_output(sample: Tensor, output_type: str) -> Any:
    """Pictures in the form asked for: ``to_images`` of ``to_pixels``.

    Args:
        sample: [B, 3, H, W] in -1..1, any float dtype, on any device; it is not kept.
        output_type: ``"pt"`` for a tensor [B, 3, H, W] in 0..1 on that device, ``"np"`` for a float32 array
            [B, H, W, 3] in 0..1, ``"pil"`` for a list of ``PIL.Image``.
    """
    pixels = to_pixels(sample, output_type)
    return pixels if output_type == "pt" else to_images(pixels.cpu(), output_type)


def to_pixels(sample: Tensor, output_type: str) -> Tensor:
    """The part of ``to_output`` that the sample's device does: a new, contiguous tensor there.

    For ``"pil"`` uint8 [B, H, W, 3], a quarter of what would have to be copied to the host otherwise, for ``"np"``
    float32 [B, H, W, 3], for ``"pt"`` the sample's dtype and shape.
    """
    sample = (sample * 0.5 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return sample
    rows = sample.permute(0, 2, 3, 1).float()  # [B, H, W, 3]
    if output_type == "pil":
        rows = (rows * 255).round().to(torch.uint8)  # halves go to the even neighbour, as in numpy
    return rows.contiguous()


def to_images(pixels: Tensor, output_type: str) -> Any:
    """The part of ``to_output`` that the host does: ``"pil"`` pictures, which are copies, or the ``"np"`` array."""
    array = pixels.numpy()
    return array if output_type == "np" else [Image.fromarray(picture) for picture in array]
