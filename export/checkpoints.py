"""The table of Hyper-SD checkpoints, published ones and the clone's own, with their recommended settings.

Source: the model card of ``ByteDance/Hyper-SD`` (and Ren et al., "Hyper-SD: Trajectory Segmented Consistency Model for
Efficient Image Synthesis", https://arxiv.org/abs/2404.13686).
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Literal

from ..errors import CheckpointError

HYPER_SD_REPO = "ByteDance/Hyper-SD"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """Checkpoints distilled from one base, and the places of their files.

    Every place is a Hub repository, or a demonstration folder of the clone (``DEMO_FOLDERS``).

    Attributes:
        name: the beginning of the checkpoints' names.
        family: name of the base's.
        files: the place of the checkpoints themselves.
        base: the place of the base.
        tiny_vae: the place of its TAESD.
        fp16_vae: the place of the VAE that replaces the base's in half precision, if the base's own overflows.
    """

    name: str
    family: str
    files: str
    base: str
    tiny_vae: str
    fp16_vae: str | None = None


SD15 = Series(
    name="Hyper-SD15",
    family="sd15",
    files=HYPER_SD_REPO,
    # runwayml/stable-diffusion-v1-5, which the model card names, is gone from the Hub; this is its mirror.
    base="stable-diffusion-v1-5/stable-diffusion-v1-5",
    tiny_vae="madebyollin/taesd",
)
SDXL = Series(
    name="Hyper-SDXL",
    family="sdxl",
    files=HYPER_SD_REPO,
    base="stabilityai/stable-diffusion-xl-base-1.0",
    tiny_vae="madebyollin/taesdxl",
    fp16_vae="madebyollin/sdxl-vae-fp16-fix",
)
DEMO15 = Series(name="Hyper-Demo15", family="sd15", files="Hyper-Demo", base="Demo15", tiny_vae="taesd-Demo")
DEMOXL = Series(name="Hyper-DemoXL", family="sdxl", files="Hyper-Demo", base="DemoXL", tiny_vae="taesd-Demo")
DEMO_CONTROLNET = "controlnet-canny-Demo15"
DEMO_FOLDERS = frozenset(
    {place for series in (DEMO15, DEMOXL) for place in (series.files, series.base, series.tiny_vae)} | {DEMO_CONTROLNET}
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A Hyper-SD file and its recommended settings.

    Attributes:
        name: the file's name without ``.safetensors``.
        series: the places of the file, its base and its VAEs.
        kind: a LoRA for the base's UNet, or a whole UNet in its place.
        sampler: ``ddim`` (trailing), ``tcd`` or ``lcm``.
        allowed_steps: the numbers of steps that it was distilled for, the default first.
        timesteps: the timesteps to use with the default number of steps, where they are not the sampler's own.
        eta: stochasticity (DDIM's eta, TCD's gamma).
        guidance_scale: classifier-free guidance; 1 or less means none.
    """

    name: str
    series: Series
    kind: Literal["lora", "unet"] = "lora"
    sampler: str
    allowed_steps: tuple[int, ...]
    timesteps: tuple[int, ...] | None = None
    eta: float = 0.0
    guidance_scale: float = 0.0

    @property
    def filename(self) -> str:
        return f"{self.name}.safetensors"

    @property
    def family(self) -> str:
        return self.series.family

    @property
    def base(self) -> str:
        return self.series.base

    @property
    def is_guided(self) -> bool:
        """Whether it was distilled with classifier-free guidance left in, so that negative prompts work."""
        return self.guidance_scale > 1.0


def _loras(series: Series, guided_steps: tuple[int, ...], guidance_scale: float) -> list[Checkpoint]:
    # Unified: 1 to 8 steps with TCD. Its card shows eta 1.0; with several steps a lower eta gives more detail.
    unified = Checkpoint(
        name=f"{series.name}-1step-lora", series=series, sampler="tcd", allowed_steps=tuple(range(1, 9)), eta=1.0
    )
    few_steps = [
        Checkpoint(name=f"{series.name}-{n}steps-lora", series=series, sampler="ddim", allowed_steps=(n,))
        for n in (2, 4, 8)
    ]
    guided = [
        Checkpoint(
            name=f"{series.name}-{n}steps-CFG-lora",
            series=series,
            sampler="ddim",
            allowed_steps=(n,),
            guidance_scale=guidance_scale,
        )
        for n in guided_steps
    ]
    return [unified, *few_steps, *guided]


def _whole_unet(series: Series) -> Checkpoint:
    return Checkpoint(
        name=f"{series.name}-1step-Unet",
        series=series,
        kind="unet",
        sampler="lcm",
        allowed_steps=(1,),
        timesteps=(800,),
    )


CHECKPOINTS: tuple[Checkpoint, ...] = (
    # Guidance 5 to 8 on the card.
    *_loras(SD15, guided_steps=(8, 12), guidance_scale=5.0),
    *_loras(SDXL, guided_steps=(8, 12), guidance_scale=5.0),
    _whole_unet(SDXL),
)
# Small checkpoints of this repository, to try everything without a download (scripts/train_demo).
DEMO_CHECKPOINTS: tuple[Checkpoint, ...] = (
    *_loras(DEMO15, guided_steps=(8,), guidance_scale=2.0),
    _whole_unet(DEMOXL),
)


def find_checkpoint(name: str) -> Checkpoint:
    """Look a checkpoint up by name, with or without ``.safetensors``; letter case does not matter.

    Raises:
        CheckpointError: the name is not known; the message offers the nearest ones.
    """
    by_name = {checkpoint.name.lower(): checkpoint for checkpoint in (*CHECKPOINTS, *DEMO_CHECKPOINTS)}
    wanted = name.strip().lower().removesuffix(".safetensors")
    if wanted in by_name:
        return by_name[wanted]
    if "sd3" in wanted or "flux" in wanted:
        raise CheckpointError(
            f"checkpoint {name!r}: SD3 and FLUX are not supported, only SD1.5 and SDXL: `hypersd list`"
        )
    nearest = difflib.get_close_matches(wanted, by_name, n=3, cutoff=0.6)
    offer = f"did you mean {' or '.join(by_name[n].name for n in nearest)}?" if nearest else "try `hypersd list`"
    raise CheckpointError(f"checkpoint {name!r} is not known: {offer}")


def example_prompt(name: str) -> str:
    """A prompt that the checkpoint of that name was trained for."""
    is_demo = any(checkpoint.name == name for checkpoint in DEMO_CHECKPOINTS)
    return "a red star on a blue background" if is_demo else "a photo of a cat"
