"""Training of the autoencoder and of the tiny decoder."""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, l1_loss, mse_loss

from . import networks
from .data import load_images, to_samples
from .loop import Plan, device, fill, half, keep, train
from .networks import FACTOR
from .scenes import SIZE

BATCH = 16
CROP = SIZE // 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One part of the autoencoder's training.

    Attributes:
        plan: its length and speed.
        side: pixels; most is learnt from crops, which cost a quarter of whole images.
        legible: whether each latent has to tell the mean colour of its pixels by a linear map, as those of the real
            Stable Diffusion nearly do. Without it, latents laid all colours along one curve, neighbours so close
            together that no UNet hit the right one.
    """

    plan: Plan
    side: int
    legible: bool


PARTS = (
    Part(plan=Plan(name="vae-1", steps=3000, learning_rate=3e-3, seed=1), side=CROP, legible=False),
    Part(plan=Plan(name="vae-2", steps=500, learning_rate=1e-3, seed=2), side=SIZE, legible=False),
    Part(plan=Plan(name="vae-3", steps=1600, learning_rate=2e-3, seed=21), side=CROP, legible=True),
    Part(plan=Plan(name="vae-4", steps=300, learning_rate=1e-3, seed=22), side=SIZE, legible=True),
)
KL_WEIGHT = 1e-5
ERRORS = 0.1  # of the latents' spread: noise that the decoder learns to forgive
DECODER_PLAN = Plan(name="decoder", steps=500, learning_rate=1.5e-3, seed=23)
TINY_PLAN = Plan(name="tiny-vae", steps=1200, learning_rate=3e-3, seed=3)


def batch_of(images: np.ndarray, generator: torch.Generator, count: int, side: int = SIZE) -> Tensor:
    """Random images, or crops that begin at whole latents: float32 [count, 3, side, side] in -1..1."""
    indices = torch.randint(len(images), (count,), generator=generator).sort().values
    chosen = images[indices.numpy()]
    if side < SIZE:
        corners = torch.randint((SIZE - side) // FACTOR + 1, (count, 2), generator=generator) * FACTOR
        chosen = np.stack(
            [one[y : y + side, x : x + side] for one, (y, x) in zip(chosen, corners.tolist(), strict=True)]
        )
    return to_samples(chosen).to(device())


def unlikeness(made: Tensor, wanted: Tensor) -> Tensor:
    """Difference of colours, large ones first, and of their slopes, which keeps edges sharp."""
    slopes = sum(l1_loss(made.diff(dim=axis), wanted.diff(dim=axis)) for axis in (-1, -2))
    return 10 * mse_loss(made, wanted) + l1_loss(made, wanted) + slopes


class Autoencoder(nn.Module):
    """The autoencoder in training, beside the linear map from latents to mean colours."""

    def __init__(self) -> None:
        super().__init__()
        self.vae = networks.vae("sd15")
        self.colours = nn.Conv2d(self.vae.config.latent_channels, 3, 1)

    def loss(self, wanted: Tensor, legible: bool, generator: torch.Generator) -> Tensor:
        """Of images [N, 3, H, W]."""
        with half():
            latents = self.vae.encode(wanted).latent_dist
            noise = torch.randn(latents.mean.shape, generator=generator).to(device())
            spread = latents.mean.detach().float().std((0, 2, 3), keepdim=True)
            sample = latents.mean + (latents.std + ERRORS * spread) * noise
            made = self.vae.decode(sample).sample.float()
            told = self.colours(sample).float()
        loss = unlikeness(made, wanted) + KL_WEIGHT * latents.kl().mean() / latents.mean[0].numel()
        return loss + 10 * mse_loss(told, avg_pool2d(wanted, FACTOR)) if legible else loss


def train_vae(work: Path) -> None:
    """Train the autoencoder: ``vae.pt``, whose latents have mean 0 and variance 1 in every channel."""
    torch.manual_seed(PARTS[0].plan.seed)
    model, images = Autoencoder(), load_images(work)
    for part in PARTS:
        model.requires_grad_(True)
        model = train(part.plan, model, functools.partial(_part_loss, model, images, part), work)
    normalise(model.vae, images[:2048])
    keep(model.vae, work / "vae.pt")


def _part_loss(model: Autoencoder, images: np.ndarray, part: Part, generator: torch.Generator) -> Tensor:
    return model.loss(batch_of(images, generator, BATCH, part.side), part.legible, generator)


@torch.no_grad()
def normalise(model: AutoencoderKL, images: np.ndarray) -> None:
    """Give latents mean 0 and variance 1 by channel, without changing what is decoded from them."""
    parts = [images[start : start + 64] for start in range(0, len(images), 64)]
    latents = torch.cat([model.encode(to_samples(part).to(device())).latent_dist.mode() for part in parts])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))  # [4]
    out_of, into = model.quant_conv, model.post_quant_conv
    # post(z) = W z + b with z = std z' + mean
    into.bias += (into.weight[:, :, 0, 0] @ mean[:, None])[:, 0]
    into.weight *= std.view(1, -1, 1, 1)
    # The second half of the moments is the logarithm of the variance.
    out_of.weight[:4] /= std.view(-1, 1, 1, 1)
    out_of.bias[:4] = (out_of.bias[:4] - mean) / std
    out_of.bias[4:] -= 2 * std.log()


def train_decoder(work: Path) -> None:
    """Train the decoder on while the latents stay as they are, which the UNets learn at that time: ``vae-final.pt``."""
    torch.manual_seed(DECODER_PLAN.seed)
    model, images = load_vae(work), load_images(work)
    trained_parts = nn.ModuleList([model.decoder, model.post_quant_conv]).requires_grad_(True)

    def loss(generator: torch.Generator) -> Tensor:
        wanted = batch_of(images, generator, BATCH)
        with half():
            latents = model.encode(wanted).latent_dist.mode()
            noise = torch.randn(latents.shape, generator=generator).to(device())
            made = model.decode(latents + ERRORS * noise).sample.float()
        return unlikeness(made, wanted)

    model.decoder, model.post_quant_conv = train(DECODER_PLAN, trained_parts, loss, work)
    keep(model, work / "vae-final.pt")


def load_vae(work: Path) -> AutoencoderKL:
    """The trained autoencoder with latents of variance 1."""
    model = networks.vae("sd15")
    fill(model, work / "vae.pt")
    return model.to(device()).eval().requires_grad_(False)


def vae_for(family: str, work: Path) -> AutoencoderKL:
    """The published VAE: the family's scaling factor brings its latents to variance 1."""
    model = networks.vae(family)
    fill(model, work / "vae-final.pt")
    scale = model.config.scaling_factor
    with torch.no_grad():
        model.post_quant_conv.weight *= scale
        model.quant_conv.weight[:4] /= scale
        model.quant_conv.bias[:4] /= scale
        model.quant_conv.bias[4:] -= 2 * np.log(scale)
    return model.eval()


