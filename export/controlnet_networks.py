"""ControlNets as plain functions of tensors, and the UNet that takes what they make."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..engines.component_names import residual_input
from ..engines.manifest import ImageShapes, TensorSpec
from .controlnet_sources import residual_shapes
from .networks import (
    DTYPE_NAMES,
    Network,
    added_conditions,
    denoiser_inputs,
    extent,
    latents_spec,
    spec,
)


class CondEmbedding(nn.Module):
    """A control image to what a ControlNet adds to its first convolution: the same at every step."""

    def __init__(self, controlnet: Any) -> None:
        super().__init__()
        self.embedding = controlnet.controlnet_cond_embedding
        self.is_bgr = controlnet.config.controlnet_conditioning_channel_order == "bgr"

    def forward(self, controlnet_cond: Tensor) -> Tensor:
        return self.embedding(controlnet_cond.flip(1) if self.is_bgr else controlnet_cond)


class ControlNet(nn.Module):
    """A ControlNet without its embedding of the control image, which it is given. Its residuals come out scaled.

    It takes the model for itself, and changes it.
    """

    def __init__(self, controlnet: Any) -> None:
        super().__init__()
        self.controlnet = controlnet
        controlnet.controlnet_cond_embedding = nn.Identity()
        controlnet.register_to_config(controlnet_conditioning_channel_order="rgb")  # the embedding saw to the order

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        *added, cond_embedding, conditioning_scale = rest
        down, mid = self.controlnet(
            sample,
            timestep,
            encoder_hidden_states,
            cond_embedding,
            added_cond_kwargs=added_conditions(*added),
            return_dict=False,
        )
        # As torch multiplies float16 by a Python number, which is what diffusers does: in float32, rounded once.
        return tuple((residual.float() * conditioning_scale).to(residual.dtype) for residual in (*down, mid))


class ControlledUnet(nn.Module):
    """A UNet whose last inputs are added to its skip connections, and the very last to its middle."""

    def __init__(self, unet: Any, residuals: int) -> None:
        super().__init__()
        self.unet = unet
        self.residuals = residuals

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, *rest: Tensor) -> Tensor:
        added, (*down, mid) = rest[: -self.residuals], rest[-self.residuals :]
        return self.unet(
            sample,
            timestep,
            encoder_hidden_states,
            added_cond_kwargs=added_conditions(*added),
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
            return_dict=False,
        )[0]


def cond_embedding_network(controlnet: Any, shapes: ImageShapes, latent_scale: int) -> Network:
    """The embedding: ``controlnet_cond [B,3,H,W]`` in 0..1 to ``cond_embedding [B,C,h,w]``."""
    dtype, batch = DTYPE_NAMES[controlnet.dtype], extent(shapes.batch)
    return Network(
        CondEmbedding(controlnet),
        {"controlnet_cond": spec(dtype, batch, 3, extent(shapes.height), extent(shapes.width))},
        {"cond_embedding": _embedding_spec(controlnet, batch, shapes, latent_scale)},
    )


def controlnet_network(controlnet: Any, shapes: ImageShapes, guided: bool, latent_scale: int) -> Network:
    """The rest of a ControlNet: the UNet's own inputs, ``cond_embedding [B,C,h,w]`` and ``conditioning_scale [1]``.

    Out come ``down_block_res_sample_0`` and so on, and ``mid_block_res_sample``, times the scale.
    """
    inputs = denoiser_inputs(controlnet, shapes, guided, latent_scale)
    rows = inputs["sample"].shape[0]
    inputs["cond_embedding"] = _embedding_spec(controlnet, rows, shapes, latent_scale)
    inputs["conditioning_scale"] = spec("float32", 1)
    outputs = _residuals(controlnet, rows, shapes, latent_scale)
    return Network(ControlNet(controlnet), inputs, outputs)


def controlled_unet_network(unet: Any, shapes: ImageShapes, guided: bool, latent_scale: int) -> Network:
    """The UNet that also takes ``down_block_additional_residual_0`` and so on, and ``mid_block_additional_residual``.

    Zeros for all of them make it the plain one.
    """
    inputs = denoiser_inputs(unet, shapes, guided, latent_scale)
    latents = inputs["sample"]
    outputs = _residuals(unet, latents.shape[0], shapes, latent_scale)
    residuals = {residual_input(name): spec for name, spec in outputs.items()}
    return Network(ControlledUnet(unet, len(residuals)), inputs | residuals, {"out_sample": latents})


def _embedding_spec(controlnet: Any, rows: Any, shapes: ImageShapes, latent_scale: int) -> TensorSpec:
    channels = controlnet.config.block_out_channels[0]
    return latents_spec(DTYPE_NAMES[controlnet.dtype], rows, channels, shapes, latent_scale)


def _residuals(model: Any, rows: Any, shapes: ImageShapes, latent_scale: int) -> dict[str, TensorSpec]:
    """The residuals of a ControlNet, under diffusers' names."""
    *down, mid = [
        latents_spec(DTYPE_NAMES[model.dtype], rows, channels, shapes, latent_scale, halvings)
        for channels, halvings in residual_shapes(model.config)
    ]
    return {**{f"down_block_res_sample_{i}": shape for i, shape in enumerate(down)}, "mid_block_res_sample": mid}
