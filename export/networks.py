"""The bundle's networks as plain functions of tensors: what is traced, under which names, types and shapes.

Input and output names follow the layout that optimum exports (see the ONNX contract in the README).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from ..engines.compare import random_input
from ..engines.manifest import ImageShapes, Range, TensorSpec
from ..families import TextEncoder

TOKENS = 77  # CLIP's context
LATENT_CHANNELS = 4
TIME_IDS = 6  # original size, crop corner, target size: two numbers each
DTYPE_NAMES = {torch.float16: "float16", torch.float32: "float32"}


@dataclasses.dataclass(frozen=True)
class Network:
    """A module whose positional arguments are its inputs, in the order of ``inputs``.

    ``vocabulary`` is the number of tokens, where the input is tokens.
    """

    module: nn.Module
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    vocabulary: int = 1

    @property
    def ranges(self) -> dict[str, Range]:
        """Every dimension that varies by itself, by name."""
        specs = [*self.inputs.values(), *self.outputs.values()]
        dims = [dim for spec in specs for dim in spec.shape if isinstance(dim, Range)]
        return {dim.name: dim for dim in dims if not dim.is_halved}

    def random_inputs(self, extents: dict[str, int], seed: int) -> list[Tensor]:
        """Inputs like those of real calls: unit-variance latents and embeddings, valid tokens and timesteps.

        Args:
            extents: the extent of every dimension that varies, by name.
            seed: decides the values.
        """
        generator = torch.Generator().manual_seed(seed)
        return [self._random_input(name, spec, extents, generator) for name, spec in self.inputs.items()]

    def _random_input(self, name: str, spec: TensorSpec, extents: dict[str, int], generator: torch.Generator) -> Tensor:
        return random_input(name, spec, spec.shape_at(extents), self.vocabulary, generator)


class TextEncoderModule(nn.Module):
    """Tokens to a hidden state and, if ``kind`` asks for it, the pooled projection."""

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


class VaeDecoder(nn.Module):
    """Latents, already divided by the scaling factor, to an image in -1..1."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: Tensor) -> Tensor:
        return self.vae.decode(latent_sample, return_dict=False)[0]


def text_encoder_network(kind: TextEncoder, encoder: Any, shapes: ImageShapes) -> Network:
    """A text encoder: ``input_ids [B,77]`` to ``hidden_states [B,77,C]``, and ``text_embeds [B,P]`` if pooled."""
    dtype = DTYPE_NAMES[encoder.dtype]
    batch = extent(shapes.batch)
    outputs = {"hidden_states": spec(dtype, batch, TOKENS, encoder.config.hidden_size)}
    if kind.is_pooled:
        outputs["text_embeds"] = spec(dtype, batch, encoder.config.projection_dim)
    return Network(
        TextEncoderModule(encoder, kind),
        {"input_ids": spec("int64", batch, TOKENS)},
        outputs,
        encoder.config.vocab_size,
    )


def unet_network(unet: Any, shapes: ImageShapes, guided: bool, latent_scale: int) -> Network:
    """The UNet: ``sample [B,4,h,w]``, ``timestep [1]``, ``encoder_hidden_states [B,77,C]`` to ``out_sample``.

    Args:
        unet: a ``UNet2DConditionModel``.
        shapes: images per call, and their size.
        guided: whether a call may hold each image twice, for classifier-free guidance.
        latent_scale: pixels per latent.
    """
    inputs = denoiser_inputs(unet, shapes, guided, latent_scale)
    return Network(Unet(unet), inputs, {"out_sample": inputs["sample"]})


def denoiser_inputs(model: Any, shapes: ImageShapes, guided: bool, latent_scale: int) -> dict[str, TensorSpec]:
    """The inputs that a UNet and its ControlNets have in common; SDXL's embedding of sizes learns to keep its type."""
    dtype, batch = DTYPE_NAMES[model.dtype], shapes.batch
    if guided:
        batch = Range(name=batch.name, min=batch.min, opt=2 * batch.opt, max=2 * batch.max)
    rows = extent(batch)
    inputs = {
        "sample": latents_spec(dtype, rows, LATENT_CHANNELS, shapes, latent_scale),
        "timestep": spec("float32", 1),
        "encoder_hidden_states": spec(dtype, rows, TOKENS, model.config.cross_attention_dim),
    }
    if model.config.addition_embed_type == "text_time":
        size = TIME_IDS * model.config.addition_time_embed_dim
        inputs["text_embeds"] = spec(dtype, rows, model.config.projection_class_embeddings_input_dim - size)
        inputs["time_ids"] = spec(dtype, rows, TIME_IDS)
        model.add_time_proj = CastOutput(model.add_time_proj, model.dtype)
    return inputs


def vae_decoder_network(vae: Any, shapes: ImageShapes, latent_scale: int) -> Network:
    """The decoder: ``latent_sample [B,4,h,w]`` to ``sample [B,3,H,W]`` in -1..1."""
    dtype, batch = DTYPE_NAMES[vae.dtype], extent(shapes.batch)
    return Network(
        VaeDecoder(vae),
        {"latent_sample": latents_spec(dtype, batch, LATENT_CHANNELS, shapes, latent_scale)},
        {"sample": spec(dtype, batch, 3, extent(shapes.height), extent(shapes.width))},
    )


def spec(dtype: Any, *shape: int | Range) -> TensorSpec:
    return TensorSpec(dtype=dtype, shape=shape)


def latents_spec(
    dtype: Any, rows: int | Range, channels: int, shapes: ImageShapes, scale: int, halvings: int = 0
) -> TensorSpec:
    """A tensor of latents' size, or of a half, a quarter and so on of it."""
    sides = [getattr(shapes, side).divided(scale, f"latent_{side}").halved(halvings) for side in ("height", "width")]
    return spec(dtype, rows, channels, *map(extent, sides))


def extent(wide: Range) -> int | Range:
    """A range of one value is a fixed dimension."""
    return wide.opt if wide.min == wide.max else wide
