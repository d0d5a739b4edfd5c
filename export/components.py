"""The components of a bundle as plain functions of tensors: what is traced, under which names, types and shapes.

Input and output names follow the layout that optimum exports (docs/how-it-works.md has the list).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from ..engines.random_inputs import random_input
from ..engines.specs import ImageShapes, Range, TensorSpec
from ..families import TextEncoder

TOKENS = 77  # CLIP's context
TIME_IDS = 6  # original size, crop corner, target size: two numbers each


@dataclasses.dataclass(frozen=True)
class ComponentModule:
    """A module to trace. Its positional arguments are its inputs, in the order of ``inputs``.

    ``vocabulary`` is the number of tokens, where the input is tokens.
    """

    module: nn.Module
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    vocabulary: int = 1

    @property
    def ranges(self) -> dict[str, Range]:
        """Every dimension of the inputs that varies by itself, by name; the outputs' follow from them."""
        dims = [dim for spec in self.inputs.values() for dim in spec.shape if isinstance(dim, Range)]
        return {dim.name: dim for dim in dims if not dim.is_halved}

    def random_inputs(self, extents: dict[str, int], seed: int) -> list[Tensor]:
        """Inputs like those of real calls: unit-variance latents and embeddings, valid tokens and timesteps.

        Args:
            extents: the extent of every dimension that varies, by name.
            seed: decides the values.
        """
        generator = torch.Generator().manual_seed(seed)
        return [
            random_input(name, spec, spec.shape_at(extents), self.vocabulary, generator)
            for name, spec in self.inputs.items()
        ]


@dataclasses.dataclass(frozen=True)
class Specs:
    """Makes the specs of one component's tensors.

    Attributes:
        dtype: of weights and activations.
        shapes: images per call, and their size.
        latent_scale: pixels per latent.
        rows_per_image: 2 where a call may hold each image twice, for classifier-free guidance.
    """

    dtype: torch.dtype
    shapes: ImageShapes
    latent_scale: int = 8
    rows_per_image: int = 1

    def rows(self, *shape: int | Range, dtype: Any = None) -> TensorSpec:
        """A tensor with rows for the call's images on its first axis, before ``shape``."""
        batch, most = self.shapes.batch, self.rows_per_image
        first = Range(name=batch.name, min=batch.min, opt=most * batch.opt, max=most * batch.max)
        dims = tuple(dim.opt if isinstance(dim, Range) and dim.min == dim.max else dim for dim in (first, *shape))
        return TensorSpec(dtype=dtype or dtype_name(self.dtype), shape=dims, rows_per_image=most)

    def latents(self, channels: int, halvings: int = 0) -> TensorSpec:
        """A tensor of the latents' size, or of a half, a quarter and so on of it."""
        sides = ("height", "width")
        latents = [getattr(self.shapes, side).divided(self.latent_scale, f"latent_{side}") for side in sides]
        return self.rows(channels, *(side.halved(halvings) for side in latents))

    def pixels(self) -> TensorSpec:
        """An image of three channels."""
        return self.rows(3, self.shapes.height, self.shapes.width)


def dtype_name(dtype: torch.dtype) -> Any:
    """The type's name in a manifest."""
    return str(dtype).removeprefix("torch.")


SCALAR = TensorSpec(dtype="float32", shape=(1,))


class TextEncoderModule(nn.Module):
    """Tokens to a hidden state and, if ``kind`` is pooled, the pooled projection."""

    def __init__(self, encoder: Any, kind: TextEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.kind = kind

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        if self.kind.hidden_layer is None:
            return (self.encoder(input_ids)[0],)
        output = self.encoder(input_ids, output_hidden_states=True)
        hidden = output.hidden_states[self.kind.hidden_layer]
        return (hidden, output.text_embeds) if self.kind.is_pooled else (hidden,)


class Unet(nn.Module):
    """A UNet; SDXL's takes the pooled text and the size conditioning as two more inputs."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> Tensor:
        added = added_conditions(text_embeds, time_ids)
        return self.unet(sample, timestep, encoder_hidden_states, added_cond_kwargs=added, return_dict=False)[0]


def added_conditions(text_embeds: Tensor | None = None, time_ids: Tensor | None = None) -> dict[str, Any] | None:
    """SDXL's two more inputs as diffusers takes them; None for SD1.5."""
    return None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}


