"""The sampler's constants, as diffusers derives them from the base's scheduler."""

from __future__ import annotations

from typing import Any

from ..errors import WeightsError, one_line
from ..samplers import find_sampler

# The constants that change a step; diffusers' configurations hold more.
CONSTANTS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "clip_sample",
    "clip_sample_range",
    "set_alpha_to_one",
    "steps_offset",
    "prediction_type",
    "thresholding",
    "timestep_spacing",
    "rescale_betas_zero_snr",
    "original_inference_steps",
    "timestep_scaling",
)


def scheduler_constants(kind: str, base_config: dict[str, Any]) -> dict[str, Any]:
    """The configuration that ``SCHEDULER.from_config(base)`` gives, as Hyper-SD's model card makes it.

    Args:
        kind: the sampler's name, ``"ddim"``, ``"tcd"`` or ``"lcm"``.
        base_config: the base's ``scheduler_config.json``.

    Raises:
        WeightsError: diffusers makes no scheduler of it.
    """
    import diffusers

    sampler = find_sampler(kind)
    scheduler_class = getattr(diffusers, sampler.scheduler_class)
    try:
        config = scheduler_class.from_config(dict(base_config), **sampler.scheduler_settings).config
    except Exception as error:  # whatever the constructor stumbles over
        raise WeightsError(f"the base's scheduler_config.json makes no scheduler: {one_line(error)}") from error
    return {key: config[key] for key in CONSTANTS if key in config}
