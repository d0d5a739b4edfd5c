"""From the decoder's output to pictures, bit for bit as diffusers' ``VaeImageProcessor`` does it."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ..errors import RequestError

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def check_output_type(output_type: str) -> None:
    """Refuse what ``to_output`` does not make."""
    if output_type not in OUTPUT_TYPES:
        raise RequestError(f"output_type {output_type!r} is not known: expected one of {', '.join(OUTPUT_TYPES)}")


def to_output(sample: Tensor, output_type: str) -> Any:
    """Pictures in the form asked for.

    Args:
        sample: [B, 3, H, W] in -1..1, any float dtype; it is not kept.
        output_type: ``"pt"`` for a tensor [B, 3, H, W] in 0..1, ``"np"`` for a float32 array [B, H, W, 3] in 0..1,
            ``"pil"`` for a list of ``PIL.Image``.
    """
    sample = (sample * 0.5 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return sample
    array = sample.cpu().permute(0, 2, 3, 1).float().numpy()
    return array if output_type == "np" else to_pil(array)


def to_pil(array: np.ndarray) -> list[Image.Image]:
    """Pictures [B, H, W, 3] in 0..1 as 8-bit RGB."""
    return [Image.fromarray(picture) for picture in (array * 255).round().astype(np.uint8)]
