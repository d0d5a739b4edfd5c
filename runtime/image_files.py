"""Images that callers bring: opened, made upright 8-bit RGB, and fitted to the size of the output."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter, ImageOps, UnidentifiedImageError

from ..errors import RequestError, one_line

SMALLEST_SIDE = 8  # pixels: one latent
RESIZE_MODES = ("crop", "stretch", "fill")
DEEP_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")  # 16 bits a pixel, grey; Pillow makes 8 of 16-bit colour itself
PLAIN_MODES = ("1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "HSV")
ALPHA_MODES = ("LA", "PA", "RGBA", "RGBa")
LARGEST_RESIZE = 1 << 27  # pixels of an image before it is cropped; a strip has many
ORIENTATION = 0x0112  # EXIF 2.3, section 4.6.4: where the image's row 0 and column 0 belong
TURNS: dict[Any, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
QUARTER_TURNS = [TURNS[orientation] for orientation in (5, 6, 7, 8)]


def open_image(path: str | Path) -> Image.Image:
    """An image file, whole, as RGB and upright (:func:`to_rgb`).

    Raises:
        RequestError: it is missing, no image, or damaged.
    """
    with _opened(path) as image:
        return to_rgb(image)


def open_alpha(path: str | Path) -> Image.Image | None:
    """The mask of an image file's transparent pixels (:func:`alpha_mask`); errors as of :func:`open_image`."""
    with _opened(path) as image:
        return alpha_mask(image)


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    shown = repr(str(path))
    if not os.path.isfile(path):  # Path.is_file raises for a long name
        raise RequestError(f"image {shown} is not there: expected a file such as photo.jpg")
    with warnings.catch_warnings(), reading(shown):
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as image:
            yield image


@contextmanager
def reading(shown: str) -> Iterator[None]:
    """Turn Pillow's errors for an unreadable image into a RequestError that begins with ``shown``."""
    try:
        yield
    except RequestError as error:
        raise RequestError(f"{shown}: {error}") from error
    except UnidentifiedImageError as error:
        raise RequestError(f"{shown} is not an image that can be read: expected PNG, JPEG, WebP or the like") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RequestError(f"{shown} has too many pixels ({one_line(error)}): make it smaller") from error
    except PermissionError as error:
        raise RequestError(f"{shown} may not be read: change its permissions") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise errors of no common base for damaged files
        raise RequestError(f"{shown} is damaged ({one_line(error)}): copy or save it again") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """An image as 8-bit RGB, a new one, turned as its EXIF orientation says; transparent pixels are laid on white.

    It has no metadata, so that no reader turns it again.

    Raises:
        RequestError: it is smaller than a latent, or of a mode that has no usual meaning as an image.
    """
    _check_whole(image)
    rgb = _in_colours(_upright(image))
    rgb.info.clear()
    return rgb


def _check_whole(image: Image.Image) -> None:
    """Read all of an image."""
    if min(image.size) < SMALLEST_SIDE:
        raise RequestError(f"image of {image.width}x{image.height} pixels: expected at least {SMALLEST_SIDE} a side")
    try:
        image.load()  # which opening a file does not do
    except MemoryError:
        raise
    except Exception as error:
        raise RequestError(f"image is damaged ({one_line(error)}): copy or save it again") from error