@torch.no_grad()
def make_latents(work: Path) -> None:
    """Encode the training images: ``latents.npy``, float16 [SCENES, 4, h, w]."""
    model, images = load_vae(work), load_images(work)
    latents = np.lib.format.open_memmap(
        work / "latents.partial.npy", "w+", dtype=np.float16,
        shape=(len(images), 4, networks.LATENT_SIZE, networks.LATENT_SIZE),
    )  # fmt: skip
    for start in range(0, len(images), 64):
        with half():
            encoded = model.encode(to_samples(images[start : start + 64]).to(device())).latent_dist.mode()
        latents[start : start + 64] = encoded.float().cpu().numpy()
    latents.flush()
    os.replace(work / "latents.partial.npy", work / "latents.npy")


def train_tiny_vae(work: Path) -> None:
    """Train the tiny decoder on the autoencoder's latents, and an encoder to match: ``tiny-vae.pt``."""
    torch.manual_seed(TINY_PLAN.seed)
    model, teacher = networks.tiny_vae(), load_vae(work)
    images = load_images(work)

    def loss(generator: torch.Generator) -> Tensor:
        wanted = batch_of(images, generator, BATCH, CROP)
        with torch.no_grad(), half():
            latents = teacher.encode(wanted).latent_dist.mode().float()
        with half():
            made, encoded = model.decode(latents).sample.float(), model.encode(wanted).latents.float()
        return unlikeness(made, wanted) + mse_loss(encoded, latents)

    trained = train(TINY_PLAN, model, loss, work)
    keep(trained, work / "tiny-vae.pt")


def load_tiny_vae(work: Path) -> AutoencoderTiny:
    model = networks.tiny_vae()
    fill(model, work / "tiny-vae.pt")
    return model.eval()
