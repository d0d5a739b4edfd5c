"""Batches of a few sizes, so that calls with similar numbers of images share a CUDA graph."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .image_encoder import repeated
from .image_function import PER_HALF, SHARED


def bucket(images: int, largest: int) -> int:
    """The number of rows at which a graph of ``images`` images runs: the next power of two.

    ``largest`` is the bundle's largest batch, and takes the place of a larger power. Above it the components run
    several times, for which more rows would be many: such a batch runs in its own size.
    """
    return images if images > largest else min(largest, 1 << (images - 1).bit_length())


def buckets(most: int, largest: int) -> list[int]:
    """The numbers of rows at which graphs of 1 to ``most`` images run."""
    return sorted({bucket(images, largest) for images in range(1, most + 1)})


def padded(inputs: Mapping[str, Tensor], images: int, rows: int, is_guided: bool) -> dict[str, Tensor]:
    """The inputs of an image function (:class:`.image_function.ImageFunction`) for ``rows`` images instead of fewer.

    The last image's rows are repeated. A single init image, mask or control image stays the only one; several, each for
    the images of one prompt, become a row for each image.
    """

    def pad(tensor: Tensor) -> Tensor:
        every = repeated(tensor, images)
        return torch.cat([every, every[-1:].expand(rows - images, *every.shape[1:])])

    def pad_input(name: str, tensor: Tensor) -> Tensor:
        if name in SHARED or (len(tensor) == 1 and images > 1):
            return tensor
        if name in PER_HALF and is_guided:
            return torch.cat([pad(half) for half in tensor.chunk(2)])
        return pad(tensor)

    return {name: pad_input(name, tensor) for name, tensor in inputs.items()}
