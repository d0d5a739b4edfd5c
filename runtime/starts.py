"""The first latents of a run."""

from __future__ import annotations

import torch
from torch import Tensor

from ..engines import Manifest
from ..errors import RequestError
from ..samplers.noise import Generators, randn
from .request import Request


def noise(
    manifest: Manifest, request: Request, generator: Generators, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Unit-variance noise of a request's size, [B, 4, height/8, width/8], on `device`."""
    return randn(latents_shape(manifest, request), generator=generator, device=device, dtype=dtype)


def given(manifest: Manifest, request: Request, latents: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The caller's own noise, on `device`.

    Raises:
        RequestError: it is no tensor of the request's shape.
    """
    shape = latents_shape(manifest, request)
    if not isinstance(latents, Tensor) or tuple(latents.shape) != shape:
        received = list(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        raise RequestError(f"latents: expected a tensor of the shape {list(shape)}, got {received}")
    return latents.to(device, dtype)


def latents_shape(manifest: Manifest, request: Request) -> tuple[int, int, int, int]:
    """The shape of a request's latents: [images, channels, height, width]."""
    scale = manifest.vae.spatial
    return request.batch, manifest.vae.latent_channels, request.height // scale, request.width // scale
