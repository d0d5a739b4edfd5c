"""Decoding of latents in tiles: the decoder needs the memory of one tile, whatever the image's size."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..engines.specs import TensorSpec, dim_range
from ..errors import RequestError
from ..samplers.numbers import whole_number

Decode = Callable[[Tensor], Tensor]
HEIGHT, WIDTH = 2, 3  # dimensions of [B, C, H, W]


def check_tile(latent_sample: TensorSpec, tile: int, scale: int = 8) -> int:
    """A tile's side that a decoder takes.

    Args:
        latent_sample: the decoder's input as the manifest describes it, [B, 4, h, w].
        tile: the side, in pixels.
        scale: pixels per latent.

    Raises:
        RequestError: the decoder takes one size alone, or no tile so small or so large, or tiles are not whole latents.
    """
    height, width = (dim_range(dim) for dim in latent_sample.shape[HEIGHT:])
    if height.min == height.max and width.min == width.max:
        size = f"{width.max * scale}x{height.max * scale}"
        raise RequestError(f"vae_tile {tile}: the decoder takes {size} alone: export the bundle with --dynamic")
    least, most = (scale * max(pick) for pick in ((height.min, width.min), (height.max, width.max)))
    tile = whole_number("vae_tile", tile, least, most)
    if tile % scale:
        raise RequestError(f"vae_tile {tile} is not a multiple of {scale}: take {tile // scale * scale}")
    return tile


def least_latents(latent_sample: TensorSpec) -> tuple[int, int]:
    """The fewest latents that a decoder takes, down and across: ``least`` of :func:`tiled_decode`."""
    height, width = (dim_range(dim).min for dim in latent_sample.shape[HEIGHT:])
    return height, width


def tiled_decode(
    latents: Tensor,
    decode: Decode,
    tile: int,
    overlap: float = 0.25,
    scale: int = 8,
    least: tuple[int, int] = (1, 1),
) -> Tensor:
    """Decode overlapping tiles one after another and blend them, as diffusers' ``AutoencoderKL.tiled_decode`` does.

    The last tiles of a row or column hold what is left. Where that is less than the decoder takes, they begin further
    inside, and what others cover is cut off again; elsewhere images are diffusers' to the bit. ``AutoencoderTiny``,
    whose tiles diffusers lets overlap half as far and blends by another formula, is treated alike here.

    Args:
        latents: [B, 4, h, w], no smaller than ``least``.
        decode: contiguous latents to images [B, C, scale x h, scale x w]; the tensor may be reused by the next call.
        tile: a tile's side in pixels, diffusers' ``tile_sample_min_size``; no smaller than ``least`` either.
        overlap: the part of a tile that the next one covers as well, 0 to below 1.
        scale: pixels per latent.
        least: the fewest latents that ``decode`` takes, down and across.

    Returns:
        Images [B, C, scale x h, scale x w]; of a single tile, the result of ``decode`` itself.
    """
    side = tile // scale
    height, width = latents.shape[HEIGHT:]
    if max(height, width) <= side:
        return decode(latents.contiguous())
    stride = max(1, int(side * (1 - overlap)))
    kept, blended = stride * scale, (side - stride) * scale
    rows, above = [], []
    for top in range(0, height, stride):
        tiles = [_decode_tile(latents, decode, (top, left), side, scale, least) for left in range(0, width, stride)]
        for i, pixels in enumerate(tiles):
            if above:
                _blend(above[i], pixels, HEIGHT, blended)
            if i:
                _blend(tiles[i - 1], pixels, WIDTH, blended)
        rows.append(torch.cat([pixels[:, :, :kept, :kept] for pixels in tiles], WIDTH))
        above = tiles
    return torch.cat(rows, HEIGHT)


def _decode_tile(
    latents: Tensor, decode: Decode, corner: tuple[int, int], side: int, scale: int, least: tuple[int, int]
) -> Tensor:
    """The images of one tile, a tensor of its own."""
    ends = [min(start + side, size) for start, size in zip(corner, latents.shape[HEIGHT:], strict=True)]
    top, left = (max(0, min(start, end - few)) for start, end, few in zip(corner, ends, least, strict=True))
    pixels = decode(latents[:, :, top : ends[0], left : ends[1]].contiguous())
    return pixels[:, :, scale * (corner[0] - top) :, scale * (corner[1] - left) :].clone()


def _blend(before: Tensor, after: Tensor, dim: int, extent: int) -> None:
    """Let the beginning of a tile come gradually out of the end of the one before it, in place."""
    extent = min(before.shape[dim], after.shape[dim], extent)
    end, beginning = before.narrow(dim, before.shape[dim] - extent, extent), after.narrow(dim, 0, extent)
    part = torch.arange(extent, dtype=torch.float64, device=after.device) / extent
    part = part if dim == WIDTH else part.unsqueeze(1)
    leaving, coming = (1 - part).float(), part.float()  # float32 whatever the images are, as diffusers' numbers
    beginning.copy_((end * leaving).to(after.dtype) + (beginning * coming).to(after.dtype))
