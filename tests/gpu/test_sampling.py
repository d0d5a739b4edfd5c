"""Samplers' steps on a GPU: with coefficients that are tensors there, as in a CUDA graph, and with plain numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hypersd.samplers import make_sampler
from hypersd.samplers.loop import draw_noise, sample
from hypersd.samplers.step import stacked_coefficients

CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
ERRORS = {torch.float32: 1e-5, torch.float16: 1e-2}  # root mean square, as a part of the latents'


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
@pytest.mark.parametrize(("kind", "eta"), [("ddim", 0.5), ("tcd", 0.3), ("lcm", None)])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
def test_coefficients_on_the_device_are_as_good_as_numbers(
    device: str, kind: str, eta: float | None, dtype: torch.dtype
) -> None:
    """To the bit on one device; and the CPU's latents, but for rounding."""
    sampler, generator = make_sampler(kind), torch.Generator().manual_seed(0)
    plan = sampler.plan(4, eta=eta)
    timesteps = [torch.tensor([float(step.t)], device=device) for step in plan]
    of_tensors = sampler.steps_from(timesteps, stacked_coefficients(plan).to(device), [step.noisy for step in plan])
    latents = torch.randn(2, 4, 8, 8, generator=generator).to(dtype)
    noises = draw_noise(latents, plan, generator=generator)

    def run(steps: tuple, where: str) -> Tensor:
        moved = [None if noise is None else noise.to(where) for noise in noises]
        return sample(lambda x, t: x * 0.9, latents.to(where), steps, noises=moved).cpu()

    ours, of_numbers, on_cpu = run(of_tensors, device), run(plan, device), run(plan, "cpu")
    assert ours.isfinite().all()
    assert torch.equal(ours, of_numbers)
    error = (ours.double() - on_cpu.double()).pow(2).mean().sqrt()
    assert error <= ERRORS[dtype] * on_cpu.double().pow(2).mean().sqrt()
