"""Decoding in tiles: diffusers' own images, whatever the sizes, and no more latents at a time than a tile's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from counting import load_engines
from diffusers import AutoencoderKL, AutoencoderTiny
from hypothesis import given, settings
from hypothesis import strategies as st
from make_tiny_repos import SD15_REPO
from torch import Tensor

from hypersd import Pipeline
from hypersd.engines import Bundle
from hypersd.engines.specs import Range, TensorSpec
from hypersd.errors import RequestError
from hypersd.runtime.tiling import check_tile, least_latents, tiled_decode

PROMPT = "a photo of a cat"
SIZES = [(8, 8), (9, 7), (5, 11), (3, 14), (4, 6)]  # latents, in tiles of 4


@pytest.fixture(scope="module", autouse=True)
def _single_thread() -> Iterator[None]:
    """Tiles of tiny networks are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def vae(tiny_repos: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(str(tiny_repos / SD15_REPO), subfolder="vae")


def tiled_by_diffusers(vae: AutoencoderKL, latents: Tensor, tile: int, overlap: float) -> Tensor:
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size, vae.tile_overlap_factor = tile, tile // 8, overlap
    try:
        return vae.decode(latents).sample
    finally:
        vae.disable_tiling()


def noise(height: int, width: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(0))


def decoder(vae: Any, seen: list[tuple[int, ...]] | None = None) -> Callable[[Tensor], Tensor]:
    """A VAE's decoder, which notes the latents' sizes that it was given."""

    def decode(latents: Tensor) -> Tensor:
        assert latents.is_contiguous()
        if seen is not None:
            seen.append(tuple(latents.shape[2:]))
        return vae.decode(latents).sample

    return decode


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_images_are_those_of_diffusers(vae: AutoencoderKL, size: tuple[int, int]) -> None:
    """To the bit, also where last tiles are smaller or hold nothing that others do not."""
    latents = noise(*size)
    expected = tiled_by_diffusers(vae, latents, 32, 0.25)
    assert torch.equal(tiled_decode(latents, decoder(vae), 32), expected)


@torch.no_grad()
@pytest.mark.parametrize(("tile", "overlap"), [(32, 0.5), (64, 0.125), (96, 0.25), (32, 0.0)])
def test_other_tiles_and_batches_too(vae: AutoencoderKL, tile: int, overlap: float) -> None:
    """The sizes of tiles and of what they share are the caller's, and every image of a batch is tiled."""
    latents = noise(13, 7, batch=2)
    expected = tiled_by_diffusers(vae, latents, tile, overlap)
    assert torch.equal(tiled_decode(latents, decoder(vae), tile, overlap), expected)


@torch.no_grad()
def test_half_precision_rounds_as_diffusers_does(vae: AutoencoderKL) -> None:
    """Products of a blend are rounded to float16, its weights are not."""
    half, latents = copy.deepcopy(vae).half(), noise(13, 14).half()
    expected = tiled_by_diffusers(half, latents, 96, 0.25)  # 24 pixels are blended: weights that float16 has not
    assert torch.equal(tiled_decode(latents, decoder(half), 96), expected)


@torch.no_grad()
def test_a_image_that_fits_is_decoded_whole(vae: AutoencoderKL) -> None:
    """No second pass, and no copy: small images cost what they did."""
    seen: list[tuple[int, ...]] = []
    latents = noise(4, 3)
    assert torch.equal(tiled_decode(latents, decoder(vae, seen), 32), vae.decode(latents).sample)
    assert seen == [(4, 3)]


@torch.no_grad()
def test_no_decode_is_larger_than_a_tile(vae: AutoencoderKL) -> None:
    """Tiles bound the decoder's input; it runs no more often than in diffusers."""
    seen: list[tuple[int, ...]] = []
    tiled_decode(noise(8, 7), decoder(vae, seen), 32)
    assert seen == [(h, w) for h in (4, 4, 2) for w in (4, 4, 1)]


def enlarge(latents: Tensor) -> Tensor:
    """A decoder whose every pixel depends on one latent alone, so that tiles agree on what they share."""
    return latents.repeat_interleave(8, 2).repeat_interleave(8, 3)


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(4, 14), st.integers(4, 14)),
    least=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    more=st.integers(0, 6),
    overlap=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9]),
)
def test_every_pixel_lands_in_its_place(
    size: tuple[int, int], least: tuple[int, int], more: int, overlap: float
) -> None:
    """Of any sizes, also where a tile's overlap is no whole number of latents or the decoder has a least size."""
    latents, side = noise(*size), max(least) + more
    taken: list[tuple[int, ...]] = []

    def decode(part: Tensor) -> Tensor:
        taken.append(tuple(part.shape[2:]))
        return enlarge(part)

    torch.testing.assert_close(tiled_decode(latents, decode, 8 * side, overlap, least=least), enlarge(latents))
    for shape in taken:
        assert all(few <= extent <= side for extent, few in zip(shape, least, strict=True))


def test_the_decoders_buffer_may_be_used_again() -> None:
    """An engine returns its own buffer, of which the next run makes something else."""
    buffers: dict[tuple[int, ...], Tensor] = {}

    def decode(part: Tensor) -> Tensor:
        buffer = buffers.setdefault(tuple(part.shape), torch.empty_like(enlarge(part)))
        return buffer.copy_(enlarge(part))

    latents = noise(24, 24)
    torch.testing.assert_close(tiled_decode(latents, decode, 64), enlarge(latents))


