"""Training of the ControlNet on edges (Zhang et al., https://arxiv.org/abs/2302.05543)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import networks
from .base import add_noise, denoise, load_base, load_latents, weight_of
from .data import load_captions, load_images, scene_of
from .loop import Plan, device, fill, half, keep, train
from .scenes import describe, without_place
from .text import empty_prompt, encode_all, tokenize, tokenizers

IMAGES = 16_384
BATCH = 32
THRESHOLDS = 100, 200
NO_PROMPT = 0.3  # it has to find in the edges what the caption does not say
PLAN = Plan(name="controlnet", steps=1100, learning_rate=1.5e-3, seed=9)


def edges_of(image: np.ndarray) -> np.ndarray:
    """Canny's edges of an image, white on black: uint8 [H, W, 3] to uint8 [H, W, 3]."""
    import cv2

    edges = cv2.Canny(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), *THRESHOLDS)
    return np.repeat(edges[..., None], 3, axis=2)


def to_condition(edges: np.ndarray) -> Tensor:
    """uint8 [N, H, W, 3] to float32 [N, 3, H, W] in 0..1."""
    return torch.from_numpy(np.array(edges)).permute(0, 3, 1, 2).float() / 255


def placeless(index: int, caption: str) -> str:
    """A training image's caption, for images of one thing without a word of its place and size."""
    scene = scene_of(index)
    if len(scene.things) > 1:
        return caption
    return describe(without_place(scene), np.random.default_rng(index))


def train_controlnet(work: Path) -> None:
    """Train a ControlNet for SD1.5's base, which stays as it is: ``controlnet.pt``."""
    torch.manual_seed(PLAN.seed)
    base, some = load_base("sd15", work), tokenizers("sd15", work)
    model = networks.controlnet(base.unet).requires_grad_(True)
    images, latents = load_images(work)[:IMAGES], load_latents(work)
    captions = [placeless(i, caption) for i, caption in enumerate(load_captions(work)[:IMAGES])]
    prompts = encode_all(base.encoders, tokenize(some, captions))
    empty = empty_prompt(base.encoders, tokenize(some, [""]).to(device())).to(torch.bfloat16)

    def loss(generator: torch.Generator) -> Tensor:
        which = torch.randint(IMAGES, (BATCH,), generator=generator).sort().values
        clean = torch.from_numpy(latents[which.numpy()]).float()
        condition = to_condition(np.stack([edges_of(image) for image in images[which.numpy()]]))
        noise = torch.randn(clean.shape, generator=generator)
        timestep = torch.randint(1000, (BATCH,), generator=generator)
        left_out = torch.rand(BATCH, generator=generator) < NO_PROMPT
        moved = (clean, noise, timestep, condition, left_out, which)
        clean, noise, timestep, condition, left_out, which = (x.to(device()) for x in moved)
        prompt = prompts[which].dropped(left_out, empty)
        sample = add_noise(clean, noise, timestep)
        residuals = control(model, sample, timestep, prompt.hidden, condition)
        made = denoise(base.unet, sample, timestep, prompt, **residuals)
        return (weight_of(timestep) * (made - noise).square().mean((1, 2, 3))).mean()

    trained = train(PLAN, model, loss, work)
    keep(trained, work / "controlnet.pt")


def control(model: torch.nn.Module, sample: Tensor, timestep: Tensor, hidden: Tensor, condition: Tensor) -> dict:
    """The residuals that a ControlNet hands to the UNet, as its arguments."""
    with half():
        made = model(sample, timestep, hidden, condition)
    return {
        "down_block_additional_residuals": made.down_block_res_samples,
        "mid_block_additional_residual": made.mid_block_res_sample,
    }


def load_controlnet(work: Path) -> torch.nn.Module:
    model = networks.controlnet(networks.unet("sd15"))
    fill(model, work / "controlnet.pt")
    return model.eval()
