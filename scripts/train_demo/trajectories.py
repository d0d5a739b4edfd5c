"""The bases' own paths from noise to image, from which the few-step checkpoints learn."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import networks
from .base import Base, denoise, levels, load_base
from .data import load_captions
from .loop import device, seeded
from .text import Encoded, empty_prompt, encode_all, tokenize, tokenizers

STEPS = 16  # a multiple of 2, 4 and 8, so that the few-step samplers' timesteps are among these
COUNT = 4096
BATCH = 64
GUIDANCE = 2.0
SEEDS = {"sd15": 7, "sdxl": 8}


def trailing(steps: int) -> list[int]:
    """DDIM's timesteps with trailing spacing, and -1 for the end."""
    return [round(1000 - i * 1000 / steps) - 1 for i in range(steps)] + [-1]


def ddim(sample: Tensor, noise: Tensor, here: Tensor, there: Tensor) -> Tensor:
    """DDIM's step without noise of its own (Song et al., https://arxiv.org/abs/2010.02502, equation 12, sigma 0)."""
    (alpha, sigma), (next_alpha, next_sigma) = levels(here), levels(there)
    return next_alpha * (sample - sigma * noise) / alpha + next_sigma * noise


def guided(model: Base, prompt: Encoded, empty: Encoded, scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Noise prediction with classifier-free guidance."""
    count = len(prompt)

    def both(first: Tensor | None, second: Tensor | None) -> Tensor | None:
        return None if first is None else torch.cat([first.expand(count, *first.shape[1:]), second])

    pair = Encoded(both(empty.hidden, prompt.hidden), both(empty.pooled, prompt.pooled))

    def predict(sample: Tensor, timestep: Tensor) -> Tensor:
        without, with_prompt = denoise(model.unet, sample.repeat(2, 1, 1, 1), timestep.repeat(2), pair).chunk(2)
        return without + scale * (with_prompt - without)

    return predict


@torch.no_grad()
def make_trajectories(family: str, work: Path) -> None:
    """Draw with a base and keep the way: ``FAMILY-ways.npy``, float16 [COUNT, STEPS + 1, 4, h, w]."""
    model, some = load_base(family, work), tokenizers(family, work)
    captions = load_captions(work)
    empty = empty_prompt(model.encoders, tokenize(some, [""]).to(device()))
    side = networks.LATENT_SIZE
    file, partial = work / f"{family}-ways.npy", work / f"{family}-ways.partial.npy"
    shape = (COUNT, STEPS + 1, 4, side, side)
    ways = np.lib.format.open_memmap(partial, "r+" if partial.exists() else "w+", dtype=np.float16, shape=shape)
    for start in range(0, COUNT, BATCH):
        if np.any(ways[start + BATCH - 1, STEPS]):
            continue  # made by an earlier, interrupted run
        prompt = model.encode(tokenize(some, captions[start : start + BATCH]).to(device()))
        sample = torch.randn(BATCH, 4, side, side, generator=seeded(SEEDS[family], start)).to(device())
        way = draw_way(guided(model, prompt, empty, GUIDANCE), sample)
        ways[start : start + BATCH] = way.cpu().numpy()
    ways.flush()
    os.replace(partial, file)


def draw_way(predict: Callable[[Tensor, Tensor], Tensor], sample: Tensor) -> Tensor:
    """All latents from noise to image: [N, STEPS + 1, 4, h, w]."""
    way, times = [sample], trailing(STEPS)
    for here, there in itertools.pairwise(times):
        now, then = (torch.full((len(sample),), t, device=sample.device) for t in (here, there))
        sample = ddim(sample, predict(sample, now), now, then)
        way.append(sample)
    return torch.stack(way, 1)


@dataclasses.dataclass(frozen=True)
class Ways:
    """Kept trajectories and their encoded prompts.

    Attributes:
        latents: [COUNT, STEPS + 1, 4, h, w], of which the first is noise and the last the image.
        prompts: the embeddings of each one's caption, in bfloat16.
        empty: the embeddings of no caption.
    """

    latents: np.ndarray
    prompts: Encoded
    empty: Encoded

    def at(self, which: Tensor, step: int | Tensor) -> Tensor:
        """Latents of the trajectories ``which`` after some of the steps: float32 [N, 4, h, w]."""
        steps = step.numpy() if isinstance(step, Tensor) else np.full(len(which), step)
        return torch.from_numpy(self.latents[which.numpy(), steps]).float()

    def between(self, which: Tensor, timesteps: Tensor) -> Tensor:
        """Latents at any timesteps: on the straight way that DDIM's steps took between two that were kept."""
        times = torch.tensor(trailing(STEPS))
        after = torch.searchsorted(-times, -timesteps, right=True).clamp(1, STEPS)  # the first one lower
        first, second = self.at(which, after - 1), self.at(which, after)
        (a, s), (b, r) = levels(times[after - 1]), levels(times[after])
        image = (r * first - s * second) / (a * r - b * s)
        noise = (first - a * image) / s
        alpha, sigma = levels(timesteps)
        return alpha * image + sigma * noise


@torch.no_grad()
def load_ways(family: str, work: Path) -> Ways:
    model, some = load_base(family, work), tokenizers(family, work)
    latents = np.load(work / f"{family}-ways.npy", mmap_mode="r")
    prompts = encode_all(model.encoders, tokenize(some, load_captions(work)[:COUNT]))
    empty = empty_prompt(model.encoders, tokenize(some, [""]).to(device()))
    return Ways(latents, prompts, empty.to(torch.bfloat16))
