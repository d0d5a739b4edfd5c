"""Control images: reading them, fitting them to the size that is drawn, and making of them what ControlNets want."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..errors import RequestError, one_line
from ..samplers.numbers import real_number

SMALLEST_SIDE = 8  # pixels: one latent
CANNY_THRESHOLDS = 100, 200
LARGEST_THRESHOLD = 10_000  # gradients of 8-bit images end far below
RESIZE_MODES = ("crop", "stretch")
DEEP_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")  # 16 bits a pixel, grey; Pillow makes 8 of 16-bit colour itself
PLAIN_MODES = ("1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "HSV")
ALPHA_MODES = ("LA", "PA", "RGBA", "RGBa")
LARGEST_RESIZE = 1 << 27  # pixels of an image before it is cropped, which of a strip are many
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


def open_image(path: str | Path) -> Image.Image:
    """An image file, whole, as RGB and upright (:func:`to_rgb`).

    Raises:
        RequestError: it is missing, no image, or damaged.
    """
    shown = repr(str(path))
    if not os.path.isfile(path):  # Path.is_file raises for a long name
        raise RequestError(f"control image {shown} is not there: expected a file such as photo.jpg")
    with warnings.catch_warnings(), reading(shown):
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as image:
            return to_rgb(image)


@contextmanager
def reading(shown: str) -> Iterator[None]:
    """What Pillow raises for an image that it cannot read, as a RequestError that begins with ``shown``."""
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
    except Exception as error:  # what Pillow's plugins raise for damaged files shares no base
        raise RequestError(f"{shown} is damaged ({one_line(error)}): copy or save it again") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """An image as 8-bit RGB, a new one, turned as its EXIF orientation says; what is transparent is laid on white.

    It has no metadata: nobody turns it once more.

    Raises:
        RequestError: it is smaller than a latent, or of a mode that has no usual meaning as an image.
    """
    if min(image.size) < SMALLEST_SIDE:
        raise RequestError(
            f"control image of {image.width}x{image.height} pixels: expected at least {SMALLEST_SIDE} a side"
        )
    try:
        image.load()  # which opening a file does not do
    except MemoryError:
        raise
    except Exception as error:
        raise RequestError(f"control image is damaged ({one_line(error)}): copy or save it again") from error
    rgb = _in_colours(_upright(image))
    rgb.info.clear()
    return rgb


def _in_colours(image: Image.Image) -> Image.Image:
    if image.mode in DEEP_MODES:
        return _from_16_bits(image).convert("RGB")
    if image.mode == "La":  # of which Pillow converts to nothing else
        image = image.convert("LA")
    if image.mode in ALPHA_MODES or (image.mode in PLAIN_MODES and "transparency" in image.info):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode not in PLAIN_MODES:
        raise RequestError(f"control image of mode {image.mode}: expected 8 or 16 bits a channel: save it as PNG")
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """Turned and mirrored as EXIF says. Pillow's own function writes all tags anew, and fails if one is damaged."""
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:  # a damaged header, for which Pillow has errors of many kinds, says nothing
        return image
    return image if turn is None else image.transpose(turn)


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Pillow's own conversion cuts at 255, which makes nearly everything white."""
    values = np.asarray(image, np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise RequestError(f"control image of mode {image.mode} has values beyond 16 bits: save it as 8-bit PNG")
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


def fit(image: Image.Image, width: int, height: int, resize_mode: str = "crop") -> Image.Image:
    """The image at another size, with Lanczos' filter, to the pixel as diffusers' ``VaeImageProcessor`` does it.

    Args:
        image: an RGB image.
        width: in pixels.
        height: in pixels.
        resize_mode: ``"crop"`` keeps the aspect and cuts what is over, the same on both sides; ``"stretch"``
            (``"default"`` in diffusers) keeps everything, and not the aspect.
    """
    check_resize_mode(resize_mode)
    if resize_mode == "stretch":
        return image.resize((width, height), Image.Resampling.LANCZOS)
    is_taller = width * image.height > image.width * height  # than the target
    inner = (
        width if is_taller else image.width * height // image.height,
        image.height * width // image.width if is_taller else height,
    )
    if inner[0] * inner[1] > LARGEST_RESIZE:
        raise RequestError(f"control image of {image.width}x{image.height} pixels is a strip: crop it first")
    resized = image.resize(inner, Image.Resampling.LANCZOS)
    cropped = Image.new("RGB", (width, height))
    cropped.paste(resized, (width // 2 - inner[0] // 2, height // 2 - inner[1] // 2))
    return cropped


def check_resize_mode(resize_mode: str) -> None:
    if resize_mode not in RESIZE_MODES:
        raise RequestError(f"resize_mode {resize_mode!r} is not known: expected {' or '.join(RESIZE_MODES)}")


def canny(image: Image.Image, low: float = CANNY_THRESHOLDS[0], high: float = CANNY_THRESHOLDS[1]) -> Image.Image:
    """The edges of an image, white on black (Canny, "A Computational Approach to Edge Detection", 1986).

    Args:
        image: an RGB image.
        low: gradient from which on a pixel beside an edge belongs to it.
        high: gradient from which on a pixel is an edge by itself.

    Raises:
        RequestError: OpenCV is missing, or the thresholds are out of order.
    """
    check_thresholds(low, high)
    check_opencv()
    import cv2

    return Image.fromarray(cv2.Canny(np.asarray(image), low, high)).convert("RGB")


def check_opencv() -> None:
    """OpenCV comes with an extra: what needs it says so at once."""
    try:
        import cv2  # noqa: F401
    except ImportError as error:
        raise RequestError("Canny's edges need OpenCV: pip install -e '.[control]' in hypersd's clone") from error


def check_thresholds(low: float, high: float) -> None:
    """OpenCV swaps thresholds that are out of order, and takes nan."""
    ends = [real_number("Canny threshold", number, 0, LARGEST_THRESHOLD) for number in (low, high)]
    if ends[0] > ends[1]:
        raise RequestError(f"Canny thresholds {low:g} and {high:g}: expected the lower one first")


def scribble(image: Image.Image) -> Image.Image:
    """A drawing in dark lines on white as light lines on black, which scribble ControlNets were trained with."""
    return ImageOps.invert(image)


def preprocess(image: Image.Image, kind: str, thresholds: tuple[float, float] = CANNY_THRESHOLDS) -> Image.Image:
    """What a ControlNet is to see of an RGB image, which has the size that is drawn: else edges would blur.

    Args:
        image: an RGB image.
        kind: ``"canny"``, ``"scribble"`` or ``"none"``.
        thresholds: those of :func:`canny`.

    Raises:
        RequestError: the kind is not known, or OpenCV is missing.
    """
    if kind == "canny":
        return canny(image, *thresholds)
    if kind == "scribble":
        return scribble(image)
    if kind == "none":
        return image
    raise RequestError(f"preprocess {kind!r} is not known: expected canny, scribble or none")


def to_condition(image: Any, width: int, height: int, resize_mode: str = "crop") -> Tensor:
    """Control images as a ControlNet takes them: float32 [N, 3, height, width] in 0..1.

    Args:
        image: a ``PIL.Image`` of any size and mode; or of the size that is drawn an array [H, W, 3] or [N, H, W, 3] or
            a tensor [3, H, W] or [N, 3, H, W], floats in 0..1; or a list of some of one kind.
        width: in pixels, what is drawn.
        height: likewise.
        resize_mode: see :func:`fit`; of no meaning for arrays and tensors.

    Raises:
        RequestError: it is none of that.
    """
    if isinstance(image, (list, tuple)):
        if not image:
            raise RequestError("image: an empty list: expected a control image")
        return torch.cat([to_condition(one, width, height, resize_mode) for one in image])
    if isinstance(image, Image.Image):
        pixels = np.asarray(fit(to_rgb(image), width, height, resize_mode))
        rows = np.ascontiguousarray(pixels.transpose(2, 0, 1), np.float32)
        return torch.from_numpy(rows / 255.0).unsqueeze(0)
    if isinstance(image, np.ndarray):
        if image.ndim not in (3, 4) or image.dtype.kind != "f":
            raise RequestError(f"image: an array {image.dtype}{list(image.shape)}: expected floats [H, W, 3] in 0..1")
        rows = torch.from_numpy(np.array(image, np.float32))  # a copy: torch takes no array that is mirrored or locked
        return _checked((rows if rows.ndim == 4 else rows[None]).permute(0, 3, 1, 2), width, height)
    if isinstance(image, Tensor):
        if image.ndim not in (3, 4) or not image.is_floating_point():
            raise RequestError(f"image: a tensor {image.dtype}{list(image.shape)}: expected floats [3, H, W] in 0..1")
        return _checked((image if image.ndim == 4 else image[None]).detach(), width, height)
    raise RequestError(f"image: {type(image).__name__}: expected a PIL image, an array, a tensor or a list of them")


def _checked(pixels: Tensor, width: int, height: int) -> Tensor:
    """Floats [N, C, H, W], if they are images of the size that is drawn."""
    if not len(pixels):
        raise RequestError("image: no images in it: expected one, or one for each prompt")
    if tuple(pixels.shape[1:]) != (3, height, width):
        raise RequestError(
            f"image: {pixels.shape[1]} channels of {pixels.shape[3]}x{pixels.shape[2]} pixels: expected 3 of "
            f"{width}x{height}, what is drawn; a PIL image is resized"
        )
    pixels = pixels.float().contiguous()
    least, most = (float(end) for end in pixels.aminmax())
    if not (least >= -1 and most <= 1):  # inpainting ControlNets mark what is to be drawn with -1; nan is refused
        raise RequestError(f"image: values from {least:g} to {most:g}: expected floats in 0..1")
    return pixels
