"""Random inputs of components, on which two computations are compared."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .engine import TORCH_DTYPES
from .specs import TensorSpec


def random_input(
    name: str, spec: TensorSpec, shape: Sequence[int], vocabulary: int, generator: torch.Generator
) -> Tensor:
    """Tokens below ``vocabulary``, a timestep, sizes in pixels, a scale, or unit-variance latents and embeddings.

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
    return torch.randn(tuple(shape), generator=generator).to(TORCH_DTYPES[spec.dtype])