class CastOutput(nn.Module):
    """A module whose output is cast: SDXL's size embedding is float32 and would meet float16 in a Concat."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module
        self.dtype = dtype

    def forward(self, *args: Tensor) -> Tensor:
        return self.module(*args).to(self.dtype)


class VaeEncoder(nn.Module):
    """An image in -1..1 to the distribution of its latents, or TAESD's latents; neither is scaled."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, sample: Tensor) -> Tensor:
        encoded = self.vae.encode(sample, return_dict=False)[0]
        return encoded if isinstance(encoded, Tensor) else encoded.parameters


class VaeDecoder(nn.Module):
    """Latents, already divided by the scaling factor, to an image in -1..1."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: Tensor) -> Tensor:
        return self.vae.decode(latent_sample, return_dict=False)[0]


def text_encoder_component(kind: TextEncoder, encoder: Any, shapes: ImageShapes) -> ComponentModule:
    """A text encoder: ``input_ids [B,77]`` to ``hidden_states [B,77,C]``, and ``text_embeds [B,P]`` if pooled."""
    specs = Specs(encoder.dtype, shapes)
    outputs = {"hidden_states": specs.rows(TOKENS, encoder.config.hidden_size)}
    if kind.is_pooled:
        outputs["text_embeds"] = specs.rows(encoder.config.projection_dim)
    inputs = {"input_ids": specs.rows(TOKENS, dtype="int64")}
    return ComponentModule(TextEncoderModule(encoder, kind), inputs, outputs, encoder.config.vocab_size)


def unet_component(unet: Any, shapes: ImageShapes, guided: bool, latent_scale: int) -> ComponentModule:
    """The UNet: ``sample [B,4,h,w]``, ``timestep [1]``, ``encoder_hidden_states [B,77,C]`` to ``out_sample [B,4,h,w]``.

    ``sample`` has nine channels if the UNet is for inpainting: latents, mask, and the latents of the masked image.

    Args:
        unet: a ``UNet2DConditionModel``.
        shapes: images per call, and their size.
        guided: whether a call may hold each image twice, for classifier-free guidance.
        latent_scale: pixels per latent.
    """
    specs = denoiser_specs(unet, shapes, guided, latent_scale)
    inputs = denoiser_inputs(unet, specs)
    return ComponentModule(Unet(unet), inputs, {"out_sample": specs.latents(unet.config.out_channels)})


def denoiser_specs(model: Any, shapes: ImageShapes, guided: bool, latent_scale: int) -> Specs:
    """The specs of a UNet's and its ControlNets' tensors."""
    return Specs(model.dtype, shapes, latent_scale, 2 if guided else 1)


def denoiser_inputs(model: Any, specs: Specs) -> dict[str, TensorSpec]:
    """The inputs that a UNet and its ControlNets have in common.

    Also patches ``add_time_proj``, so that SDXL's embedding of sizes keeps the model's type.
    """
    config = model.config
    inputs = {
        "sample": specs.latents(config.in_channels),
        "timestep": SCALAR,
        "encoder_hidden_states": specs.rows(TOKENS, config.cross_attention_dim),
    }
    if config.addition_embed_type == "text_time":
        size = TIME_IDS * config.addition_time_embed_dim
        inputs["text_embeds"] = specs.rows(config.projection_class_embeddings_input_dim - size)
        inputs["time_ids"] = specs.rows(TIME_IDS)
        model.add_time_proj = CastOutput(model.add_time_proj, model.dtype)
    return inputs


def vae_encoder_component(vae: Any, shapes: ImageShapes, latent_scale: int, is_tiny: bool) -> ComponentModule:
    """The encoder: ``sample [B,3,H,W]`` in -1..1 to ``latent_parameters``.

    Those are ``[B,8,h,w]``, four channels of means and four of log-variances; with ``is_tiny``, of TAESD,
    ``[B,4,h,w]``, the latents themselves.
    """
    specs = Specs(vae.dtype, shapes, latent_scale)
    channels = vae.config.latent_channels * (1 if is_tiny else 2)
    return ComponentModule(VaeEncoder(vae), {"sample": specs.pixels()}, {"latent_parameters": specs.latents(channels)})


def vae_decoder_component(vae: Any, shapes: ImageShapes, latent_scale: int) -> ComponentModule:
    """The decoder: ``latent_sample [B,4,h,w]`` to ``sample [B,3,H,W]`` in -1..1."""
    specs = Specs(vae.dtype, shapes, latent_scale)
    inputs = {"latent_sample": specs.latents(vae.config.latent_channels)}
    return ComponentModule(VaeDecoder(vae), inputs, {"sample": specs.pixels()})
