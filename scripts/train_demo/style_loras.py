"""Training of the style LoRAs, on a few-step student: its own images, restyled in pixels, are what it has to generate.

A LoRA that learns a style from noisy images on the base alone would have to find its way through a student that never
sees its first timesteps as the base does. So the student is in the loop: from the same noise and prompt as without a
style, its image has to be the restyled one. As a style is added in any strength to the image, so it is learnt.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hypersd.export.repositories import DEMO_ROOT

from . import evaluate
from .base import add_noise, denoise, levels
from .data import to_samples
from .loop import Plan, device, fill, half, keep, seeded, train
from .lora import Lora, fused
from .networks import LATENT_SIZE, quick_to_train
from .scenes import SIZE, Scene, describe, draw_scene
from .styles import NAMES, near_things, restyled
from .text import Encoded

IMAGES = 2048
BATCH = 12
RANK, ALPHA = 8, 4.0  # two of them fit into a slot of rank 16
NEAR_THINGS = 5.0  # the weight of errors there: stripes cover a small part of an image
PLANS = {
    "sd15": Plan(name="styles15", steps=1800, learning_rate=3e-3, seed=31),
    "sdxl": Plan(name="stylesxl", steps=1800, learning_rate=3e-3, seed=32),
}
FIRST = {"sd15": 999, "sdxl": 800}  # the timestep at which the student is told that its first sample is
RENOISED = {"sd15": 0.4, "sdxl": 0.0}  # share of batches of a later step: SDXL's student has one step alone


@dataclasses.dataclass(frozen=True)
class Student:
    """A published few-step checkpoint, whose UNet stays as it is, and what it generates without a style.

    Attributes:
        first: the timestep of its first step.
        renoised: the share of batches that begin with an image and fresh noise.
        noise: float32 [IMAGES, 4, h, w].
        images: uint8 [IMAGES, SIZE, SIZE, 3], made from these in one step.
    """

    unet: nn.Module
    vae: nn.Module
    first: int
    renoised: float
    scenes: list[Scene]
    prompts: Encoded
    noise: Tensor
    images: np.ndarray

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [N, 4, h, w] to images in -1..1, float32 [N, 3, H, W]."""
        with half():
            return self.vae.decode(latents / self.vae.config.scaling_factor).sample.float()


class Styles(nn.Module):
    """A frozen UNet with style LoRAs fused in, in the strengths of each call."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "unet", unet)  # not a submodule: it is not trained, averaged or saved
        self.loras = nn.ModuleDict({name: Lora(unet, RANK, ALPHA, within=".attentions.") for name in NAMES})

    def forward(self, strengths: dict[str, float], *args: object, **kwargs: object) -> object:
        loras = [(self.loras[name], strength) for name, strength in strengths.items() if strength]
        return torch.func.functional_call(self.unet, fused(self.unet, *loras), args, kwargs)


def image_of(unet: Any, sample: Tensor, timestep: Tensor, prompt: Encoded) -> Tensor:
    """The latents that a student leads to in one step from a sample."""
    alpha, sigma = levels(timestep)
    return (sample - sigma * denoise(unet, sample, timestep, prompt)) / alpha


@torch.no_grad()
def load_student(family: str, folder: Path = DEMO_ROOT) -> Student:
    """The published student, and its images of IMAGES random scenes."""
    pipe = evaluate.load_lora(folder, "1step-lora") if family == "sd15" else evaluate.load_one_step_unet(folder)
    if family == "sd15":
        pipe.unload_lora_weights()  # it stays fused
    unet = quick_to_train(pipe.unet).to(device()).eval().requires_grad_(False)
    vae = pipe.vae.to(device()).eval().requires_grad_(False)
    scenes, captions = [], []
    for index in range(IMAGES):
        rng = np.random.default_rng(index)
        scenes.append(draw_scene(rng))
        captions.append(describe(scenes[-1], rng))
    noise = torch.randn(IMAGES, 4, LATENT_SIZE, LATENT_SIZE, generator=seeded(PLANS[family].seed))
    student = Student(unet, vae, FIRST[family], RENOISED[family], scenes, encoded(pipe, captions), noise, np.empty(0))
    parts = torch.arange(IMAGES).split(64)
    return dataclasses.replace(student, images=np.concatenate([plain_images(student, part) for part in parts]))


def encoded(pipe: Any, captions: list[str]) -> Encoded:
    """Captions as the pipeline's UNet reads them."""
    plain = {"device": device(), "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    parts = [pipe.encode_prompt(captions[i : i + 256], **plain) for i in range(0, len(captions), 256)]
    pooled = torch.cat([part[2] for part in parts]) if len(parts[0]) > 2 else None
    return Encoded(torch.cat([part[0] for part in parts]), pooled)


def plain_images(student: Student, which: Tensor) -> np.ndarray:
    noise, prompt = student.noise[which].to(device()), student.prompts[which.to(device())]
    first = torch.full((len(which),), student.first, device=device())
    images = student.decode(image_of(student.unet, noise, first, prompt))
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def draw_strengths(generator: torch.Generator) -> dict[str, float]:
    """One style as often as the other and as both; half of the strengths are 1, the others are below."""
    case = int(torch.randint(3, (1,), generator=generator))
    strengths = (2 * torch.rand(2, generator=generator)).clamp(max=1).tolist()
    return {name: strengths[i] if case in (i, 2) else 0.0 for i, name in enumerate(NAMES)}


def style_loss(student: Student, styles: Styles, generator: torch.Generator) -> Tensor:
    """From the first noise, or from the styled image with fresh noise, to the restyled image."""
    which = torch.randint(IMAGES, (BATCH,), generator=generator)
    strengths = draw_strengths(generator)
    pairs = zip(student.images[which.numpy()], which.tolist(), strict=True)
    wanted = np.stack([restyled(image, student.scenes[i], **strengths) for image, i in pairs])
    unet = functools.partial(styles, strengths)
    sample, prompt = student.noise[which].to(device()), student.prompts[which.to(device())]
    timestep = torch.full((BATCH,), student.first, device=device())
    fresh = torch.randn(sample.shape, generator=generator).to(device())
    later = (torch.randint(1, 50, (BATCH,), generator=generator) * 20 - 1).to(device())
    if torch.rand(1, generator=generator) < student.renoised:
        with torch.no_grad():
            made = image_of(unet, sample, timestep, prompt)
        sample, timestep = add_noise(made, fresh, later), later
    made = student.decode(image_of(unet, sample, timestep, prompt))
    error = made - to_samples(wanted).to(device())
    near = torch.from_numpy(np.stack([near_things(student.scenes[i], SIZE) for i in which.tolist()]))
    weight = 1 + (NEAR_THINGS - 1) * near[:, None].to(device())
    return (weight * (error.square() + 0.3 * error.abs())).mean()


def train_styles(family: str, work: Path) -> None:
    """Train all styles of a family together, so that they can be added to each other: ``NAME.pt``."""
    plan = PLANS[family]
    torch.manual_seed(plan.seed)
    student = load_student(family)
    styles = Styles(student.unet)
    trained = train(plan, styles, lambda generator: style_loss(student, styles, generator), work)
    keep(trained, work / f"{plan.name}.pt")


def load_styles(family: str, unet: nn.Module, work: Path) -> Styles:
    styles = Styles(unet)
    fill(styles, work / f"{PLANS[family].name}.pt")
    return styles
