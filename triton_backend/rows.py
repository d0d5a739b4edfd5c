"""Tensors of a Triton request as requests: every row of the batch is one image."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..engines import Manifest
from ..errors import RequestError
from ..runtime.params import Params
from ..serve.image_codec import decode_image, decode_mask
from ..serve.service_request import ServiceRequest
from ..serve.settings import ServeSettings
from .config import (
    ADAPTERS,
    CONTROL_IMAGE,
    CONTROL_NUMBERS,
    IMAGE,
    IMAGE_NUMBERS,
    KEEP_STEPS,
    MASK_IMAGE,
    NEGATIVE_PROMPT,
    NUMBERS,
    PROMPT,
    SEED,
    WHOLE,
)

MOST_PIXELS = ServeSettings().max_pixels


def read_requests(model: str, manifest: Manifest, tensors: Mapping[str, np.ndarray]) -> list[ServiceRequest]:
    """Read a Triton request: a request for one image from every row.

    Args:
        model: the bundle's name.
        manifest: the bundle's.
        tensors: the request's inputs by name, with their batch dimension.

    Raises:
        RequestError: a prompt is not text, or an image cannot be read.
    """
    return [_read_row(model, manifest, tensors, row) for row in range(len(tensors[PROMPT]))]


def _read_row(model: str, manifest: Manifest, tensors: Mapping[str, np.ndarray], row: int) -> ServiceRequest:
    values = {name: tensor[row].reshape(-1).tolist() for name, tensor in tensors.items()}
    settings: dict[str, Any] = {
        argument: _number(name, tensors[name][row].reshape(-1)[0])
        for name, argument in (NUMBERS | CONTROL_NUMBERS | IMAGE_NUMBERS).items()
        if name in tensors
    }
    control = _control_images(list(manifest.controlnets), values.get(CONTROL_IMAGE, []))
    files = {name: bytes(values[name][0]) for name in (IMAGE, MASK_IMAGE) if name in values and values[name][0]}
    _check_lonely(tensors, control, files)
    if IMAGE in files:
        settings.setdefault("keep_steps", True)  # as over HTTP
        settings["image"] = decode_image(IMAGE, files[IMAGE], MOST_PIXELS)
    if MASK_IMAGE in files:
        settings["mask_image"] = decode_mask(MASK_IMAGE, files[MASK_IMAGE], MOST_PIXELS)
    return ServiceRequest(
        model=model,
        params=Params(
            prompt=_text(PROMPT, values[PROMPT][0]),
            negative_prompt=_text(NEGATIVE_PROMPT, values[NEGATIVE_PROMPT][0]) if NEGATIVE_PROMPT in values else None,
            seed=(values[SEED][0] if SEED in values else secrets.randbits(32),),
            control_image=control or None,
            adapters=_strengths(values[ADAPTERS][0]) if ADAPTERS in values else None,
            **settings,
        ),
    )


def _check_lonely(tensors: Mapping[str, np.ndarray], control: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    """Reject inputs that are about an image without it."""
    for image, words, is_given, names in (
        (CONTROL_IMAGE, "a control image", bool(control), CONTROL_NUMBERS),
        (IMAGE, "an init image", IMAGE in files, (*IMAGE_NUMBERS, *({MASK_IMAGE} & files.keys()))),
    ):
        if not is_given and (idle := sorted({*names} & tensors.keys())):
            raise RequestError(f"{idle[0]} is about {words}: expected {image} with it")


def _number(name: str, value: Any) -> float | int:
    """The intended number: float32 0.3 is 0.30000001192092896, which would give another image than 0.3."""
    if name == KEEP_STEPS:
        return bool(value)
    return int(value) if name in WHOLE else float(str(value))


def _text(name: str, value: bytes | str) -> str:
    if isinstance(value, str):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"{name} is not UTF-8 ({error.reason}): expected text in it") from error


def _strengths(value: bytes | str) -> dict[str, Any]:
    """The strengths of LoRAs by name, in JSON; none if it is empty."""
    text = _text(ADAPTERS, value)
    try:
        given = json.loads(text or "{}")
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        raise RequestError('adapters: expected strengths by name in JSON, such as {"style": 0.8}')
    return given


def _control_images(names: Sequence[str], files: Sequence[bytes]) -> dict[str, Image.Image]:
    pairs = zip(names, files, strict=False)  # no files without images
    return {name: decode_image(CONTROL_IMAGE, bytes(file), MOST_PIXELS) for name, file in pairs if file}
