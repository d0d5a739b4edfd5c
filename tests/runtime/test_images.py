"""Pictures from the decoder's output, against diffusers' ``VaeImageProcessor``."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from hypersd.errors import RequestError
from hypersd.runtime.images import check_output_type, to_output

JUDGE = VaeImageProcessor()
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def assert_same_pictures(sample: Tensor) -> None:
    """All three kinds, bit for bit, and the sample left as it was."""
    kept = sample.clone()
    ours, theirs = (
        {kind: convert(sample, kind) for kind in ("pt", "np", "pil")} for convert in (to_output, JUDGE.postprocess)
    )
    assert torch.equal(sample, kept)
    assert ours["pt"].dtype == theirs["pt"].dtype == sample.dtype
    assert torch.equal(ours["pt"], theirs["pt"])
    assert ours["np"].dtype == theirs["np"].dtype == np.float32
    assert np.array_equal(ours["np"], theirs["np"])
    assert [picture.mode for picture in ours["pil"]] == ["RGB"] * len(sample)
    assert [picture.size for picture in ours["pil"]] == [(sample.shape[3], sample.shape[2])] * len(sample)
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
    assert_same_pictures((torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_level_and_the_halves_between_round_as_in_diffusers(dtype: torch.dtype) -> None:
    """All 256 levels, the halves between them, both ends and both infinities."""
    levels = torch.arange(-2, 514) / 2 / 255 * 2 - 1  # [516]
    edges = torch.tensor([-torch.inf, torch.inf, -1.0, 1.0])
    sample = torch.cat([levels, edges]).to(dtype).expand(1, 3, 1, -1)
    assert_same_pictures(sample)
    picture = np.asarray(to_output(sample.float(), "pil")[0])
    assert (picture.min(), picture.max()) == (0, 255)


def test_strided_samples_are_fine() -> None:
    """The decoder's buffer may be a view, in any memory format."""
    sample = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    assert_same_pictures(sample.to(memory_format=torch.channels_last))
    assert_same_pictures(sample[:, :, ::2, 1::3])


def test_pictures_outlive_the_decoders_buffer() -> None:
    """The sample is the engine's buffer: what is returned must not change when the next run overwrites it."""
    for kind in ("pt", "np", "pil"):
        sample = torch.full((1, 3, 2, 2), 0.5)
        output = to_output(sample, kind)
        sample.fill_(-1)
        assert np.asarray(output[0]).max() > 0


def test_pil_pictures_are_pil_pictures() -> None:
    """What callers save and show."""
    (picture,) = to_output(torch.ones(1, 3, 2, 4), "pil")
    assert isinstance(picture, Image.Image)
    assert picture.getpixel((3, 1)) == (255, 255, 255)


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
