"""The VAE's encoder: images to latents, with the caller's noise."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..engines import Engine, Manifest
from ..engines.engine import TORCH_DTYPES
from .batching import run_rows

LOGVAR_RANGE = -30.0, 20.0  # diffusers' DiagonalGaussianDistribution


class ImageEncoder:
    """The bundle's ``vae_encoder``.

    Args:
        manifest: the bundle's.
        engine: the component.
        dtype: that of the UNet's latents.
    """

    def __init__(self, manifest: Manifest, engine: Engine, dtype: torch.dtype) -> None:
        self.vae = manifest.vae
        self.engine = engine
        self.dtype = dtype
        output = engine.outputs["latent_parameters"]
        self.noise_dtype = TORCH_DTYPES[output.dtype]
        self.is_sampled = output.shape[1] != self.vae.latent_channels  # TAESD gives the latents themselves

    def parameters(self, image: Tensor) -> Tensor:
        """Mean and log-variance of the latents [N, 8, h, w], or TAESD's latents [N, 4, h, w].

        ``image`` is [N, 3, H, W] in -1..1. The result may be the engine's buffer.
        """
        rows = image.to(TORCH_DTYPES[self.engine.inputs["sample"].dtype]).contiguous()
        return run_rows(self.engine, {"sample": rows})["latent_parameters"]

    def latents(self, parameters: Tensor, noise: Tensor | None, batch: int) -> Tensor:
        """Scaled latents [batch, 4, h, w]: a sample of the distribution (Kingma and Welling, arXiv:1312.6114, eq. 10).

        ``noise`` [N or batch, 4, h, w] is standard normal, and None for an encoder that gives latents.
        """
        if noise is not None:
            mean, logvar = repeated(parameters, len(noise)).chunk(2, dim=1)
            parameters = mean + torch.exp(0.5 * logvar.clamp(*LOGVAR_RANGE)) * noise
        latents = parameters.to(self.dtype) * self.vae.scaling_factor
        return repeated(latents, batch)


def repeated(rows: Tensor, count: int) -> Tensor:
    """Each row as often as makes ``count`` rows."""
    return rows if len(rows) == count else rows.repeat_interleave(count // len(rows), dim=0)


def make_encoder(manifest: Manifest, engines: Mapping[str, Engine], dtype: torch.dtype) -> ImageEncoder | None:
    """The encoder, if the bundle has one."""
    return ImageEncoder(manifest, engines["vae_encoder"], dtype) if "vae_encoder" in engines else None
