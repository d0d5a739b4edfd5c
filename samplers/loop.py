"""The loop from noise to latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import RequestError
from .noise import Generators, randn
from .sampler import Plan

Denoise = Callable[[Tensor, Any], Tensor]
Callback = Callable[[int, Any, Tensor], Tensor | None]


def sample(
    denoise: Denoise,
    latents: Tensor,
    plan: Plan,
    *,
    generator: Generators = None,
    noises: Sequence[Tensor | None] | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Finished latents [B, 4, h, w] from `latents` of that shape at the first step's noise level, left untouched.

    Args:
        denoise: `denoise(sample, t)` with the step's `t` returns the denoiser's output, [B, 4, h, w]. It may be the
            same buffer every time: it is read before the next call and never kept.
        latents: unit-variance noise, for a whole plan.
        plan: the steps to run, the sampler's plan or the last steps of one.
        generator: the source of the steps' noise. It should be the one that drew `latents`: diffusers' images come
            from one stream of numbers.
        noises: the noise of every step, which `draw_noise` made for the same plan; nothing is drawn then.
        callback: `callback(i, t, latents)` is called after every step; a tensor that it returns replaces the latents.

    Raises:
        RequestError: `noises` are not those of the plan.
    """
    if noises is not None and [noise is not None for noise in noises] != [step.noisy for step in plan]:
        raise RequestError(f"noises: expected the output of draw_noise for these {len(plan)} steps")
    for i, step in enumerate(plan):
        model_output = denoise(latents, step.t)
        if noises is not None:
            noise = noises[i]
        elif step.noisy:
            dtype = step.noise_dtype(latents.dtype, model_output.dtype)
            noise = randn(model_output.shape, generator=generator, device=model_output.device, dtype=dtype)
        else:
            noise = None
        latents = step(model_output, latents, noise)
        if callback is not None and (replaced := callback(i, step.t, latents)) is not None:
            latents = replaced
    return latents


def draw_noise(
    latents: Tensor, plan: Plan, *, generator: Generators = None, output_dtype: torch.dtype | None = None
) -> list[Tensor | None]:
    """The noise of every step, None where a step takes none: the numbers that `sample` would draw, in the same order.

    Of `latents` the shape, the device and the dtype count; the values need not be there yet. `output_dtype` is the
    dtype of the denoiser's output, by default that of `latents`.
    """
    output = output_dtype or latents.dtype
    return [
        randn(
            latents.shape,
            generator=generator,
            device=latents.device,
            dtype=step.noise_dtype(latents.dtype, output),
        )
        if step.noisy
        else None
        for step in plan
    ]
