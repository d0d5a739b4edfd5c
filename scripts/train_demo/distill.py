"""Few-step checkpoints, distilled from the bases' own trajectories.

Two kinds of students learn by regression onto kept trajectories (``trajectories.py``), with no teacher in the loop:

- for DDIM with N steps, each step has to land where the teacher is after STEPS / N of its own: progressive distillation
  (Salimans and Ho, https://arxiv.org/abs/2202.00512) straight to N; those of 4 and 2 steps begin as that of 2 N;
- for TCD and LCM, every point of a trajectory has to lead to its end: consistency distillation (Song et al.,
  https://arxiv.org/abs/2303.01469) with the end known, as all of the trajectory was kept. So that samplers which add
  fresh noise between steps find their way too, half of the points are the end with fresh noise.

Hyper-SD itself distils consistency in segments of trajectories, and then with people's preferences and a
discriminator (Ren et al., https://arxiv.org/abs/2404.13686): worlds this small do without.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from . import networks
from .base import add_noise, denoise, levels, load_base
from .loop import Plan, device, fill, keep, train
from .lora import Lora, WithLora
from .text import Encoded
from .trajectories import COUNT, GUIDANCE, STEPS, Ways, ddim, load_ways, trailing

BATCH = 32
Unet = Callable[..., object]
Loss = Callable[[Ways, Unet, torch.Generator], Tensor]
LORA_PLANS = {
    "8steps-lora": Plan(name="lora-8", steps=500, learning_rate=1e-3, seed=11),
    "4steps-lora": Plan(name="lora-4", steps=600, learning_rate=1e-3, seed=12),
    "2steps-lora": Plan(name="lora-2", steps=1200, learning_rate=1e-3, seed=13),
    "1step-lora": Plan(name="lora-1", steps=2400, learning_rate=1e-3, seed=14),
    "8steps-CFG-lora": Plan(name="lora-8-cfg", steps=400, learning_rate=1e-3, seed=15),
}
STARTS = {"4steps-lora": "8steps-lora", "2steps-lora": "4steps-lora", "1step-lora": "2steps-lora"}
UNET_PLAN = Plan(name="unet-1", steps=3000, learning_rate=1e-3, seed=16)
UNET_TIMESTEP = 800


def unlikeness(made: Tensor, wanted: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """Between the square and the absolute difference, which blurs less than the square alone."""
    error = made - wanted
    return (weight * (error.square() + 0.3 * error.abs()).mean((1, 2, 3), keepdim=True)).mean()


def _landing(
    ways: Ways, which: Tensor, steps: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The starts and the targets of steps of an N-step sampler: two latents and their two timesteps."""
    stride = STEPS // steps
    step = torch.randint(steps, (len(which),), generator=generator)
    times = torch.tensor(trailing(steps))
    begin, end = ways.at(which, step * stride), ways.at(which, (step + 1) * stride)
    return tuple(x.to(device()) for x in (begin, end, times[step], times[step + 1]))


def ddim_loss(steps: int) -> Loss:
    """Students of DDIM trailing with ``steps`` steps and no guidance."""

    def loss(ways: Ways, unet: Unet, generator: torch.Generator) -> Tensor:
        which = torch.randint(COUNT, (BATCH,), generator=generator)
        begin, end, here, there = _landing(ways, which, steps, generator)
        noise = denoise(unet, begin, here, _prompts(ways, which))
        return unlikeness(ddim(begin, noise, here, there), end, _image_weight(there))

    return loss


