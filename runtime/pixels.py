"""From the decoder's output to images, bit for bit as diffusers' ``VaeImageProcessor`` does it."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..errors import RequestError

_HALF = torch.tensor(0.5)  # a number on the CPU adds to tensors of every type and device, with no copy
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def check_output_type(output_type: str) -> None:
    """Check a caller's output type.

    Raises:
        RequestError: it is not known.
    """
    if output_type not in OUTPUT_TYPES:
        raise RequestError(f"output_type {output_type!r} is not known: expected one of {', '.join(OUTPUT_TYPES)}")


def to_pixels(sample: Tensor, output_type: str) -> Tensor:
    """The part of the conversion that runs on the sample's device: a new tensor there.

    Args:
        sample: [B, 3, H, W] in -1..1, any float dtype, on any device; it is not kept.
        output_type: ``"pt"`` for the image in 0..1, of the sample's dtype, shape and layout, which needs nothing
            more; ``"np"`` for float32 [B, H, W, 3] in 0..1, contiguous; ``"pil"`` for uint8 likewise, a quarter of
            the bytes to copy to the host.
    """
    # Halving is exact: one rounding, and one pass over memory, as of diffusers' two. What follows is done in place.
    pixels = torch.add(_HALF, sample, alpha=0.5).clamp_(0, 1)
    if output_type == "pt":
        return pixels
    pixels = pixels.float()
    if output_type == "pil":
        pixels = pixels.mul_(255).round_().to(torch.uint8)  # halves go to the even neighbour, as in numpy
    return pixels.permute(0, 2, 3, 1).contiguous()  # [B, H, W, 3]


def to_images(pixels: Tensor, output_type: str) -> Any:
    """The part of the conversion on the host: a list of ``PIL.Image``, which are copies, or the ``"np"`` array itself.

    ``pixels`` are those of ``to_pixels`` for the same ``output_type``, on the CPU.
    """
    array = pixels.numpy()
    return array if output_type == "np" else [Image.fromarray(image) for image in array]
