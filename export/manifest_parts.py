"""The parts of a bundle's manifest that follow from the sources: sampler, scheduler, VAE, origin."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..engines.manifest import Origin, SamplerSettings, SourceFile, VaeSettings
from ..errors import WeightsError, one_line
from ..families import find_family
from ..samplers import find_sampler, make_sampler
from ..samplers.schedule import SchedulerConfig
from .checkpoints import Checkpoint
from .component_exports import latent_scale
from .models import is_tiny
from .repositories import Found
from .sources import Sources
from .vae_sources import scaling_factor

# The constants that change a step, and one that the samplers reject; diffusers' configurations hold more.
CONSTANTS = (*(field.name for field in dataclasses.fields(SchedulerConfig)), "thresholding")


def make_scheduler(kind: str, base_config: Mapping[str, Any]) -> Any:
    """diffusers' scheduler as Hyper-SD's model card makes it: ``SCHEDULER.from_config(base)``.

    Args:
        kind: the sampler's name, ``"ddim"``, ``"tcd"`` or ``"lcm"``.
        base_config: the base's ``scheduler_config.json``.
    """
    import diffusers

    sampler = find_sampler(kind)
    return getattr(diffusers, sampler.scheduler_class).from_config(dict(base_config), **sampler.scheduler_settings)


def scheduler_constants(kind: str, base_config: Mapping[str, Any]) -> dict[str, Any]:
    """The constants of :func:`make_scheduler`'s configuration that the samplers take.

    Raises:
        WeightsError: diffusers makes no scheduler of the base's configuration, or one that the samplers do not support.
    """
    try:
        config = make_scheduler(kind, base_config).config
        constants = {key: config[key] for key in CONSTANTS if key in config}
        make_sampler(kind, **constants)
    except Exception as error:  # whatever the constructor stumbles over
        raise WeightsError(f"the base's scheduler_config.json makes no scheduler: {one_line(error)}") from error
    return constants


def sampler_settings(checkpoint: Checkpoint) -> SamplerSettings:
    """The checkpoint's recommended settings."""
    return SamplerSettings(
        kind=checkpoint.sampler,
        num_inference_steps=checkpoint.allowed_steps[0],
        allowed_steps=checkpoint.allowed_steps,
        timesteps=checkpoint.timesteps,
        eta=checkpoint.eta,
        guidance_scale=checkpoint.guidance_scale,
    )


def vae_settings(sources: Sources, family: str) -> VaeSettings:
    """The VAE's constants, from its configuration."""
    vae = sources.parts["vae"]
    return VaeSettings(
        scaling_factor=scaling_factor(vae.config),
        spatial=latent_scale(sources),
        latent_channels=find_family(family).latent_channels,
        tiny=is_tiny(vae),
    )


def origin(
    sources: Sources, records: dict[str, tuple[SourceFile, ...]], variant: str | None, lora_scale: float
) -> Origin:
    """The locations and hashes of everything that the bundle was made from."""
    return Origin(
        base=sources.base,
        revision=sources.base_revision,
        variant=variant,
        vae=sources.vae,
        vae_revision=sources.vae_revision,
        lora_scale=lora_scale if sources.lora else None,
        added_lora_scales=tuple(lora.scale for lora in sources.added_loras.values()),
        controlnets=sources.controlnets,
        weights=records,
    )


def source_records(sources: Sources) -> dict[str, tuple[SourceFile, ...]]:
    """The manifest's records of all weight files; each file is hashed once."""
    cache: dict[Found, SourceFile] = {}

    def record(found: Found) -> SourceFile:
        if found not in cache:
            cache[found] = found.record()
        return cache[found]

    return {name: tuple(map(record, files)) for name, files in sources.weights.items()}


def default_size(sources: Sources, family: str) -> tuple[int, int]:
    """Height and width in pixels that the base was trained for: the UNet's ``sample_size``, or the family's.

    Raises:
        WeightsError: the configuration has neither a number nor two.
    """
    size = sources.parts["unet"].config.get("sample_size") or find_family(family).default_size // latent_scale(sources)
    sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, list) else ()
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        where = sources.parts["unet"].folder / "config.json"
        raise WeightsError(f"{where} has sample_size {size!r}, expected a number or [height, width]: correct it")
    height, width = (side * latent_scale(sources) for side in sides)
    return height, width
