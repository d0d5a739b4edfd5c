"""From a request's body to a drawing."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from PIL import Image

from ..errors import RequestError
from ..runtime.params import LARGEST_SEED
from .cards import ModelCard
from .image_codec import decode_control_image
from .schemas import GenerationRequest
from .service_errors import UnknownModelError
from .service_request import ControlSettings, DrawSettings, ServiceRequest
from .settings import ServeSettings


def read_request(body: GenerationRequest, cards: Sequence[ModelCard], settings: ServeSettings) -> ServiceRequest:
    """What a body asks for. Images in it are decoded, which takes milliseconds.

    Raises:
        RequestError: it is beyond the service's limits, or a control image is none.
    """
    for name in ("prompt", "negative_prompt"):
        if len(getattr(body, name) or "") > settings.max_prompt:
            raise RequestError(f"{name}: {len(getattr(body, name))} characters: expected at most {settings.max_prompt}")
    if body.n > settings.max_count:
        raise RequestError(f"n {body.n}: expected 1 to {settings.max_count}")
    width, height = _size(body.size)
    card = _card(body.model, cards)
    _check_lonely(body)
    return ServiceRequest(
        model=card.id,
        prompt=body.prompt,
        seeds=_seeds(body.seed, body.n),
        negative_prompt=body.negative_prompt,
        settings=DrawSettings(
            num_inference_steps=body.steps,
            eta=body.eta,
            guidance_scale=body.guidance_scale,
            height=height,
            width=width,
            controlnet_conditioning_scale=body.control_scale,
            control_guidance_start=body.control_start,
            control_guidance_end=body.control_end,
        ),
        control=_control_images(body, card, settings),
        control_settings=ControlSettings(preprocess=body.preprocess, resize_mode=body.resize_mode or "crop"),
    )


def _card(model: str | None, cards: Sequence[ModelCard]) -> ModelCard:
    """The bundle that is meant: the first if none is named."""
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
    """Refuse what has no effect without a control image."""
    if body.control_image is None:
        for name in ("control_scale", "control_start", "control_end", "preprocess", "resize_mode"):
            if getattr(body, name) is not None:
                raise RequestError(f"{name} is about a control image: expected control_image with it")


def _control_images(body: GenerationRequest, card: ModelCard, settings: ServeSettings) -> dict[str, Image.Image]:
    if body.control_image is None:
        return {}
    names = [net.name for net in card.controlnets]
    if not names:
        raise RequestError(f"control_image: {card.id} was exported without a ControlNet")
    given = body.control_image
    if isinstance(given, str):
        if len(names) > 1:
            raise RequestError(f"control_image: expected some by name, of {', '.join(names)}")
        given = {names[0]: given}
    if unknown := sorted(given.keys() - {*names}):
        raise RequestError(f"control_image {unknown[0]!r}: {card.id} has no such ControlNet, it has {', '.join(names)}")
    return {name: decode_control_image(text, settings.max_control_pixels) for name, text in given.items()}
