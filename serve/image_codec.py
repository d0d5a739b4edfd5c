"""Decodes control images from clients, and encodes images for them."""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Mapping
from typing import Any

from PIL import Image

from ..errors import RequestError
from ..runtime.image_files import reading, to_rgb
from ..runtime.metadata import png_info

FORMATS = ("PNG", "JPEG", "WEBP")  # Pillow's other formats are not tried: their readers are a risk without a use
DATA_URL = re.compile(r"data:image/(?:png|jpe?g|webp);base64,", re.IGNORECASE)
SHOWN = "control_image"  # the name in error messages
QUALITY = 90
PNG_LEVEL = 1  # of 9: five times as fast as the default 6, for files a tenth larger


def decode_control_image(text: str, most_pixels: int) -> Image.Image:
    """A control image in base64, or in a data: URL, as 8-bit RGB, whole and upright.

    Raises:
        RequestError: the image is damaged, too large or of another format.
    """
    prefix = DATA_URL.match(text)
    if prefix is None and ":" in text[:64]:
        raise RequestError(f"{SHOWN}: addresses are not opened: expected base64, or data:image/png;base64,...")
    try:
        data = base64.b64decode(text[prefix.end() :] if prefix else text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{SHOWN} is not valid base64: expected a PNG, JPEG or WebP file in base64") from error
    return read_control_image(data, most_pixels)


def read_control_image(data: bytes, most_pixels: int) -> Image.Image:
    """A control image's file as 8-bit RGB, whole and upright.

    Raises:
        RequestError: the image is damaged, too large or of another format.
    """
    with reading(SHOWN), Image.open(io.BytesIO(data), formats=FORMATS) as image:
        if image.width * image.height > most_pixels:
            raise RequestError(f"{image.width}x{image.height} pixels: expected at most {most_pixels} in all")
        return to_rgb(image)


def encode(image: Image.Image, output_format: str, quality: int | None, metadata: Mapping[str, Any]) -> bytes:
    """A finished image as a file; PNGs carry their settings, as files of ``hypersd generate`` do."""
    file = io.BytesIO()
    if output_format == "png":
        image.save(file, "PNG", pnginfo=png_info(metadata), compress_level=PNG_LEVEL)
    else:
        image.save(file, output_format.upper(), quality=QUALITY if quality is None else quality)
    return file.getvalue()