def guided_ddim_loss(steps: int) -> Loss:
    """Students of DDIM trailing with guidance left in: it is the guided prediction that has to land right."""

    def loss(ways: Ways, unet: Unet, generator: torch.Generator) -> Tensor:
        which = torch.randint(COUNT, (BATCH // 2,), generator=generator)
        begin, end, here, there = _landing(ways, which, steps, generator)
        with_prompt = denoise(unet, begin, here, _prompts(ways, which))
        empty = Encoded(ways.empty.hidden.expand(len(which), -1, -1))
        without = denoise(unet, begin, here, empty)
        noise = without + GUIDANCE * (with_prompt - without)
        return unlikeness(ddim(begin, noise, here, there), end, _image_weight(there))

    return loss


def _image_weight(timestep: Tensor) -> Tensor:
    """Errors count as errors of the image, of which there is little at the first timesteps."""
    return 1 / (levels(timestep)[0].square() + 0.1)


def consistency_loss(ways: Ways, unet: Unet, generator: torch.Generator) -> Tensor:
    """Students of TCD with 1 to 8 steps: a third of the batch starts from noise alone, the rest anywhere."""
    which = torch.randint(COUNT, (BATCH,), generator=generator)
    times = torch.randint(1, 51, (BATCH,), generator=generator) * 20 - 1  # those that TCD and LCM choose from
    times[: BATCH // 3] = 999
    end = ways.at(which, STEPS)
    alpha, sigma = levels(times)
    sample = ways.between(which, times)
    fresh = add_noise(end, torch.randn(end.shape, generator=generator), times)
    renoised = (torch.rand(BATCH, generator=generator) < 0.5) & (times < 999)
    sample = torch.where(renoised.view(-1, 1, 1, 1), fresh, sample)
    sample, end, times, alpha, sigma = (x.to(device()) for x in (sample, end, times, alpha, sigma))
    noise = denoise(unet, sample, times, _prompts(ways, which))
    return unlikeness((sample - sigma * noise) / alpha, end)


def one_step_loss(ways: Ways, unet: Unet, generator: torch.Generator) -> Tensor:
    """Students of LCM with one step at timestep 800, where the noise is given as if it were a sample of then."""
    which = torch.randint(COUNT, (BATCH,), generator=generator)
    times = torch.full((BATCH,), UNET_TIMESTEP, device=device())
    sample, end = ways.at(which, 0).to(device()), ways.at(which, STEPS).to(device())
    alpha, sigma = levels(times)
    noise = denoise(unet, sample, times, _prompts(ways, which))
    return unlikeness((sample - sigma * noise) / alpha, end)


def _prompts(ways: Ways, which: Tensor) -> Encoded:
    return ways.prompts[which.to(device())]


LOSSES = {
    "8steps-lora": ddim_loss(8),
    "4steps-lora": ddim_loss(4),
    "2steps-lora": ddim_loss(2),
    "1step-lora": consistency_loss,
    "8steps-CFG-lora": guided_ddim_loss(8),
}


def train_lora(name: str, work: Path) -> None:
    """Train one of SD1.5's LoRAs, from another one's end where STARTS names one: ``lora-NAME.pt``."""
    plan = LORA_PLANS[name]
    torch.manual_seed(plan.seed)
    unet, ways = load_base("sd15", work).unet, load_ways("sd15", work)
    lora = Lora(unet)
    if name in STARTS:
        fill(lora, work / f"{LORA_PLANS[STARTS[name]].name}.pt")
    student = WithLora(unet, lora)
    trained = train(plan, student, lambda generator: LOSSES[name](ways, student, generator), work)
    keep(trained.lora, work / f"{plan.name}.pt")


def load_lora(name: str, unet: nn.Module, work: Path) -> Lora:
    lora = Lora(unet)
    fill(lora, work / f"{LORA_PLANS[name].name}.pt")
    return lora


def train_one_step_unet(work: Path) -> None:
    """Train SDXL's one-step UNet, from the base's: ``unet-1.pt``."""
    torch.manual_seed(UNET_PLAN.seed)
    ways = load_ways("sdxl", work)
    unet = load_base("sdxl", work).unet.requires_grad_(True)
    trained = train(UNET_PLAN, unet, lambda generator: one_step_loss(ways, unet, generator), work)
    keep(trained, work / f"{UNET_PLAN.name}.pt")


def load_one_step_unet(work: Path) -> nn.Module:
    unet = networks.unet("sdxl")
    fill(unet, work / f"{UNET_PLAN.name}.pt")
    return unet.eval()
