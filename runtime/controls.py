"""The ControlNets of a call: their scales, their steps and their images."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..engines import Manifest
from ..engines.manifest import LARGEST_SCALE
from ..errors import RequestError
from ..samplers.numbers import real_number
from .image_tensors import to_tensor

PerControlNet = float | Sequence[float] | Mapping[str, float] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Control:
    """One ControlNet's part in a call.

    Attributes:
        name: the ControlNet's, in the bundle.
        conditioning_scale: factor of its residuals.
        start: the part of the steps, 0..1, before which it does not act.
        end: the part after which it does not act any more.
    """

    name: str
    conditioning_scale: float
    start: float
    end: float

    def is_active(self, step: int, steps: int) -> bool:
        """Whether it has an effect at a step, counted from 0: if all of the step's span lies between the two ends."""
        return self.conditioning_scale > 0 and step / steps >= self.start and (step + 1) / steps <= self.end


def make_controls(
    manifest: Manifest, images: Iterable[str], scale: PerControlNet, start: PerControlNet, end: PerControlNet
) -> tuple[Control, ...]:
    """The ControlNets of a call in the bundle's order.

    Args:
        manifest: the bundle's.
        images: names of the ControlNets that have an image.
        scale: a number for all of them, one for each of the bundle's, or some by name; the default is the
            manifest's.
        start: likewise, 0 where it is left out.
        end: likewise, 1 where it is left out.

    Raises:
        RequestError: a number is out of range, or there are more or fewer than ControlNets.
    """
    known, with_image = manifest.controlnets, {*images}
    names = [name for name in known if name in with_image]
    recommended = {name: settings.conditioning_scale for name, settings in known.items()}
    scales = _each("controlnet_conditioning_scale", scale, recommended, LARGEST_SCALE)
    starts = _each("control_guidance_start", start, dict.fromkeys(known, 0.0), 1.0)
    ends = _each("control_guidance_end", end, dict.fromkeys(known, 1.0), 1.0)
    for name in names:
        if starts[name] >= ends[name]:
            raise RequestError(
                f"control_guidance_start {starts[name]:g} and control_guidance_end {ends[name]:g} of {name}: expected "
                "the start before the end"
            )
    return tuple(
        Control(name=name, conditioning_scale=scales[name], start=starts[name], end=ends[name]) for name in names
    )


def _each(argument: str, value: Any, defaults: Mapping[str, float], most: float) -> dict[str, float]:
    """A number for every ControlNet of the bundle."""
    if value is None:
        return dict(defaults)
    if isinstance(value, Mapping):
        _check_names(argument, value, defaults)
        given = value
    elif isinstance(value, (list, tuple)):
        if len(value) != len(defaults):
            raise RequestError(
                f"{argument}: {len(value)} for {_count(defaults)}: expected one number for all, or one for each"
            )
        given = dict(zip(defaults, value, strict=True))
    else:
        given = dict.fromkeys(defaults, value)
    return {**defaults, **{name: real_number(argument, number, 0.0, most) for name, number in given.items()}}


def images_by_name(manifest: Manifest, image: Any) -> dict[str, Any]:
    """Control images by the ControlNet's name, in the bundle's order.

    Args:
        manifest: the bundle's.
        image: as a call has it: the one ControlNet's image or images; of several a list with one entry for each,
            or a list for each prompt of such lists, as in diffusers; or some by name.

    Raises:
        RequestError: the bundle has no ControlNet, not as many, or none of that name.
    """
    names = list(manifest.controlnets)
    if not names:
        raise RequestError(
            f"control_image: {manifest.checkpoint} was exported without a ControlNet: export with --controlnet"
        )
    if isinstance(image, Mapping):
        _check_names("control_image", image, manifest.controlnets)
        if not image:
            raise RequestError(f"control_image: no image in it: expected some for {', '.join(names)}")
        return {name: image[name] for name in names if name in image}
    if len(names) == 1:
        return {names[0]: image}
    if not isinstance(image, (list, tuple)) or not image:
        raise RequestError(f"control_image: one for {_count(names)}: expected a list of one for each, or some by name")
    if isinstance(image[0], (list, tuple)):  # a list of all ControlNets' for each prompt
        if any(not isinstance(row, (list, tuple)) or len(row) != len(names) for row in image):
            raise RequestError(f"control_image: lists that do not all hold one for each of {_count(names)}")
        image = [list(column) for column in zip(*image, strict=True)]
    if len(image) != len(names):
        raise RequestError(f"control_image: {len(image)} for {_count(names)}: expected one for each, or some by name")
    return dict(zip(names, image, strict=True))


def make_conditions(
    images: Mapping[str, Any], width: int, height: int, resize_mode: str, prompts: int
) -> dict[str, Tensor]:
    """The images as ControlNets take them, float32 [1 or prompts, 3, H, W] in 0..1, by the ControlNet's name.

    Raises:
        RequestError: one is no image, or there are neither one nor as many as prompts for a ControlNet.
    """
    conditions = {}
    for name, image in images.items():
        try:
            # Inpainting ControlNets mark pixels to repaint with -1.
            conditions[name] = to_tensor(image, width, height, resize_mode, least=-1.0)
        except RequestError as error:
            raise RequestError(f"{name}: {error}") from error
        if (count := len(conditions[name])) not in (1, prompts):
            raise RequestError(
                f"{name}: {count} control images and {prompts} prompts: expected one for all, or as many"
            )
    return conditions


def _check_names(argument: str, given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    if unknown := [repr(name) for name in given if name not in known]:
        raise RequestError(f"{argument}: the bundle has no ControlNet {', '.join(unknown)}, it has {', '.join(known)}")


def _count(names: Iterable[str]) -> str:
    names = list(names)
    return f"{len(names)} ControlNet{'s' if len(names) > 1 else ''} ({', '.join(names)})"
