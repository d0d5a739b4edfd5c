"""Where a run starts: from noise, an init image or a masked one; and the steps that its strength leaves."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..engines import Manifest
from ..errors import RequestError
from ..samplers import make_sampler
from ..samplers.numbers import real_number
from .request import StartsFrom

if TYPE_CHECKING:
    from .params import Params

IMAGE_STRENGTH, MASK_STRENGTH = 0.8, 1.0  # diffusers' defaults for SD1.5
SMALLEST_STRENGTH = 1e-6
STRENGTH_DIGITS = 4  # of the smallest strength that an error names


def find_start(manifest: Manifest, params: Params) -> StartsFrom:
    """Where a run starts. A UNet with channels for a mask always has one; white everywhere, if none is given.

    Raises:
        RequestError: a mask or a strength comes without an image, or the bundle cannot encode images.
    """
    if params.image is None:
        needed_by = {
            "mask_image": params.mask_image is not None,
            "strength": params.strength is not None,
            "keep_steps": params.keep_steps,
        }
        if lonely := [name for name, is_given in needed_by.items() if is_given]:
            raise RequestError(f"{lonely[0]}: expected an image with it (image=, --image)")
    if params.mask_image is None:
        for name, is_given in {
            "padding_mask_crop": params.padding_mask_crop is not None,
            "mask_blur": params.mask_blur != 0,
        }.items():
            if is_given:
                raise RequestError(f"{name}: expected a mask with it (mask_image=, --mask)")
    if params.image is None and not manifest.is_inpainting:
        return "noise"
    if not manifest.has_encoder:
        raise RequestError(
            f"image: {manifest.checkpoint} was exported without a VAE encoder: export it again without --text-only"
        )
    return "mask" if manifest.is_inpainting or params.mask_image is not None else "image"


def find_strength(params: Params) -> float:
    """The strength of a run, 1 where it starts from noise.

    Raises:
        RequestError: it is not a number above 0 and at most 1.
    """
    if params.image is None:
        return 1.0
    if params.strength is None:
        return IMAGE_STRENGTH if params.mask_image is None else MASK_STRENGTH
    if params.strength == 0:
        raise RequestError("strength 0 would give the image back unchanged: expected a number above 0, at most 1")
    return real_number("strength", params.strength, SMALLEST_STRENGTH, 1.0)


def first_step(steps: int, strength: float, keep_steps: bool) -> int:
    """The number of steps that are left out at the beginning; diffusers' ``get_timesteps``.

    Raises:
        RequestError: no step would be left.
    """
    if keep_steps:
        return 0
    kept = min(int(steps * strength), steps)
    if kept < 1:
        raise RequestError(
            f"strength {strength:g} of {steps} step{'s' if steps > 1 else ''} leaves none: expected at least "
            f"{_smallest_strength(steps):g}, or keep_steps=True (--keep-steps) to run all of them from there"
        )
    return steps - kept


def check_spread(
    manifest: Manifest, num_inference_steps: int | None, timesteps: tuple[int, ...] | None, strength: float
) -> None:
    """Check that all steps fit into the part of the schedule that ``strength`` leaves.

    Raises:
        RequestError: they do not.
    """
    sampler = make_sampler(manifest.sampler.kind, **manifest.scheduler)
    try:
        sampler.timesteps(num_inference_steps, timesteps, strength)
    except RequestError as error:
        raise RequestError(f"keep_steps with strength {strength:g}: {error}; take a higher strength") from error


def _smallest_strength(steps: int) -> float:
    """The smallest strength of a few digits that leaves one step."""
    unit = 10**STRENGTH_DIGITS
    return math.ceil(unit / steps) / unit
