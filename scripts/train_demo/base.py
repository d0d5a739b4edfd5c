"""Training of the two bases: noise prediction (Ho et al., https://arxiv.org/abs/2006.11239) from captions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from . import networks
from .data import SCENES, load_captions
from .loop import Plan, device, fill, half, keep, train
from .scenes import SIZE
from .text import Encoded, empty_prompt, encode, encode_all, load_encoders, tokenize, tokenizers

BATCH = 32
NO_PROMPT = 0.1  # share of captions left out, for classifier-free guidance (https://arxiv.org/abs/2207.12598)
LOWEST_WEIGHT, HIGHEST_WEIGHT = 0.3, 5.0
PLANS = {
    "sd15": Plan(name="base15", steps=7462, learning_rate=1.5e-3, seed=5),
    "sdxl": Plan(name="basexl", steps=8400, learning_rate=1.5e-3, seed=6),
}


class Base(nn.Module):
    """A UNet and its text encoders."""

    def __init__(self, unet: nn.Module, encoders: nn.ModuleList) -> None:
        super().__init__()
        self.unet, self.encoders = unet, encoders

    def encode(self, ids: Tensor) -> Encoded:
        """The UNet's conditioning for tokens int64 [N, encoders, 77]."""
        return encode(self.encoders, ids)


def denoise(unet: nn.Module, sample: Tensor, timestep: Tensor, prompt: Encoded, **residuals: object) -> Tensor:
    """The noise that the UNet sees in ``sample`` [N, 4, h, w] at ``timestep`` [N]: float32."""
    added = None
    if prompt.pooled is not None:
        ids = torch.tensor([SIZE, SIZE, 0, 0, SIZE, SIZE], device=sample.device, dtype=torch.float32)
        added = {"text_embeds": prompt.pooled, "time_ids": ids.expand(len(sample), 6)}
    with half():
        made = unet(sample, timestep, prompt.hidden, added_cond_kwargs=added, **residuals).sample
    return made.float()


def signal_to_noise(timestep: Tensor) -> Tensor:
    """At timesteps, int64 [N]: float32 [N]."""
    alphas = networks.alphas_cumprod().to(timestep.device)[timestep]
    return (alphas / (1 - alphas)).float()


def weight_of(timestep: Tensor) -> Tensor:
    """Weight of the squared error of the noise at timesteps, int64 [N]: float32 [N].

    The error of the image then weighs as much as the signal-to-noise ratio within bounds. The upper one is min-SNR's
    (Hang et al., https://arxiv.org/abs/2303.09556); the lower one keeps the first timesteps alive, where few-step
    samplers begin.
    """
    ratio = signal_to_noise(timestep)
    return ratio.clamp(LOWEST_WEIGHT, HIGHEST_WEIGHT) / ratio


def levels(timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """The shares of image and of noise at ``timesteps`` [N]: two float32 [N, 1, 1, 1].

    At the end, timestep -1, they are those of timestep 0 (``set_alpha_to_one=False``).
    """
    alphas = networks.alphas_cumprod().to(timesteps.device)[timesteps.clamp(min=0)].view(-1, 1, 1, 1)
    return alphas.sqrt().float(), (1 - alphas).sqrt().float()


def add_noise(clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """Latents and noise [N, 4, h, w] as a sample of timesteps, int64 [N]."""
    alpha, sigma = levels(timestep)
    return alpha * clean + sigma * noise


def load_latents(work: Path) -> np.ndarray:
    return np.load(work / "latents.npy", mmap_mode="r")


def train_base(family: str, work: Path) -> None:
    """Train a base's UNet on captions that its text encoders already understand: ``NAME.pt``."""
    plan = PLANS[family]
    torch.manual_seed(plan.seed)
    some, encoders, latents = tokenizers(family, work), load_encoders(family, work), load_latents(work)
    prompts = encode_all(encoders, tokenize(some, load_captions(work)))
    empty = empty_prompt(encoders, tokenize(some, [""]).to(device())).to(torch.bfloat16)
    unet = networks.unet(family)

    def loss(generator: torch.Generator) -> Tensor:
        batch = torch.randint(SCENES, (BATCH,), generator=generator).sort().values
        clean = torch.from_numpy(latents[batch.numpy()]).float()
        noise = torch.randn(clean.shape, generator=generator)
        timestep = torch.randint(1000, (BATCH,), generator=generator)
        left_out = torch.rand(BATCH, generator=generator) < NO_PROMPT
        moved = (clean, noise, timestep, left_out, batch)
        clean, noise, timestep, left_out, batch = (x.to(device()) for x in moved)
        sample = add_noise(clean, noise, timestep)
        made = denoise(unet, sample, timestep, prompts[batch].dropped(left_out, empty))
        return (weight_of(timestep) * (made - noise).square().mean((1, 2, 3))).mean()

    trained = Base(train(plan, unet, loss, work), encoders)
    keep(trained, work / f"{plan.name}.pt")


def load_base(family: str, work: Path) -> Base:
    """A trained base, in eval mode."""
    model = Base(networks.unet(family), load_encoders(family, work))
    fill(model, work / f"{PLANS[family].name}.pt")
    return model.to(device()).eval().requires_grad_(False)
