"""Decodes images from clients, and encodes images for them."""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from PIL import Image

from ..errors import RequestError
from ..runtime.image_files import alpha_mask, reading, to_rgb
from ..runtime.metadata import png_info

FORMATS = ("PNG", "JPEG", "WEBP")  # Pillow's other formats are not tried: their readers are a risk without a use
DATA_URL = re.compile(r"data:image/(?:png|jpe?g|webp);base64,", re.IGNORECASE)
QUALITY = 90
PNG_LEVEL = 1  # of 9: five times as fast as the default 6, for files a tenth larger


def decode_image(name: str, content: str | bytes, most_pixels: int) -> Image.Image:
    """An image as 8-bit RGB, whole and upright.

    Args:
        name: the image's, for error messages.
        content: a file's bytes, or the same in base64 or in a data: URL.
        most_pixels: the most that it may have.

    Raises:
        RequestError: the image is damaged, too large or of another format.
    """
    with _opened(name, content, most_pixels) as image:
        return to_rgb(image)


def decode_image_and_alpha(name: str, content: str | bytes, most_pixels: int) -> tuple[Image.Image, Image.Image | None]:
    """The same, and the mask that its transparent pixels make: white where they are; None if all are opaque."""
    with _opened(name, content, most_pixels) as image:
        return to_rgb(image), alpha_mask(image)


def decode_mask(name: str, content: str | bytes, most_pixels: int) -> Image.Image:
    """A mask, white where the image is repainted: the transparent pixels, or if all are opaque the white ones."""
    with _opened(name, content, most_pixels) as image:
        return alpha_mask(image) or to_rgb(image).convert("L")


@contextmanager
def _opened(name: str, content: str | bytes, most_pixels: int) -> Iterator[Image.Image]:
    data = _decoded(name, content) if isinstance(content, str) else content
    if not data:
        raise RequestError(f"{name} is empty: expected a PNG, JPEG or WebP file")
    with reading(name), Image.open(io.BytesIO(data), formats=FORMATS) as image:
        if image.width * image.height > most_pixels:
            raise RequestError(f"{image.width}x{image.height} pixels: expected at most {most_pixels} in all")
        yield image


def _decoded(name: str, text: str) -> bytes:
    prefix = DATA_URL.match(text)
    if prefix is None and ":" in text[:64]:
        raise RequestError(f"{name}: addresses are not opened: expected base64, or data:image/png;base64,...")
    try:
        return base64.b64decode(text[prefix.end() :] if prefix else text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{name} is not valid base64: expected a PNG, JPEG or WebP file in base64") from error


def encode(image: Image.Image, output_format: str, quality: int | None, metadata: Mapping[str, Any]) -> bytes:
    """A finished image as a file; PNGs carry their settings, as files of ``hypersd generate`` do."""
    file = io.BytesIO()
    if output_format == "png":
        image.save(file, "PNG", pnginfo=png_info(metadata), compress_level=PNG_LEVEL)
    else:
        image.save(file, output_format.upper(), quality=QUALITY if quality is None else quality)
    return file.getvalue()
