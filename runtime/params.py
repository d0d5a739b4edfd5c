"""The arguments of an image, all optional but the prompt, and the decisions that turn them into a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..engines import Manifest
from ..engines.manifest import LARGEST_GUIDANCE
from ..engines.specs import ImageShapes, Range
from ..errors import RequestError
from ..samplers.noise import Generators
from ..samplers.numbers import is_whole, real_number, whole_number
from .adapters import ChosenAdapter, choose_adapters
from .controls import Control, PerControlNet, images_by_name, make_controls
from .image_files import check_resize_mode
from .pixels import check_output_type
from .request import Request
from .strength import check_spread, find_start, find_strength, first_step

LARGEST_SEED = 2**63 - 1
MOST_IMAGES_PER_PROMPT = 1024


@dataclass(frozen=True, kw_only=True)
class Params:
    """The arguments of an image under diffusers' names; the manifest decides on those that are None.

    Attributes:
        prompt: a text, or a list of texts for several images.
        negative_prompt: text to keep away from; without effect unless ``guidance_scale`` is above 1.
        num_inference_steps: number of steps, one that the checkpoint was distilled for.
        timesteps: custom timesteps instead, strictly descending.
        eta: 0..1, stochasticity (DDIM's eta, TCD's gamma).
        guidance_scale: classifier-free guidance; 1 or less means none, at half the cost.
        height: in pixels, inside the bundle's range.
        width: in pixels, inside the bundle's range.
        num_images_per_prompt: images for each prompt.
        seed: short for a CPU generator of that seed (the same images on every device); a list holds one for
            each image, which then does not depend on its neighbours.
        generator: a ``torch.Generator``, or a list of one for each image.
        latents: unit-variance noise [B, 4, height/8, width/8] to start from.
        output_type: ``"pil"``, ``"np"``, ``"pt"`` or ``"latent"``.
        control_image: a ``PIL.Image`` of any size, an array [H, W, 3] or a tensor [3, H, W] of floats in 0..1 of the
            output size, or a list of one for each prompt. For several ControlNets a list of one for each, or a dict
            of some by name. No ControlNet runs without one. Unlike in diffusers it does not decide the output size.
        controlnet_conditioning_scale: strength of the ControlNets, 0 for none: a number for all, a list of one for
            each, or a dict of some by name.
        control_guidance_start: fraction of the steps, 0..1, before which they do not act (default: 0); likewise.
        control_guidance_end: fraction of the steps after which they do not act (default: 1); likewise.
        image: the init image: a ``PIL.Image`` of any size, an array [H, W, 3] or a tensor [3, H, W] of floats in 0..1
            of the output size, or a list of one for each prompt. Like a control image it does not decide the output
            size, unlike in diffusers.
        mask_image: the mask, likewise with one channel that counts: white is repainted, black keeps the init image.
        strength: above 0 to 1, how far the init image is turned into noise (default: 0.8, with a mask 1). Of N steps
            the last ``int(N * strength)`` run.
        keep_steps: run all steps, over the part of the schedule that ``strength`` leaves: ``strength`` of
            ``set_timesteps`` in diffusers' TCD and LCM schedulers.
        padding_mask_crop: repaint at full size only the masked part of the image and so many pixels around it, and put
            it into the image, which may have any size; for ``output_type="pil"``.
        mask_blur: radius in pixels by which the edge of the mask is blurred, in the mask's own size.
        resize_mode: ``"crop"`` keeps the aspect of the images given and cuts off the rest, ``"stretch"`` (``"default"``
            in diffusers) distorts them, ``"fill"`` keeps everything and fills the rest with the colours of the edge.
        adapters: strengths, -10..10, of loaded LoRAs by name; others have no part in the image. Unlike in diffusers
            nothing acts because it is loaded. Or the adapters of a request that was decided, with their files.
        force: allow numbers of steps that the checkpoint was not distilled for.
    """

    prompt: str | Sequence[str]
    negative_prompt: str | Sequence[str] | None = None
    num_inference_steps: int | None = None
    timesteps: Sequence[int] | None = None
    eta: float | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    num_images_per_prompt: int = 1
    seed: int | Sequence[int] | None = None
    generator: Generators = None
    latents: Tensor | None = None
    output_type: str = "pil"
    control_image: Any = None
    controlnet_conditioning_scale: PerControlNet = None
    control_guidance_start: PerControlNet = None
    control_guidance_end: PerControlNet = None
    image: Any = None
    mask_image: Any = None
    strength: float | None = None
    keep_steps: bool = False
    padding_mask_crop: int | None = None
    mask_blur: int = 0
    resize_mode: str = "crop"
    adapters: Mapping[str, float] | tuple[ChosenAdapter, ...] | None = None
    force: bool = False


def decide(manifest: Manifest, params: Params, bundle_shapes: ImageShapes | None = None, engines: str = "") -> Request:
    """Check params against a manifest, and fill in its defaults.

    Of a control image only the ControlNet's name counts here, not the pixels.

    Args:
        manifest: the bundle's, or a part of it: narrowed to the shapes that its engines were built for.
        params: the arguments.
        bundle_shapes: the shapes of the whole bundle, if ``manifest`` is narrower; for the message that says so.
        engines: the name of the engines that made it narrower, for the same message.

    Raises:
        RequestError: an argument is out of range, or the checkpoint was not distilled for so many steps.
    """
    check_output_type(params.output_type)
    check_resize_mode(params.resize_mode)
    if params.seed is not None and params.generator is not None:
        raise RequestError("seed and generator: give one of the two")
    prompts = _prompts("prompt", params.prompt)
    sampler = manifest.sampler
    num_inference_steps, timesteps = _schedule(manifest, params)
    wide = bundle_shapes or manifest.shapes
    images = whole_number("num_images_per_prompt", params.num_images_per_prompt, 1, MOST_IMAGES_PER_PROMPT)
    eta, guidance_scale = params.eta, params.guidance_scale
    starts_from, strength = find_start(manifest, params), find_strength(params)
    if params.keep_steps:
        check_spread(manifest, num_inference_steps, timesteps, strength)
    return Request(
        prompts=prompts,
        negative_prompts=_negative_prompts(params.negative_prompt, prompts),
        num_inference_steps=num_inference_steps,
        timesteps=timesteps,
        eta=sampler.eta if eta is None else real_number("eta", eta, 0.0, 1.0),
        guidance_scale=sampler.guidance_scale
        if guidance_scale is None
        else real_number("guidance_scale", guidance_scale, 0.0, LARGEST_GUIDANCE),
        height=_side(manifest, manifest.shapes.height, wide.height, engines, params.height),
        width=_side(manifest, manifest.shapes.width, wide.width, engines, params.width),
        num_images_per_prompt=images,
        seeds=_seeds(params.seed, len(prompts) * images),
        controls=_controls(manifest, params),
        adapters=choose_adapters(manifest, params.adapters),
        starts_from=starts_from,
        strength=strength,
        keep_steps=params.keep_steps,
        first_step=first_step(num_inference_steps or len(timesteps or ()), strength, params.keep_steps),
    )


def _prompts(name: str, given: Any) -> tuple[str, ...]:
    prompts = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, (list, tuple)) else ()
    if not prompts or not all(isinstance(text, str) for text in prompts):
        raise RequestError(f"{name}: expected a string or a list of strings, got {given!r}")
    for text in prompts:
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise RequestError(f"{name} {text!r} is not valid Unicode: expected text without lone surrogates")
    return prompts


def _negative_prompts(given: Any, prompts: tuple[str, ...]) -> tuple[str, ...] | None:
    if given is None:
        return None
    negatives = _prompts("negative_prompt", given)
    if isinstance(given, str):
        negatives *= len(prompts)
    if len(negatives) != len(prompts):
        raise RequestError(f"negative_prompt: expected one or {len(prompts)}, as prompts, got {len(negatives)}")
    return negatives


def _schedule(manifest: Manifest, params: Params) -> tuple[int | None, tuple[int, ...] | None]:
    """``num_inference_steps`` and ``timesteps``: exactly one of the two is not None."""
    steps, timesteps, sampler = params.num_inference_steps, params.timesteps, manifest.sampler
    if timesteps is not None and not isinstance(timesteps, (list, tuple)):
        raise RequestError(f"timesteps {timesteps!r}: expected a list of whole numbers")
    if steps is None:
        steps = sampler.num_inference_steps if timesteps is None else len(timesteps)
    elif timesteps is not None and steps != len(timesteps):
        raise RequestError(f"num_inference_steps {steps} and {len(timesteps)} timesteps: give one of the two")
    if timesteps is None:
        steps = whole_number("num_inference_steps", steps, 1, 1000)
        if sampler.timesteps is not None and steps == len(sampler.timesteps):
            timesteps = sampler.timesteps
    if not params.force:
        _check_distilled(manifest, steps)
    return (steps, None) if timesteps is None else (None, tuple(timesteps))


def _check_distilled(manifest: Manifest, steps: int) -> None:
    allowed = sorted(manifest.sampler.allowed_steps)
    if steps in allowed:
        return
    is_run = len(allowed) > 2 and allowed == list(range(allowed[0], allowed[-1] + 1))
    named = f"{allowed[0]} to {allowed[-1]}" if is_run else " or ".join(map(str, allowed))
    raise RequestError(
        f"{manifest.checkpoint} was not distilled for {steps} steps: expected {named}; "
        "force=True (--force) generates anyway"
    )


def _side(manifest: Manifest, allowed: Range, wide: Range, engines: str, extent: int | None) -> int:
    """A side in pixels, if it is in the range ``allowed``: the bundle's range ``wide``, or the ``engines``' part."""
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


def _controls(manifest: Manifest, params: Params) -> tuple[Control, ...]:
    numbers = (params.controlnet_conditioning_scale, params.control_guidance_start, params.control_guidance_end)
    if params.control_image is not None:
        return make_controls(manifest, images_by_name(manifest, params.control_image), *numbers)
    if numbers != (None, None, None):
        raise RequestError("controlnet_conditioning_scale and control_guidance_*: expected a control_image with them")
    return ()
