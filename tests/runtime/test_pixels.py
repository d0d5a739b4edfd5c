"""Images from the decoder's output, against diffusers' ``VaeImageProcessor``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from hypersd.errors import RequestError
from hypersd.runtime.pixels import check_output_type, to_images, to_pixels

JUDGE = VaeImageProcessor()
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def convert(sample: Tensor, kind: str) -> Any:
    """All the way, as the pipeline goes it."""
    pixels = to_pixels(sample, kind)
    return pixels if kind == "pt" else to_images(pixels, kind)


def assert_same_images(sample: Tensor) -> None:
    """All three kinds, bit for bit, and the sample left as it was."""
    kept = sample.clone()
    ours, theirs = ({kind: way(sample, kind) for kind in ("pt", "np", "pil")} for way in (convert, JUDGE.postprocess))
    assert torch.equal(sample, kept)
    assert ours["pt"].dtype == theirs["pt"].dtype == sample.dtype
    assert torch.equal(ours["pt"], theirs["pt"])
    assert ours["np"].dtype == theirs["np"].dtype == np.float32
    assert np.array_equal(ours["np"], theirs["np"])
    assert [image.mode for image in ours["pil"]] == ["RGB"] * len(sample)
    assert [image.size for image in ours["pil"]] == [(sample.shape[3], sample.shape[2])] * len(sample)
    for one, other in zip(ours["pil"], theirs["pil"], strict=True):
        assert one.tobytes() == other.tobytes()


@given(
    seed=st.integers(0, 2**32),
    shape=st.tuples(st.integers(1, 3), st.just(3), st.integers(1, 24), st.integers(1, 24)),
    scale=st.sampled_from([0.0, 1e-3, 0.5, 1.0, 3.0, 1e4]),
    dtype=st.sampled_from(DTYPES),
)
def test_every_kind_is_diffusers_bit_for_bit(seed: int, shape: tuple, scale: float, dtype: torch.dtype) -> None:
    """Protects the last step of parity: scaling, clamping and rounding, also far outside -1..1, in every dtype."""
    assert_same_images((torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_level_and_the_halves_between_round_as_in_diffusers(dtype: torch.dtype) -> None:
    """All 256 levels, the halves between them, both ends and both infinities."""
    levels = torch.arange(-2, 514) / 2 / 255 * 2 - 1  # [516]
    edges = torch.tensor([-torch.inf, torch.inf, -1.0, 1.0])
    sample = torch.cat([levels, edges]).to(dtype).expand(1, 3, 1, -1)
    assert_same_images(sample)
    image = np.asarray(convert(sample.float(), "pil")[0])
    assert (image.min(), image.max()) == (0, 255)


def numpy_pixels(sample: Tensor) -> np.ndarray:
    """The 8-bit conversion as diffusers writes it, in numpy, without its clothes."""
    array = (sample * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().numpy()
    return (array * 255).round().astype(np.uint8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_precision_number_becomes_the_same_pixel(dtype: torch.dtype) -> None:
    """All 65,536 of them but nan, converted by torch where the sample lies instead of by numpy on the host."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    sample = numbers[~numbers.isnan()].expand(1, 3, 1, -1)
    assert np.array_equal(to_pixels(sample, "pil").numpy(), numpy_pixels(sample))


def test_float32_numbers_become_the_same_pixel() -> None:
    """Around every half between two levels, a few representable numbers to either side, and a million others."""
    halves = (torch.arange(255) + 0.5) / 255 * 2 - 1
    near = [halves]
    for towards in (2.0, -2.0):
        one = halves
        for _ in range(4):
            one = torch.nextafter(one, torch.full_like(one, towards))
            near.append(one)
    around = torch.stack(near).reshape(1, 1, -1).expand(1, 3, -1).unsqueeze(2)
    many = torch.rand(1, 3, 600, 600, generator=torch.Generator().manual_seed(0)) * 2.2 - 1.1
    for one in (around, many):
        assert np.array_equal(to_pixels(one, "pil").numpy(), numpy_pixels(one))


@pytest.mark.filterwarnings("ignore:invalid value")
def test_nan_is_black() -> None:
    """C leaves the cast of nan open; as with numpy here a network that overflowed gives black, not noise."""
    sample = torch.full((1, 3, 4, 8), torch.nan)
    assert not to_pixels(sample, "pil").any()
    assert np.isnan(convert(sample, "np")).all()


@pytest.mark.parametrize(("kind", "dtype"), [("pil", torch.uint8), ("np", torch.float32), ("pt", torch.float16)])
def test_pixels_are_one_plain_block(kind: str, dtype: torch.dtype) -> None:
    """So that a GPU's copy to the host is one transfer, of 3 bytes a pixel for an image."""
    pixels = to_pixels(torch.randn(2, 3, 8, 16).half(), kind)
    assert pixels.dtype == dtype
    assert pixels.is_contiguous()
    assert pixels.shape == ((2, 3, 8, 16) if kind == "pt" else (2, 8, 16, 3))


def test_strided_samples_are_fine() -> None:
    """The decoder's buffer may be a view, in any memory format."""
    sample = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    assert_same_images(sample.to(memory_format=torch.channels_last))
    assert_same_images(sample[:, :, ::2, 1::3])


def test_images_outlive_the_decoders_buffer() -> None:
    """The sample is the engine's buffer: what is returned must not change when the next run overwrites it."""
    for kind in ("pt", "np", "pil"):
        sample = torch.full((1, 3, 2, 2), 0.5)
        output = convert(sample, kind)
        sample.fill_(-1)
        assert np.asarray(output[0]).max() > 0


def test_pil_images_are_pil_images() -> None:
    """The images that callers save and show."""
    (image,) = convert(torch.ones(1, 3, 2, 4), "pil")
    assert isinstance(image, Image.Image)
    assert image.getpixel((3, 1)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["", "PIL", "numpy", "jpeg", None, 3])
def test_unknown_output_types_name_the_known_ones(kind: object) -> None:
    """Refused before any network runs, with what is possible."""
    with pytest.raises(RequestError) as caught:
        check_output_type(kind)  # type: ignore[arg-type]
    assert "pil, np, pt, latent" in str(caught.value)
    assert repr(kind) in str(caught.value)


@pytest.mark.parametrize("kind", ["pil", "np", "pt", "latent"])
def test_known_output_types_pass(kind: str) -> None:
    """The four of diffusers."""
    check_output_type(kind)
