"""Scores of the published checkpoints, drawn by diffusers: what they are good for, and what breaks them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DiffusionPipeline,
    LCMScheduler,
    StableDiffusionControlNetPipeline,
    TCDScheduler,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file

from .controlnet import edges_of
from .data import held_back, held_back_for_edges
from .judge import Scores, judge, score
from .lora import ALPHA, RANK
from .scenes import Scene, render
from .trajectories import GUIDANCE

BATCH = 50
PROMPTS = 200
BASE_STEPS = 50
FILES = "Hyper-Demo"


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: a title of the row.
        pipeline: makes diffusers' pipeline.
        call: the pipeline's arguments.
        control: the row that it is a negative control of: its score has to be far lower.
        edges: whether edges say where things are, and not the prompt.
    """

    name: str
    pipeline: Callable[[Path], Any]
    call: dict[str, Any]
    control: str | None = None
    edges: bool = False


def load_base(folder: Path, base: str) -> Any:
    pipe = DiffusionPipeline.from_pretrained(str(folder / base), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe


def load_lora(
    folder: Path, name: str, scheduler: type = DDIMScheduler, spacing: str = "trailing", scale: float = 1.0
) -> Any:
    """SD1.5's base with a LoRA fused and the scheduler that it is for."""
    pipe = load_base(folder, "Demo15")
    pipe.load_lora_weights(str(folder / FILES), weight_name=f"Hyper-Demo15-{name}.safetensors")
    pipe.fuse_lora(lora_scale=scale)
    pipe.scheduler = make_scheduler(pipe, scheduler, spacing)
    return pipe


def make_scheduler(pipe: Any, kind: type, spacing: str = "trailing") -> Any:
    changes = {"timestep_spacing": spacing} if kind is DDIMScheduler else {}
    return kind.from_config(pipe.scheduler.config, **changes)


def load_one_step_unet(folder: Path, scheduler: type = LCMScheduler) -> Any:
    """SDXL's base with the one-step UNet in the place of its own."""
    pipe = load_base(folder, "DemoXL")
    unet = UNet2DConditionModel.from_config(pipe.unet.config)
    unet.load_state_dict(load_file(folder / FILES / "Hyper-DemoXL-1step-Unet.safetensors"))
    pipe.unet = unet.eval()
    pipe.scheduler = make_scheduler(pipe, scheduler)
    return pipe


def load_controlled(folder: Path, name: str, scheduler: type = DDIMScheduler) -> Any:
    """A LoRA's pipeline with the ControlNet."""
    plain = load_lora(folder, name, scheduler)
    controlnet = ControlNetModel.from_pretrained(str(folder / "controlnet-canny-Demo15"), dtype=torch.float32)
    parts = {**plain.components, "controlnet": controlnet}
    pipe = StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_step_number(load: Callable[[Path], Any], folder: Path) -> Any:
    """A pipeline whose UNet is told the number of the step, from 0, in the place of the timestep."""
    pipe = load(folder)
    forward = pipe.unet.forward

    def told_number(sample: torch.Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        number = pipe.scheduler.timesteps.tolist().index(int(timestep))
        return forward(sample, torch.tensor(number), *args, **kwargs)

    pipe.unet.forward = told_number
    return pipe


def numbered(load: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return functools.partial(with_step_number, load)


def count_of(steps: int) -> str:
    return "1 step" if steps == 1 else f"{steps} steps"


def lora(name: str, **changes: Any) -> Callable[[Path], Any]:
    return functools.partial(load_lora, name=name, **changes)


def rows() -> list[Row]:
    """Every checkpoint in every number of steps, and the negative controls."""
    bare = {"guidance_scale": 0.0}
    base = {"num_inference_steps": BASE_STEPS, "guidance_scale": GUIDANCE}
    table = [
        Row("Demo15, DDIM, 50 steps", functools.partial(load_base, base="Demo15"), base),
        Row("DemoXL, DDIM, 50 steps", functools.partial(load_base, base="DemoXL"), base),
    ]
    for steps in (2, 4, 8):
        call = {**bare, "num_inference_steps": steps}
        table.append(Row(f"{steps}steps-lora, DDIM", lora(f"{steps}steps-lora"), call))
    unified = lora("1step-lora", scheduler=TCDScheduler)
    for steps, eta in (1, 1.0), (2, 1.0), (4, 1.0), (8, 1.0), (4, 0.3):
        call = {**bare, "num_inference_steps": steps, "eta": eta}
        table.append(Row(f"1step-lora, TCD, {count_of(steps)}, eta {eta:g}", unified, call))
    guided = {"num_inference_steps": 8, "guidance_scale": GUIDANCE}
    table.append(Row("8steps-CFG-lora, DDIM", lora("8steps-CFG-lora"), guided))
    one_step = {**bare, "num_inference_steps": 1, "timesteps": [800]}
    table.append(Row("DemoXL 1step-Unet, LCM", load_one_step_unet, one_step))
    return [*table, *with_edges(bare), *controls(bare, one_step)]


def with_edges(bare: dict[str, Any]) -> list[Row]:
    """The ControlNet beside two samplers, and without effect."""
    table = []
    for name, kind, steps in ("2steps-lora", DDIMScheduler, 2), ("1step-lora", TCDScheduler, 1):
        load = functools.partial(load_controlled, name=name, scheduler=kind)
        call = {**bare, "num_inference_steps": steps}
        row = f"canny, {name}"
        ignored = {**call, "controlnet_conditioning_scale": 0.0}
        table += [
            Row(row, load, {**call, "controlnet_conditioning_scale": 1.0}, edges=True),
            Row(f"{row}, edges ignored", load, ignored, row, edges=True),
        ]
    return table


def controls(bare: dict[str, Any], one_step: dict[str, Any]) -> list[Row]:
    """Mistakes that others have made, and that have to show."""
    table = []
    for steps in (2, 4, 8):
        name, call = f"{steps}steps-lora", {**bare, "num_inference_steps": steps}
        row = f"{name}, DDIM"
        table += [
            Row(f"{row}, alpha ignored", lora(name, scale=RANK / ALPHA), call, row),
            Row(f"{row}, step number for timestep", numbered(lora(name)), call, row),
        ]
    # With more steps these worlds survive it: a UNet this sure of its caption draws it from noise at any timestep.
    two = {**bare, "num_inference_steps": 2}
    table.append(
        Row("2steps-lora, DDIM, leading spacing", lora("2steps-lora", spacing="leading"), two, "2steps-lora, DDIM")
    )
    tcd = {**bare, "num_inference_steps": 1, "eta": 1.0}
    own, four, unet = "1step-lora, TCD, 1 step, eta 1", "4steps-lora, DDIM", "DemoXL 1step-Unet, LCM"
    unified = lora("1step-lora", scheduler=TCDScheduler)
    misused = functools.partial(load_one_step_unet, scheduler=TCDScheduler)
    return [
        *table,
        Row(f"{own}, alpha ignored", lora("1step-lora", scheduler=TCDScheduler, scale=RANK / ALPHA), tcd, own),
        Row(f"{own}, step number for timestep", numbered(unified), tcd, own),
        Row(f"{four}, as the unified LoRA wants it", lora("4steps-lora", scheduler=TCDScheduler), tcd, four),
        Row(f"{unet}, as SD1.5's LoRA wants it", misused, tcd, unet),
        Row(f"{unet}, step number for timestep", numbered(load_one_step_unet), one_step, unet),
    ]


@torch.no_grad()
def draw(pipe: Any, prompts: Sequence[str], **call: Any) -> np.ndarray:
    """One image a prompt, whose place is its seed: uint8 [N, H, W, 3]."""
    images = []
    for start in range(0, len(prompts), BATCH):
        some = list(prompts[start : start + BATCH])
        seeds = range(start, start + len(some))
        own = {key: value[start : start + len(some)] for key, value in call.items() if key == "image"}
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        made = pipe(some, generator=generators, output_type="np", **{**call, **own}).images
        images.append(np.round(made * 255).astype(np.uint8))
    return np.concatenate(images)


def scores_of(images: np.ndarray, scenes: Sequence[Scene]) -> Scores:
    return score([judge(image, scene) for image, scene in zip(images, scenes, strict=True)])


def evaluate(row: Row, folder: Path, count: int = PROMPTS) -> Scores:
    """A row's score on held-back prompts."""
    scenes, prompts = zip(*(held_back_for_edges if row.edges else held_back)(count), strict=True)
    images = {"image": edge_images(scenes)} if row.edges else {}
    return scores_of(draw(row.pipeline(folder), prompts, **row.call, **images), scenes)


def edge_images(scenes: Sequence[Scene]) -> list[Image.Image]:
    """The control images: the edges of each scene, rendered with jitter."""
    return [Image.fromarray(edges_of(render(scene, np.random.default_rng(i)))) for i, scene in enumerate(scenes)]
