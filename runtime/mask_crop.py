"""The masked part of an image, repainted at full size and put back: diffusers' ``padding_mask_crop``."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from PIL import Image, ImageOps

from ..errors import RequestError
from .image_files import fit

if TYPE_CHECKING:
    from .params import Params

Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclasses.dataclass(frozen=True)
class MaskCrop:
    """A part of an image around its mask.

    Attributes:
        image: the whole image, RGB.
        mask: of the same size, one channel; white is repainted.
        box: the part.
    """

    image: Image.Image
    mask: Image.Image
    box: Box

    def cut(self, params: Params) -> Params:
        """The params with this part of the image and of the mask, fitted as diffusers fits them."""
        part, mask = self.image.crop(self.box), self.mask.crop(self.box)
        return dataclasses.replace(params, image=part, mask_image=mask, mask_blur=0, resize_mode="fill")

    def paste(self, repainted: Image.Image) -> Image.Image:
        """The whole image with its masked part from ``repainted``, as of ``VaeImageProcessor.apply_overlay``."""
        left, top, right, bottom = self.box
        pasted = Image.new("RGBA", self.image.size)
        pasted.paste(fit(repainted, right - left, bottom - top), (left, top))
        kept = Image.new("RGBa", self.image.size)
        kept.paste(self.image.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(self.mask))
        whole = pasted.convert("RGB").convert("RGBA")
        whole.alpha_composite(kept.convert("RGBA"))
        return whole.convert("RGB")


def find_crop(image: Image.Image, mask: Image.Image, width: int, height: int, padding: int) -> MaskCrop:
    """The part of an image that holds its mask: padded, then widened to the aspect of the output where there is room.

    Args:
        image: RGB.
        mask: of the same size, one channel; everything that is not black counts.
        width: of the output, in pixels.
        height: likewise.
        padding: pixels around the mask.

    Raises:
        RequestError: the mask is black.
    """
    if (bounds := mask.getbbox()) is None:
        raise RequestError("padding_mask_crop: the mask is black, so nothing is repainted: expected some white in it")
    left, top = max(bounds[0] - padding, 0), max(bounds[1] - padding, 0)
    right, bottom = min(bounds[2] + padding, mask.width), min(bounds[3] + padding, mask.height)
    aspect = width / height
    if (right - left) / (bottom - top) > aspect:
        top, bottom = _widened(top, bottom, (right - left) / aspect, mask.height)
    else:
        left, right = _widened(left, right, (bottom - top) * aspect, mask.width)
    return MaskCrop(image, mask, (left, top, right, bottom))


def _widened(start: int, end: int, extent: float, most: int) -> tuple[int, int]:
    """A range with more on both sides, moved and cut so that it stays inside 0 to ``most``."""
    more = int(extent - (end - start))
    start, end = start - more // 2, end + more - more // 2
    excess = max(end - most, 0)
    start, end = start - excess, end - excess
    shortage = max(-start, 0)
    return start + shortage, min(end + shortage, most)
