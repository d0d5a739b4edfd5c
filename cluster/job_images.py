"""Images that a file of prompts names: paths beside the file, checked early and read where they are needed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import RequestError
from ..runtime.image_files import reading
from ..serve.image_codec import FORMATS
from ..serve.intake import ALPHA
from ..serve.schemas import GenerationRequest

FIELDS = ("image", "mask", "control_image")
PATH = "path:"  # begins the path of a file in place of its contents
LONGEST_PATH = 4096  # characters; a longer text is base64
BASE64 = ("data:", "iVBORw0KGgo", "/9j/", "UklGR")  # the beginnings of a data: URL, and of PNG, JPEG and WebP in base64


def with_paths(body: GenerationRequest, folder: Path) -> GenerationRequest:
    """The request with absolute paths in place of the paths relative to ``folder``; images in base64 stay.

    Raises:
        RequestError: there is no such file, or it is no image.
    """
    return _mapped(body, lambda name, value: _located(name, value, folder))


def with_digests(body: GenerationRequest) -> GenerationRequest:
    """The request with the SHA-256 of files in place of their paths."""
    return with_files(body, lambda path: hashlib.sha256(Path(path).read_bytes()).hexdigest())


def with_files(body: GenerationRequest, read: Callable[[str], Any]) -> GenerationRequest:
    """The request with what ``read(path)`` reads in place of the paths of files."""
    return _mapped(body, lambda _, value: read(value.removeprefix(PATH)) if value.startswith(PATH) else value)


def _mapped(body: GenerationRequest, change: Callable[[str, str], Any]) -> GenerationRequest:
    """The request with its images changed by ``change(field, image)``."""
    changed: dict[str, Any] = {}
    for name in FIELDS:
        value = getattr(body, name)
        if isinstance(value, dict):
            changed[name] = {inner: change(name, one) for inner, one in value.items()}
        elif value is not None:
            changed[name] = change(name, value)
    return body.model_copy(update=changed)


def _located(name: str, value: str, folder: Path) -> str:
    """An image's file by its absolute path, after :data:`PATH`; base64 and the word for a mask as they are."""
    if (name == "mask" and value == ALPHA) or value.startswith(BASE64) or len(value) > LONGEST_PATH:
        return value
    path = (folder / value).absolute()
    if not os.path.isfile(path):  # Path.is_file raises for a long name
        raise RequestError(f"{name} {value!r} is not there: expected the path of an image, relative to {folder}")
    with reading(f"{name} {value!r}"), Image.open(path, formats=FORMATS):
        return f"{PATH}{path}"
