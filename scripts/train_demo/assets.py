"""From the work folder to what is published: float16 safetensors in the layout of the real repositories."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from real_layout import save_pipeline, scheduler
from safetensors.torch import save_file
from transformers.utils import logging as transformers_logging

from . import networks
from .base import load_base
from .controlnet import load_controlnet
from .distill import LORA_PLANS, load_lora, load_one_step_unet
from .text import tokenizers
from .vae import load_tiny_vae, vae_for

Writer = Callable[[Path, Path], None]  # of the work folder and of the folder to write into


def write_assets(work: Path, folder: Path) -> None:
    """Write a folder for each base, the few-step files, the ControlNet and the tiny VAE: those that are trained."""
    transformers_logging.disable_progress_bar()
    for name, writers in folders().items():
        _write_folder(folder / name, writers, work)


def folders() -> dict[str, dict[str, Writer]]:
    """By folder, what is in it and how that is written."""
    loras: dict[str, Writer] = {
        f"Hyper-Demo15-{name}.safetensors": functools.partial(write_lora, name) for name in LORA_PLANS
    }
    return {
        "Demo15": {"the SD1.5 base": write_sd15},
        "DemoXL": {"the SDXL base": write_sdxl},
        "Hyper-Demo": {**loras, "Hyper-DemoXL-1step-Unet.safetensors": write_one_step_unet},
        "controlnet-canny-Demo15": {"the ControlNet": write_controlnet},
        "taesd-Demo": {"the tiny VAE": write_tiny_vae},
    }


def _write_folder(folder: Path, writers: Mapping[str, Writer], work: Path) -> None:
    """Replace a folder by a new one, whole. What is not trained yet is left out; if nothing is, so is the folder."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for what, write in writers.items():
        try:
            write(work, partial)
        except FileNotFoundError as error:
            print(f"{folder.name}: {what} left out, there is no {error.filename} yet")
    if any(partial.iterdir()):
        _replace(folder, partial)
    else:
        partial.rmdir()


def _replace(folder: Path, new: Path) -> None:
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


# Each loads all that it needs before it writes anything, so that nothing half is left of what is not trained.


def write_sd15(work: Path, folder: Path) -> None:
    base, (tokenizer,) = load_base("sd15", work), tokenizers("sd15", work)
    pipe = StableDiffusionPipeline(
        tokenizer=tokenizer, text_encoder=base.encoders[0].half(), unet=base.unet.half(),
        vae=vae_for("sd15", work).half(), scheduler=scheduler("sd15"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    save_pipeline(pipe, folder)


def write_sdxl(work: Path, folder: Path) -> None:
    base, (tokenizer, tokenizer_2) = load_base("sdxl", work), tokenizers("sdxl", work)
    pipe = StableDiffusionXLPipeline(
        tokenizer=tokenizer, tokenizer_2=tokenizer_2, text_encoder=base.encoders[0].half(),
        text_encoder_2=base.encoders[1].half(), unet=base.unet.half(), vae=vae_for("sdxl", work).half(),
        scheduler=scheduler("sdxl"), force_zeros_for_empty_prompt=True, add_watermarker=False,
    )  # fmt: skip
    save_pipeline(pipe, folder)


def write_lora(name: str, work: Path, folder: Path) -> None:
    lora = load_lora(name, networks.unet("sd15"), work)
    lora.save(folder / f"Hyper-Demo15-{name}.safetensors")


def write_one_step_unet(work: Path, folder: Path) -> None:
    """A bare state dict, as the real file is."""
    save_file(load_one_step_unet(work).half().state_dict(), folder / "Hyper-DemoXL-1step-Unet.safetensors")


def write_controlnet(work: Path, folder: Path) -> None:
    load_controlnet(work).half().save_pretrained(folder)


def write_tiny_vae(work: Path, folder: Path) -> None:
    load_tiny_vae(work).half().save_pretrained(folder)
