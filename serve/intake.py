"""Reads the body of an HTTP or live request: limits of the service, defaults of the API, images."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from PIL import Image

from ..errors import RequestError
from ..runtime.params import LARGEST_SEED, Params
from .image_codec import decode_image, decode_image_and_alpha, decode_mask
from .schemas import EditRequest, GenerationRequest, ModelCard
from .service_errors import UnknownModelError
from .service_request import ServiceRequest
from .settings import ServeSettings

ALPHA = "alpha"  # in place of a mask: the transparent pixels of the image
#: fields that have no effect without another
NEEDED = {
    "control_image": ("control_scale", "control_start", "control_end", "preprocess"),
    "image": ("mask", "strength", "keep_steps"),
}


def read_request(body: GenerationRequest, cards: Sequence[ModelCard], settings: ServeSettings) -> ServiceRequest:
    """Turn a body into a request. Decodes its images, which takes milliseconds.

    Raises:
        RequestError: the body exceeds the service's limits, or an image cannot be read.
    """
    for name in ("prompt", "negative_prompt"):
        if len(getattr(body, name) or "") > settings.max_prompt:
            raise RequestError(f"{name}: {len(getattr(body, name))} characters: expected at most {settings.max_prompt}")
    if body.n > settings.max_count:
        raise RequestError(f"n {body.n}: expected 1 to {settings.max_count}")
    width, height = _size(body.size)
    card = _card(body.model, cards)
    _check_lonely(body)
    seeds = _seeds(body.seed, body.n)
    params = Params(
        prompt=body.prompt,
        negative_prompt=body.negative_prompt,
        num_inference_steps=body.steps,
        eta=body.eta,
        guidance_scale=body.guidance_scale,
        height=height,
        width=width,
        num_images_per_prompt=len(seeds),
        seed=seeds,
        control_image=_control_images(body, card, settings) or None,
        controlnet_conditioning_scale=body.control_scale,
        control_guidance_start=body.control_start,
        control_guidance_end=body.control_end,
        resize_mode=body.resize_mode or "crop",
        adapters=body.adapters,
        **_init_image(body, card, settings),
    )
    return ServiceRequest(model=card.id, params=params, preprocess=body.preprocess)


def _card(model: str | None, cards: Sequence[ModelCard]) -> ModelCard:
    """The bundle that the body names, or the first."""
    for card in cards:
        if model in (None, card.id):
            return card
    raise UnknownModelError(f"model {model!r} is not served here: expected {' or '.join(card.id for card in cards)}")


def _size(size: str | None) -> tuple[int | None, int | None]:
    if size in (None, "auto"):
        return None, None
    width, _, height = size.partition("x")
    return int(width), int(height)


def _seeds(seed: int | None, count: int) -> tuple[int, ...]:
    first = secrets.randbits(32) if seed is None else seed
    if first + count - 1 > LARGEST_SEED:
        raise RequestError(f"seed {first} with n {count}: the last seed is above {LARGEST_SEED}")
    return tuple(range(first, first + count))


def _check_lonely(body: GenerationRequest) -> None:
    """Reject fields that have no effect without an image."""
    for image, fields in NEEDED.items():
        for name in fields:
            if getattr(body, image) is None and getattr(body, name) is not None:
                raise RequestError(f"{name} has no effect without {image}: send {image}, or leave {name} out")
    if body.image is None and body.control_image is None and body.resize_mode is not None:
        raise RequestError("resize_mode has no effect without image or control_image: leave it out")


def _init_image(body: GenerationRequest, card: ModelCard, settings: ServeSettings) -> dict[str, Any]:
    """The params about the init image and the mask."""
    if body.image is None:
        return {}
    if not card.has_encoder:
        raise RequestError(f"image: {card.id} was exported with --text-only: export it again without, or leave it out")
    image, alpha = decode_image_and_alpha("image", body.image, settings.max_pixels)
    mask = _mask(body, alpha, settings)
    if mask is None:
        for name in ("padding_mask_crop", "mask_blur"):
            if getattr(body, name) is not None:
                raise RequestError(f"{name} has no effect without a mask: send mask, or leave {name} out")
    return {
        "image": image,
        "mask_image": mask,
        "strength": body.strength,
        "keep_steps": body.keep_steps is not False,
        "padding_mask_crop": body.padding_mask_crop,
        "mask_blur": body.mask_blur or 0,
    }


def _mask(body: GenerationRequest, alpha: Image.Image | None, settings: ServeSettings) -> Image.Image | None:
    """The mask that the body names; for an edit without one the transparent pixels of the image, if there are any."""
    if body.mask is None:
        return alpha if isinstance(body, EditRequest) else None
    if body.mask == ALPHA:
        if alpha is None:
            raise RequestError("mask alpha: image has no transparent pixel: expected some where it is to be repainted")
        return alpha
    return decode_mask("mask", body.mask, settings.max_pixels)


def _control_images(body: GenerationRequest, card: ModelCard, settings: ServeSettings) -> dict[str, Image.Image]:
    if body.control_image is None:
        return {}
    names = [net.name for net in card.controlnets]
    if not names:
        raise RequestError(f"control_image: {card.id} has no ControlNet: leave control_image out")
    given = body.control_image
    if not isinstance(given, dict):
        if len(names) > 1:
            raise RequestError(f"control_image: expected an object with images for some of {', '.join(names)}")
        given = {names[0]: given}
    if unknown := sorted(given.keys() - {*names}):
        raise RequestError(f"control_image {unknown[0]!r}: {card.id} has no such ControlNet, it has {', '.join(names)}")
    return {name: decode_image("control_image", file, settings.max_pixels) for name, file in given.items()}
