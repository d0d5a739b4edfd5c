"""Random numbers; no other module draws any."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import RequestError

Generators = torch.Generator | list[torch.Generator] | None


def randn(
    shape: Sequence[int], *, generator: Generators = None, device: torch.device | str, dtype: torch.dtype
) -> Tensor:
    """Standard normal noise, [B, ...] in `dtype` on `device`, number for number that of diffusers' `randn_tensor`.

    A list holds one generator a sample, so that a sample does not depend on its neighbours in the batch; a list of one
    serves the whole batch. With a generator on the CPU the noise is drawn there and moved: a seed then gives the same
    image on every device. It is drawn in `dtype`, because float16 noise is not float32 noise rounded.
    """
    shape, device = tuple(shape), torch.device(device)
    generators = generator if isinstance(generator, list) else [generator]
    if len(generators) == 1:
        return _randn(shape, generators[0], device, dtype)
    if len(generators) != shape[0]:
        raise RequestError(f"generator is a list of {len(generators)} for a batch of {shape[0]}: expected one a sample")
    return torch.cat([_randn((1, *shape[1:]), one, device, dtype) for one in generators])


def make_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """Generators on the CPU, one for each seed."""
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def random_seed() -> int:
    """A random seed of 32 bits."""
    return secrets.randbits(32)


def _randn(
    shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device, dtype: torch.dtype
) -> Tensor:
    if generator is None:
        return torch.randn(shape, device=device, dtype=dtype)
    if not isinstance(generator, torch.Generator):
        raise RequestError(f"generator={generator!r}: expected a torch.Generator, a list of them or None")
    if generator.device.type not in ("cpu", device.type):
        raise RequestError(f"generator is on {generator.device}: expected one on the CPU or on {device}, as the noise")
    drawn_on = device if generator.device.type == device.type else generator.device
    return torch.randn(shape, generator=generator, device=drawn_on, dtype=dtype).to(device)
