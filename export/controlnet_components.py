"""ControlNets as plain functions of tensors, and the UNet that takes their residuals."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..engines.component_names import residual_input
from ..engines.specs import ImageShapes, TensorSpec
from .components import SCALAR, ComponentModule, Specs, added_conditions, denoiser_inputs, denoiser_specs
from .controlnet_sources import residual_shapes


class CondEmbedding(nn.Module):
    """Embeds a control image; a ControlNet adds the result to its first convolution at every step."""

    def __init__(self, controlnet: Any) -> None:
        super().__init__()
        self.embedding = controlnet.controlnet_cond_embedding
        self.is_bgr = controlnet.config.controlnet_conditioning_channel_order == "bgr"

    def forward(self, controlnet_cond: Tensor) -> Tensor:
        return self.embedding(controlnet_cond.flip(1) if self.is_bgr else controlnet_cond)


class ControlNet(nn.Module):
    """A ControlNet whose control image is embedded already, and whose residuals are scaled.

    Changes the model that it is given.
    """

    def __init__(self, controlnet: Any) -> None:
        super().__init__()
        self.controlnet = controlnet
        controlnet.controlnet_cond_embedding = nn.Identity()
        controlnet.register_to_config(controlnet_conditioning_channel_order="rgb")  # the embedding does the reordering

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
        # diffusers multiplies by a Python number, which torch does in float32, rounded once.
        return tuple((residual.float() * conditioning_scale).to(residual.dtype) for residual in (*down, mid))


class ControlledUnet(nn.Module):
    """A UNet with residuals: the last inputs are added to its skip connections, and the very last to its middle."""

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


def cond_embedding_component(controlnet: Any, shapes: ImageShapes, latent_scale: int) -> ComponentModule:
    """The embedding: ``controlnet_cond [B,3,H,W]`` in 0..1 to ``cond_embedding [B,C,h,w]``."""
    specs = Specs(controlnet.dtype, shapes, latent_scale)
    outputs = {"cond_embedding": _cond_embedding(controlnet, specs)}
    return ComponentModule(CondEmbedding(controlnet), {"controlnet_cond": specs.pixels()}, outputs)


def controlnet_component(controlnet: Any, shapes: ImageShapes, guided: bool, latent_scale: int) -> ComponentModule:
    """The rest of a ControlNet: the UNet's own inputs, ``cond_embedding [B,C,h,w]`` and ``conditioning_scale [1]``.

    The outputs are ``down_block_res_sample_0`` and so on, and ``mid_block_res_sample``, times the scale.
    """
    specs = denoiser_specs(controlnet, shapes, guided, latent_scale)
    inputs = denoiser_inputs(controlnet, specs)
    inputs |= {"cond_embedding": _cond_embedding(controlnet, specs), "conditioning_scale": SCALAR}
    return ComponentModule(ControlNet(controlnet), inputs, _residuals(controlnet, specs))


def controlled_unet_component(unet: Any, shapes: ImageShapes, guided: bool, latent_scale: int) -> ComponentModule:
    """The UNet that also takes ``down_block_additional_residual_0`` and so on, and ``mid_block_additional_residual``.

    With zeros for all of them it is the plain UNet.
    """
    specs = denoiser_specs(unet, shapes, guided, latent_scale)
    inputs = denoiser_inputs(unet, specs)
    residuals = {residual_input(name): spec for name, spec in _residuals(unet, specs).items()}
    module = ControlledUnet(unet, len(residuals))
    return ComponentModule(module, inputs | residuals, {"out_sample": specs.latents(unet.config.out_channels)})


def _cond_embedding(controlnet: Any, specs: Specs) -> TensorSpec:
    return specs.latents(controlnet.config.block_out_channels[0])


def _residuals(model: Any, specs: Specs) -> dict[str, TensorSpec]:
    """The residuals of a ControlNet, under diffusers' names."""
    *down, mid = [specs.latents(channels, halvings) for channels, halvings in residual_shapes(model.config)]
    return {**{f"down_block_res_sample_{i}": spec for i, spec in enumerate(down)}, "mid_block_res_sample": mid}
