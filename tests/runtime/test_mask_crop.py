"""The part of an image around its mask, against diffusers' own, and the masks that transparent pixels make."""

from __future__ import annotations

import numpy as np
import pytest
from diffusers.image_processor import VaeImageProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hypersd.errors import RequestError
from hypersd.runtime.image_files import alpha_mask, blurred
from hypersd.runtime.mask_crop import find_crop

JUDGE = VaeImageProcessor(vae_scale_factor=8)
SIDE = st.integers(8, 90)


@st.composite
def masked_images(draw: st.DrawFn) -> tuple[Image.Image, Image.Image]:
    """An image with a mask of the same size that is not black."""
    width, height = draw(SIDE), draw(SIDE)
    left, top = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    right, bottom = draw(st.integers(left + 1, width)), draw(st.integers(top + 1, height))
    mask = Image.new("L", (width, height))
    mask.paste(draw(st.integers(1, 255)), (left, top, right, bottom))
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels), mask


@settings(max_examples=300, deadline=None)
@given(masked_images(), st.integers(1, 12), st.integers(1, 12), st.integers(0, 40))
def test_the_part_is_diffusers(images: tuple[Image.Image, Image.Image], across: int, down: int, padding: int) -> None:
    image, mask = images
    expected = JUDGE.get_crop_region(mask, 8 * across, 8 * down, pad=padding)
    assert find_crop(image, mask, 8 * across, 8 * down, padding).box == expected


@settings(max_examples=60, deadline=None)
@given(masked_images(), st.integers(2, 8), st.integers(2, 8), st.integers(0, 20))
def test_it_is_put_back_as_diffusers_does(
    images: tuple[Image.Image, Image.Image], across: int, down: int, padding: int
) -> None:
    image, mask = images
    repainted = Image.effect_noise((8 * across, 8 * down), 80).convert("RGB")
    crop = find_crop(image, mask, *repainted.size, padding)
    expected = JUDGE.apply_overlay(mask, image, repainted, crop.box)
    assert crop.paste(repainted).tobytes() == expected.tobytes()


def test_a_black_mask_is_rejected() -> None:
    with pytest.raises(RequestError, match=r"the mask is black, so nothing is repainted: expected some white"):
        find_crop(Image.new("RGB", (16, 16)), Image.new("L", (16, 16)), 8, 8, 0)


@pytest.mark.parametrize("radius", [0, 1, 33])
def test_a_blur_is_diffusers(radius: int) -> None:
    mask = Image.new("L", (64, 48))
    mask.paste(255, (10, 10, 40, 30))
    assert blurred(mask, radius).tobytes() == JUDGE.blur(mask, radius).tobytes()


def transparent(mode: str) -> Image.Image:
    """16x8 pixels, whose left half is transparent."""
    image = Image.new("RGBA", (16, 8), (200, 100, 50, 255))
    image.paste((0, 0, 0, 0), (0, 0, 8, 8))
    if mode == "La":  # Pillow's direct conversion loses the alpha
        return image.convert("LA").convert("La")
    if mode != "P":
        return image.convert(mode)
    indexed = Image.new("P", image.size, 1)
    indexed.putpalette([0, 0, 0, 200, 100, 50])
    indexed.paste(0, (0, 0, 8, 8))
    indexed.info["transparency"] = 0
    return indexed


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "RGBa", "La"])
def test_transparent_pixels_are_a_mask(mode: str) -> None:
    """White where they are, in every mode that has them."""
    mask = alpha_mask(transparent(mode))
    assert mask is not None
    assert (mask.mode, mask.size, mask.getbbox()) == ("L", (16, 8), (0, 0, 8, 8))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "1"])
def test_opaque_images_are_no_mask(mode: str) -> None:
    assert alpha_mask(Image.new(mode, (16, 8))) is None
    assert alpha_mask(Image.new("RGBA", (16, 8), (1, 2, 3, 255))) is None


def test_a_mask_is_turned_as_its_image() -> None:
    """EXIF says where the top is, to both."""
    image = transparent("RGBA")
    image.getexif()[0x0112] = 6
    mask = alpha_mask(image)
    assert mask is not None
    assert (mask.size, mask.getbbox()) == ((8, 16), (0, 0, 8, 8))
