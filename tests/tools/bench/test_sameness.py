"""Whether two images are the same is decided by what their precisions explain."""

from __future__ import annotations

import numpy as np
import pytest

from hypersd.tools.bench.sameness import compare_images

GREY = np.full((32, 32, 3), 100, np.uint8)


def off_by(levels: int, every: int = 1) -> np.ndarray:
    """Grey, with each ``every``-th pixel off by so many levels."""
    image = GREY.copy().reshape(-1, 3)
    image[::every] += levels
    return image.reshape(GREY.shape)


@pytest.mark.parametrize(
    ("image", "precisions", "verdict"),
    [
        (GREY, {"fp32"}, "same"),
        (off_by(1, every=100), {"fp32"}, "same"),  # rounded to the other side here and there
        (off_by(1), {"fp32"}, "other"),
        (off_by(2, every=500), {"fp32"}, "other"),  # few pixels, but by more than rounding
        (off_by(5), {"fp32", "fp16"}, "same"),
        (off_by(20), {"fp16"}, "other"),
        (GREY, {"bf16"}, "same"),
        (off_by(20), {"fp32", "bf16"}, "close"),
        (off_by(60), {"fp32", "bf16"}, "other"),
        (GREY[:16], {"bf16"}, "other"),
    ],
)
def test_verdicts(image: np.ndarray, precisions: set[str], verdict: str) -> None:
    """float32 explains a level here and there, float16 more, bfloat16 20 dB; another size is another image."""
    assert compare_images(GREY, image, precisions).verdict == verdict


def test_equal_images_have_no_psnr() -> None:
    """Infinity is not a number in JSON."""
    assert compare_images(GREY, GREY, {"fp32"}).psnr is None
