"""The published Hyper-SD checkpoints and how each wants to be sampled.

Source: the model card of ``ByteDance/Hyper-SD`` (and Ren et al., "Hyper-SD: Trajectory Segmented Consistency Model for
Efficient Image Synthesis", https://arxiv.org/abs/2404.13686).
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Literal

from ..errors import CheckpointError

HYPER_SD_REPO = "ByteDance/Hyper-SD"
BASE_REPOS = {
    # runwayml/stable-diffusion-v1-5, which the model card names, is gone from the Hub; this is its mirror.
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}
FIXED_VAE_REPO = "madebyollin/sdxl-vae-fp16-fix"
TINY_VAE_REPOS = {"sd15": "madebyollin/taesd", "sdxl": "madebyollin/taesdxl"}

Family = Literal["sd15", "sdxl"]
FAMILY_NAMES = {"sd15": "SD1.5", "sdxl": "SDXL"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A file of ``ByteDance/Hyper-SD`` and its recommended settings.

    Attributes:
        name: the file's name without ``.safetensors``.
        family: architecture of the base that it was distilled from.
        kind: a LoRA for the base's UNet, or a whole UNet in its place.
        sampler: ``ddim`` (trailing), ``tcd`` or ``lcm``.
        allowed_steps: numbers of steps that it was distilled for, the default first.
        timesteps: the timesteps to use with the default number of steps, where they are not the sampler's own.
        eta: stochasticity (DDIM's eta, TCD's gamma).
        guidance_scale: classifier-free guidance; 1 or less means none.
    """

    name: str
    family: Family
    kind: Literal["lora", "unet"] = "lora"
    sampler: Literal["ddim", "tcd", "lcm"]
    allowed_steps: tuple[int, ...]
    timesteps: tuple[int, ...] | None = None
    eta: float = 0.0
    guidance_scale: float = 0.0

    @property
    def filename(self) -> str:
        return f"{self.name}.safetensors"

    @property
    def base(self) -> str:
        return BASE_REPOS[self.family]

    @property
    def is_guided(self) -> bool:
        """Whether it was distilled with classifier-free guidance left in, so that negative prompts work."""
        return self.guidance_scale > 1.0


def _family_checkpoints(prefix: str, family: Family) -> list[Checkpoint]:
    # Unified: 1 to 8 steps with TCD. Its card shows eta 1.0; with several steps a lower eta gives more detail.
    unified = Checkpoint(
        name=f"{prefix}-1step-lora", family=family, sampler="tcd", allowed_steps=tuple(range(1, 9)), eta=1.0
    )
    few_steps = [
        Checkpoint(name=f"{prefix}-{n}steps-lora", family=family, sampler="ddim", allowed_steps=(n,)) for n in (2, 4, 8)
    ]
    # Guidance 5 to 8 on the card.
    guided = [
        Checkpoint(
            name=f"{prefix}-{n}steps-CFG-lora", family=family, sampler="ddim", allowed_steps=(n,), guidance_scale=5.0
        )
        for n in (8, 12)
    ]
    return [unified, *few_steps, *guided]


CHECKPOINTS: tuple[Checkpoint, ...] = (
    *_family_checkpoints("Hyper-SD15", "sd15"),
    *_family_checkpoints("Hyper-SDXL", "sdxl"),
    Checkpoint(
        name="Hyper-SDXL-1step-Unet", family="sdxl", kind="unet", sampler="lcm", allowed_steps=(1,), timesteps=(800,)
    ),
)


def find_checkpoint(name: str) -> Checkpoint:
    """Look a checkpoint up by name, with or without ``.safetensors``; letter case does not matter.

    Raises:
        CheckpointError: there is none of that name; the nearest ones are offered.
    """
    by_name = {checkpoint.name.lower(): checkpoint for checkpoint in CHECKPOINTS}
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