def _in_colours(image: Image.Image) -> Image.Image:
    if image.mode in DEEP_MODES:
        return _from_16_bits(image).convert("RGB")
    if image.mode == "La":  # of which Pillow converts to nothing else
        image = image.convert("LA")
    if image.mode in ALPHA_MODES or (image.mode in PLAIN_MODES and "transparency" in image.info):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode not in PLAIN_MODES:
        raise RequestError(f"image of mode {image.mode}: expected 8 or 16 bits a channel: save it as PNG")
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """Turned and mirrored as EXIF says. Pillow's own function writes all tags anew, and fails if one is damaged."""
    turn = _turn(image)
    return image if turn is None else image.transpose(turn)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height in pixels of an image that is turned as its EXIF orientation says."""
    return (image.height, image.width) if _turn(image) in QUARTER_TURNS else image.size


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:  # a damaged header, for which Pillow has errors of many kinds, says nothing
        return None


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Pillow's own conversion cuts at 255, which makes nearly everything white."""
    values = np.asarray(image, np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise RequestError(f"image of mode {image.mode} has values beyond 16 bits: save it as 8-bit PNG")
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


def blurred(image: Image.Image, radius: int) -> Image.Image:
    """A mask with its edge blurred by so many pixels, as by ``blur`` of diffusers' ``VaeImageProcessor``."""
    return image.filter(ImageFilter.GaussianBlur(radius)) if radius else image


def alpha_mask(image: Image.Image) -> Image.Image | None:
    """The mask that an image's transparent pixels make, upright and grey: white where they are transparent.

    None if all pixels are opaque.

    Raises:
        RequestError: the image is damaged, or smaller than a latent.
    """
    _check_whole(image)
    if image.mode == "La":  # of which Pillow converts to nothing else
        image = image.convert("LA")
    if image.mode not in ALPHA_MODES and "transparency" not in image.info:
        return None
    mask = ImageOps.invert(_upright(image).convert("RGBA").getchannel("A"))
    return mask if mask.getbbox() else None


def fit(image: Image.Image, width: int, height: int, resize_mode: str = "crop") -> Image.Image:
    """The image at another size, with Lanczos' filter, to the pixel as by diffusers' ``VaeImageProcessor``.

    Args:
        image: an RGB image.
        width: in pixels.
        height: in pixels.
        resize_mode: ``"crop"`` keeps the aspect and cuts the excess, the same on both sides; ``"fill"`` keeps the
            aspect and everything, and fills the rest with the colours of the nearest edge; ``"stretch"``
            (``"default"`` in diffusers) keeps everything, and not the aspect.
    """
    check_resize_mode(resize_mode)
    if image.size == (width, height):  # resizing it would copy it
        return image
    if resize_mode == "stretch":
        return image.resize((width, height), Image.Resampling.LANCZOS)
    # The side that takes the target's extent: the shorter one where the excess is cut, the longer one where it fits in.
    follows_width = (width * image.height > image.width * height) == (resize_mode == "crop")
    inner = (
        width if follows_width else max(1, image.width * height // image.height),
        max(1, image.height * width // image.width) if follows_width else height,
    )
    if inner[0] * inner[1] > LARGEST_RESIZE:
        raise RequestError(f"image of {image.width}x{image.height} pixels is a strip: crop it first")
    resized = image.resize(inner, Image.Resampling.LANCZOS)
    left, top = width // 2 - inner[0] // 2, height // 2 - inner[1] // 2
    fitted = Image.new("RGB", (width, height))
    fitted.paste(resized, (left, top))
    if resize_mode == "fill":
        _fill_edges(fitted, resized, left, top)
    return fitted


def _fill_edges(fitted: Image.Image, resized: Image.Image, left: int, top: int) -> None:
    """Fill the bands beside ``resized``, which begins at (left, top), with its outermost rows or columns."""
    (width, height), (inner_width, inner_height) = fitted.size, resized.size
    if top > 0:
        for row, y in ((0, 0), (inner_height, top + inner_height)):
            fitted.paste(resized.resize((width, top), box=(0, row, width, row)), (0, y))
    if left > 0:
        for column, x in ((0, 0), (inner_width, left + inner_width)):
            fitted.paste(resized.resize((left, height), box=(column, 0, column, height)), (x, 0))


def check_resize_mode(resize_mode: str) -> None:
    if resize_mode not in RESIZE_MODES:
        raise RequestError(f"resize_mode {resize_mode!r} is not known: expected {' or '.join(RESIZE_MODES)}")