@torch.no_grad()
def test_a_tiny_decoders_tiles_show_less_than_in_diffusers(tiny_repos: Path) -> None:
    """AutoencoderTiny's own tiles overlap half as far; treating it as an AutoencoderKL must be no loss."""
    tiny, latents = AutoencoderTiny.from_pretrained(str(tiny_repos / "madebyollin/taesd")), noise(20, 24)
    whole = tiny.decode(latents).sample
    tiny.enable_tiling()
    tiny.tile_sample_min_size, tiny.tile_latent_min_size = 128, 16
    theirs = tiny.decode(latents).sample
    tiny.disable_tiling()
    ours = tiled_decode(latents, decoder(tiny), 128)
    assert 0 < (ours - whole).abs().max() < (theirs - whole).abs().max()


def test_a_dynamic_bundles_decoder_takes_every_tile(sdxl_dynamic_bundle: Path) -> None:
    """Of 64 to 104 by 64 to 96 pixels: the last tiles of 104x96 would be a single latent."""
    engine = load_engines(Bundle.load(sdxl_dynamic_bundle), "onnxruntime", "cpu")["vae_decoder"]
    spec = engine.inputs["latent_sample"]
    latents = noise(13, 12).half()
    assert least_latents(spec) == (8, 8)

    def decode(part: Tensor) -> Tensor:
        return engine.run({"latent_sample": part})["sample"]

    images = tiled_decode(latents, decode, check_tile(spec, 64), least=least_latents(spec))
    assert images.shape == (1, 3, 104, 96)
    whole = decode(latents)
    assert torch.equal(images[:, :, :8, :8], decode(latents[:, :, :8, :8].contiguous())[:, :, :8, :8])
    assert not torch.equal(images, whole)


def latent_sample(height: int | tuple[int, int], width: int | tuple[int, int]) -> TensorSpec:
    def dim(name: str, extent: int | tuple[int, int]) -> int | Range:
        return extent if isinstance(extent, int) else Range(name=name, min=extent[0], opt=extent[0], max=extent[1])

    return TensorSpec(dtype="float32", shape=(1, 4, dim("latent_height", height), dim("latent_width", width)))


@pytest.mark.parametrize(
    ("spec", "tile", "message"),
    [
        (latent_sample(64, 48), 256, "vae_tile 256: the decoder takes 384x512 alone: export the bundle with --dynamic"),
        (latent_sample((32, 96), 64), 256, "vae_tile 256 is out of range: expected a whole number from 512 to 768"),
        (latent_sample((32, 96), (40, 96)), 312, "vae_tile 312 is out of range.* from 320 to 768"),
        (latent_sample((32, 96), (32, 96)), 776, "vae_tile 776 is out of range.* from 256 to 768"),
        (latent_sample((32, 96), (32, 96)), 260, "vae_tile 260 is not a multiple of 8: take 256"),
        (latent_sample((32, 96), (32, 96)), 256.0, "vae_tile 256.0 is out of range"),
    ],
)
def test_tiles_that_a_decoder_cannot_take_are_refused(spec: TensorSpec, tile: int, message: str) -> None:
    """One line, before anything is generated."""
    with pytest.raises(RequestError, match=message):
        check_tile(spec, tile)


def test_tiles_of_any_size_in_the_range_are_taken() -> None:
    """Both ends too, also where the height alone varies."""
    assert [check_tile(latent_sample((32, 96), (32, 128)), tile) for tile in (256, 264, 1024)] == [256, 264, 1024]
    assert check_tile(latent_sample((32, 96), 64), 512) == 512


def test_a_pipeline_decodes_in_tiles(sdxl_dynamic_bundle: Path) -> None:
    """``vae_tile`` decodes the same latents tile by tile, and is refused where the decoder takes no tiles."""
    arguments = {"num_inference_steps": 8, "seed": 0, "guidance_scale": 1.0, "height": 96, "width": 96}
    whole, tiled = (Pipeline.load(sdxl_dynamic_bundle, vae_tile=tile) for tile in (None, 64))
    latents = whole(PROMPT, output_type="latent", **arguments).images
    decoder = tiled.engines["vae_decoder"]
    seen: list[tuple[int, ...]] = []
    run = decoder.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            decoder, "run", lambda feeds: (seen.append(tuple(feeds["latent_sample"].shape[2:])), run(feeds))[1]
        )
        image = tiled(PROMPT, output_type="pt", **arguments).images
    assert max(max(sides) for sides in seen) <= 8
    assert len(seen) == 4
    expected = whole(PROMPT, output_type="pt", **arguments).images
    assert torch.equal(latents, tiled(PROMPT, output_type="latent", **arguments).images)
    assert not torch.equal(image, expected)
    assert (image.float() - expected.float()).abs().mean() < 0.1


def test_a_pipeline_of_one_size_has_no_tiles(sd15_bundle: Path) -> None:
    with pytest.raises(RequestError, match="--dynamic"):
        Pipeline.load(sd15_bundle, vae_tile=32)
