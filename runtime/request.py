"""What a call asks for, checked against what the bundle can do."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ..engines import Manifest
from ..engines.manifest import ImageShapes, Range
from ..errors import RequestError
from ..samplers.numbers import is_whole, real_number, whole_number
from .controls import Control

LARGEST_GUIDANCE = 50.0
LARGEST_SEED = 2**63 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One call, everything decided.

    Attributes:
        prompts: one for each image to draw before ``num_images_per_prompt``.
        negative_prompts: as many, or None if none were given.
        num_inference_steps: steps of the sampler's own schedule; None with ``timesteps``.
        timesteps: custom ones; None with ``num_inference_steps``.
        guidance_scale: above 1 for classifier-free guidance.
        seeds: one, or one for each image.
        controls: the ControlNets that take part.
    """

    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...] | None
    num_inference_steps: int | None
    timesteps: tuple[int, ...] | None
    eta: float
    guidance_scale: float
    height: int
    width: int
    num_images_per_prompt: int
    seeds: tuple[int, ...] | None
    controls: tuple[Control, ...] = ()

    @property
    def is_guided(self) -> bool:
        return self.guidance_scale > 1.0

    @property
    def steps(self) -> int:
        """Number of steps, however they were asked for."""
        return len(self.timesteps) if self.timesteps is not None else self.num_inference_steps or 0

    @property
    def batch(self) -> int:
        """Number of images."""
        return len(self.prompts) * self.num_images_per_prompt


def make_request(
    manifest: Manifest,
    prompt: str | Sequence[str],
    *,
    negative_prompt: str | Sequence[str] | None,
    num_inference_steps: int | None,
    timesteps: Sequence[int] | None,
    eta: float | None,
    guidance_scale: float | None,
    height: int | None,
    width: int | None,
    num_images_per_prompt: int,
    seed: int | Sequence[int] | None,
    force: bool,
    controls: tuple[Control, ...] = (),
    bundle_shapes: ImageShapes | None = None,
    engines: str = "",
) -> Request:
    """Fill in what a call left out from the manifest, and check the rest.

    The manifest may be narrower than the bundle's own, because its engines are: ``bundle_shapes`` and ``engines``,
    their name, are for the message that says so.

    Raises:
        RequestError: an argument is out of range, or the checkpoint was not distilled for so many steps.
    """
    prompts = _prompts(prompt)
    sampler = manifest.sampler
    if num_inference_steps is None and timesteps is None:
        num_inference_steps = sampler.num_inference_steps
    steps = _check_steps(manifest, num_inference_steps, timesteps, force)
    if timesteps is None and sampler.timesteps is not None and steps == len(sampler.timesteps):
        timesteps = sampler.timesteps
    height, width = image_size(manifest, bundle_shapes or manifest.shapes, engines, height, width)
    images = whole_number("num_images_per_prompt", num_images_per_prompt, 1, 1024)
    return Request(
        prompts=prompts,
        negative_prompts=_negative_prompts(negative_prompt, prompts),
        num_inference_steps=None if timesteps is not None else steps,
        timesteps=None if timesteps is None else tuple(timesteps),
        eta=sampler.eta if eta is None else real_number("eta", eta, 0.0, 1.0),
        guidance_scale=sampler.guidance_scale
        if guidance_scale is None
        else real_number("guidance_scale", guidance_scale, 0.0, LARGEST_GUIDANCE),
        height=height,
        width=width,
        num_images_per_prompt=images,
        seeds=_seeds(seed, len(prompts) * images),
        controls=controls,
    )


def _prompts(prompt: Any, name: str = "prompt") -> tuple[str, ...]:
    prompts = (prompt,) if isinstance(prompt, str) else tuple(prompt) if isinstance(prompt, (list, tuple)) else ()
    if not prompts or not all(isinstance(text, str) for text in prompts):
        raise RequestError(f"{name}: expected a string or a list of strings, got {prompt!r}")
    for text in prompts:
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise RequestError(f"{name} {text!r} is not valid Unicode: expected text without lone surrogates")
    return prompts


def _negative_prompts(negative: Any, prompts: tuple[str, ...]) -> tuple[str, ...] | None:
    if negative is None:
        return None
    negatives = _prompts(negative, "negative_prompt")
    if isinstance(negative, str):
        negatives *= len(prompts)
    if len(negatives) != len(prompts):
        raise RequestError(f"negative_prompt: expected one or {len(prompts)}, as prompts, got {len(negatives)}")
    return negatives


def _check_steps(
    manifest: Manifest, num_inference_steps: int | None, timesteps: Sequence[int] | None, force: bool
) -> int:
    """The number of steps, if the checkpoint was distilled for it."""
    if timesteps is not None and not isinstance(timesteps, (list, tuple)):
        raise RequestError(f"timesteps {timesteps!r}: expected a list of whole numbers")
    steps = (
        len(timesteps) if timesteps is not None else whole_number("num_inference_steps", num_inference_steps, 1, 1000)
    )
    if timesteps is not None and num_inference_steps not in (None, steps):
        raise RequestError(f"num_inference_steps {num_inference_steps} and {steps} timesteps: give one of the two")
    allowed = sorted(manifest.sampler.allowed_steps)
    if steps not in allowed and not force:
        is_run = len(allowed) > 2 and allowed == list(range(allowed[0], allowed[-1] + 1))
        named = f"{allowed[0]} to {allowed[-1]}" if is_run else " or ".join(map(str, allowed))
        raise RequestError(
            f"{manifest.checkpoint} was not distilled for {steps} steps: expected {named}; "
            "force=True (--force) draws anyway"
        )
    return steps


def image_size(
    manifest: Manifest, wide: ImageShapes, engines: str, height: int | None, width: int | None
) -> tuple[int, int]:
    """Height and width of what is drawn, the usual ones where they are left out.

    Raises:
        RequestError: they are outside the bundle's shapes ``wide``, or what its ``engines`` were built for.
    """
    shapes = manifest.shapes
    return (
        _side(manifest, shapes.height, wide.height, engines, height),
        _side(manifest, shapes.width, wide.width, engines, width),
    )


def _side(manifest: Manifest, allowed: Range, wide: Range, engines: str, extent: int | None) -> int:
    """A side, if it is in the range ``allowed``, which is the bundle's ``wide`` or the part that ``engines`` take."""
    if extent is None:
        return allowed.opt
    multiple = manifest.vae.spatial
    if not is_whole(extent):
        raise RequestError(f"{allowed.name} {extent!r}: expected a whole number of pixels")
    if extent % multiple:
        nearest = min(max(round(extent / multiple) * multiple, allowed.min), allowed.max)
        raise RequestError(f"{allowed.name} {extent} is not a multiple of {multiple}: take {nearest}")
    if not wide.min <= extent <= wide.max:
        raise RequestError(
            f"{wide.name} {extent} is outside this bundle's {wide}: export one with another --size, or with --dynamic"
        )
    if not allowed.min <= extent <= allowed.max:
        raise RequestError(
            f"{allowed.name} {extent} is outside what the engines {engines} were built for ({allowed}): take others "
            "with --target (target=), build some with `hypersd build`, or take --backend onnxruntime (backend=)"
        )
    return int(extent)


def _seeds(seed: Any, batch: int) -> tuple[int, ...] | None:
    if seed is None:
        return None
    seeds = tuple(seed) if isinstance(seed, (list, tuple)) else (seed,)
    if isinstance(seed, (list, tuple)) and len(seeds) != batch:
        raise RequestError(f"seed: expected one, or {batch}, as images, got {len(seeds)}")
    return tuple(whole_number("seed", one, 0, LARGEST_SEED) for one in seeds)
