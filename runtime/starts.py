"""The first latents of a run: noise, or an init image with noise; and the part that a mask plays in its steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from ..engines import Manifest
from ..errors import RequestError
from ..samplers.noise import randn
from ..samplers.step import add_noise
from .call import Call
from .image_encoder import ImageEncoder, repeated
from .image_tensors import from_bytes
from .request import GenerationSettings, Request

# Inputs of a run besides the unit-variance noise, ``latents``: images, bytes [N, H, W, 3] or floats [N, 3, H, W] in
# 0..1; the mask, bytes [M, 1, H, W], 1 where the image is repainted; and the noise of the encoder's samples of the
# image and of the image without its masked part.
IMAGE, MASK, IMAGE_NOISE, MASKED_IMAGE_NOISE = "image", "mask", "image_noise", "masked_image_noise"
NOISE_LEVELS = "noise_levels"  # [steps, 2] float32, of every step (:meth:`..samplers.Sampler.noise_level`)
START_IMAGES = (IMAGE, MASK)  # in their own types: normalized before they are rounded to the latents' type


@dataclasses.dataclass(frozen=True)
class Start:
    """The first latents, and the tensors with which the steps keep to the init image.

    Attributes:
        latents: [B, 4, h, w] at the first step's noise level.
        noise: their noise, of unit variance.
        image_latents: those of the init image, if the steps have to restore what the mask keeps.
        mask: [B, 1, h, w], 1 where the image is repainted, with ``image_latents``.
        extra_channels: the mask and the latents of the image without its masked part, [B, 5, h, w]: the other inputs
            of a UNet that was trained for inpainting.
    """

    latents: Tensor
    noise: Tensor
    image_latents: Tensor | None = None
    mask: Tensor | None = None
    extra_channels: Tensor | None = None

    def restore(self, levels: Tensor, i: int, latents: Tensor) -> Tensor:
        """The latents after step ``i``, with those of the init image where the mask keeps it.

        ``levels`` [steps, 2] are the noise levels of all steps.
        """
        if self.image_latents is None or self.mask is None:
            return latents
        kept = self.image_latents
        if i + 1 < len(levels):
            kept = add_noise(kept, self.noise, levels[i + 1])
        return (1 - self.mask) * kept + self.mask * latents


def make_start(settings: GenerationSettings, inputs: Mapping[str, Tensor], encoder: ImageEncoder | None) -> Start:
    """The start of a run from its inputs, a function of tensors: the draws are among them (:func:`draw`)."""
    noise = inputs["latents"]
    if settings.starts_from == "noise" or encoder is None:
        return Start(noise, noise)
    image, batch, image_latents = _signed(inputs[IMAGE], noise.dtype), len(noise), None
    if settings.encodes_image:
        image_latents = encoder.latents(encoder.parameters(image), inputs.get(IMAGE_NOISE), batch)
    latents = noise
    if image_latents is not None and not settings.starts_as_noise:
        latents = add_noise(image_latents, noise, inputs[NOISE_LEVELS][0])
    if settings.starts_from == "image":
        return Start(latents, noise)
    full_mask = inputs[MASK].to(noise.dtype)
    mask = torch.nn.functional.interpolate(full_mask, size=noise.shape[2:])  # the nearest pixel, as in diffusers
    if not settings.is_inpainting:
        return Start(latents, noise, image_latents, repeated(mask, batch))
    kept = encoder.parameters(image * (1 - full_mask))
    masked_latents = encoder.latents(kept, inputs.get(MASKED_IMAGE_NOISE), batch)
    return Start(latents, noise, extra_channels=torch.cat([repeated(mask, batch), masked_latents], dim=1))


def _signed(image: Tensor, dtype: torch.dtype) -> Tensor:
    """Images as the encoder takes them: in -1..1, [N, 3, H, W]."""
    if image.is_floating_point():
        return (image * 2 - 1).to(dtype)
    return from_bytes(image).mul_(2).sub_(1).to(dtype)


def draw(
    call: Call,
    encoder: ImageEncoder | None,
    shape: tuple[int, int, int, int],
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The random inputs of a run in diffusers' order: the encoder's samples around the noise of the latents.

    Args:
        call: the request, its images and the source of the numbers.
        encoder: the encoder, if the run starts from an image.
        shape: of the latents.
        device: of the noise.
        dtype: of the latents.

    Returns:
        ``latents``, and ``image_noise`` and ``masked_image_noise`` [N, 4, h, w] where the encoder samples: N is the
        batch if every image has a generator of its own, else the number of init images.

    Raises:
        RequestError: the caller's own latents are of another shape.
    """
    settings, generator = call.settings, call.generator
    has_own = isinstance(generator, list) and len(generator) > 1

    def sample(images: int) -> Tensor:
        assert encoder is not None
        rows = (shape[0] if has_own else images, *shape[1:])
        return randn(rows, generator=generator, device=device, dtype=encoder.noise_dtype)

    drawn: dict[str, Tensor] = {}
    is_sampled = encoder is not None and encoder.is_sampled
    if is_sampled and settings.encodes_image:
        drawn[IMAGE_NOISE] = sample(len(call.images[IMAGE]))
    if call.latents is None:
        drawn["latents"] = randn(shape, generator=generator, device=device, dtype=dtype)
    else:
        drawn["latents"] = _given(call.latents, shape).to(device, dtype)
    if is_sampled and settings.starts_from == "mask":
        masked = sample(max(len(call.images[IMAGE]), len(call.images[MASK])))
        if settings.is_inpainting:  # diffusers draws it for every UNet, and the steps' noise comes after it
            drawn[MASKED_IMAGE_NOISE] = masked
    return drawn


def _given(latents: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The caller's own noise, if it is of that shape."""
    if not isinstance(latents, Tensor) or tuple(latents.shape) != shape:
        received = list(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        raise RequestError(f"latents: expected a tensor of the shape {list(shape)}, got {received}")
    return latents


def latents_shape(manifest: Manifest, request: Request) -> tuple[int, int, int, int]:
    """The shape of a request's latents: [images, channels, height, width]."""
    scale = manifest.vae.spatial
    return request.batch, manifest.vae.latent_channels, request.height // scale, request.width // scale
