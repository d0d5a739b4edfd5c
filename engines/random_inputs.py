"""Random inputs of components, on which two computations are compared."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from .engine import TORCH_DTYPES
from .lora_slot import LORA
from .specs import TensorSpec

COLOURS = 3  # channels of an image; latents have more
FACTOR = 0.05  # deviation of a LoRA's factors, whose product is then some tenths of a layer's output
SPOT = 8  # pixels between the random colours of an image


def ends_of_ranges(names: Collection[str]) -> Iterator[Mapping[str, Literal["min", "opt", "max"]]]:
    """Which extent of each range to run a network at, so that both ends of every range are run.

    All smallest together, then each largest with the others at their usual extent. All largest together may fit no
    memory: one attention of SDXL over four rows of 1536x1536 takes 13.6 GB of float32 on a CPU.

    Args:
        names: of the ranges; without any, one empty selection.
    """
    yield dict.fromkeys(names, "min")
    for name in names:
        yield {**dict.fromkeys(names, "opt"), name: "max"}


def random_input(
    name: str, spec: TensorSpec, shape: Sequence[int], vocabulary: int, generator: torch.Generator
) -> Tensor:
    """Tokens, a timestep, sizes in pixels, a scale, an image in -1..1, or unit-variance latents and embeddings.

    A LoRA slot gets random factors.

    Args:
        name: the input's.
        spec: its type.
        shape: its shape, inside the ranges of ``spec``.
        vocabulary: the number of tokens.
        generator: decides the values.
    """
    if spec.dtype == "int64":
        return torch.randint(vocabulary, tuple(shape), generator=generator)
    if name == "timestep":
        return torch.randint(1000, tuple(shape), generator=generator).float()
    if name == "time_ids":
        return torch.randint(8, 1024, tuple(shape), generator=generator).to(TORCH_DTYPES[spec.dtype])
    if name == "conditioning_scale":
        return torch.rand(tuple(shape), generator=generator)
    if name == LORA:
        return (torch.randn(tuple(shape), generator=generator) * FACTOR).to(TORCH_DTYPES[spec.dtype])
    if name == "sample" and shape[1] == COLOURS:
        return _image(shape, generator).to(TORCH_DTYPES[spec.dtype])
    return torch.randn(tuple(shape), generator=generator).to(TORCH_DTYPES[spec.dtype])


def _image(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Colours that run into one another, as in a photograph: noise in every pixel is no image that a VAE has seen."""
    batch, channels, height, width = shape
    colours = torch.rand(batch, channels, -(-height // SPOT), -(-width // SPOT), generator=generator) * 2 - 1
    return functional.interpolate(colours, (height, width), mode="bilinear")
