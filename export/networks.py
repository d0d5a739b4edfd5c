"""The bundle's networks as plain functions of tensors: what is traced, under which names, types and shapes.

Input and output names follow the layout that optimum exports (see the ONNX contract in the README).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from ..engines.manifest import PictureShapes, Range, TensorSpec
from ..engines.random_inputs import random_input

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
        """Every dimension that varies, by name."""
        specs = [*self.inputs.values(), *self.outputs.values()]
        return {dim.name: dim for spec in specs for dim in spec.shape if isinstance(dim, Range)}

    def random_inputs(self, extents: dict[str, int], seed: int) -> list[Tensor]:
        """Inputs like those of real calls: unit-variance latents and embeddings, valid tokens and timesteps.

        Args:
            extents: the extent of every dimension that varies, by name.
            seed: decides the values.
        """
        generator = torch.Generator().manual_seed(seed)
        return [self._random_input(name, spec, extents, generator) for name, spec in self.inputs.items()]

    def _random_input(self, name: str, spec: TensorSpec, extents: dict[str, int], generator: torch.Generator) -> Tensor:
        shape = [dim if isinstance(dim, int) else extents[dim.name] for dim in spec.shape]
        return random_input(name, spec, shape, self.vocabulary, generator)


class TextEncoder(nn.Module):
    """SD1.5: tokens to the last hidden state, after the final norm."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.encoder(input_ids)[0]


class PenultimateTextEncoder(nn.Module):
    """SDXL: tokens to the hidden state before the last layer and, of the second encoder, the pooled projection."""

    def __init__(self, encoder: Any, pooled: bool) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooled = pooled

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        output = self.encoder(input_ids, output_hidden_states=True)
        hidden = output.hidden_states[-2]
        return (hidden, output.text_embeds) if self.pooled else (hidden,)


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
        added = None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        return self.unet(sample, timestep, encoder_hidden_states, added_cond_kwargs=added, return_dict=False)[0]


class CastOutput(nn.Module):
    """A module whose output is cast: SDXL's size embedding is float32 and would meet float16 in a Concat."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module
        self.dtype = dtype

    def forward(self, *args: Tensor) -> Tensor:
        return self.module(*args).to(self.dtype)


class VaeDecoder(nn.Module):
    """Latents, already divided by the scaling factor, to a picture in -1..1."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: Tensor) -> Tensor:
        return self.vae.decode(latent_sample, return_dict=False)[0]


def text_encoder_network(name: str, family: str, encoder: Any, shapes: PictureShapes) -> Network:
    """A text encoder: ``input_ids [B,77]`` to ``hidden_states [B,77,C]``, SDXL's second also ``text_embeds [B,P]``."""
    dtype = DTYPE_NAMES[encoder.dtype]
    batch = _dim(shapes.batch)
    outputs = {"hidden_states": _spec(dtype, batch, TOKENS, encoder.config.hidden_size)}
    if pooled := name == "text_encoder_2":
        outputs["text_embeds"] = _spec(dtype, batch, encoder.config.projection_dim)
    module = TextEncoder(encoder) if family == "sd15" else PenultimateTextEncoder(encoder, pooled)
    return Network(module, {"input_ids": _spec("int64", batch, TOKENS)}, outputs, encoder.config.vocab_size)


def unet_network(unet: Any, shapes: PictureShapes, guided: bool, latent_scale: int) -> Network:
    """The UNet: ``sample [B,4,h,w]``, ``timestep [1]``, ``encoder_hidden_states [B,77,C]`` to ``out_sample``.

    Args:
        unet: a ``UNet2DConditionModel``.
        shapes: pictures per call, and their size.
        guided: whether a call may hold each picture twice, for classifier-free guidance.
        latent_scale: pixels per latent.
    """
    dtype = DTYPE_NAMES[unet.dtype]
    batch = shapes.batch
    if guided:
        batch = Range(name=batch.name, min=batch.min, opt=2 * batch.opt, max=2 * batch.max)
    rows = _dim(batch)
    latents = _latents(dtype, rows, shapes, latent_scale)
    inputs = {
        "sample": latents,
        "timestep": _spec("float32", 1),
        "encoder_hidden_states": _spec(dtype, rows, TOKENS, unet.config.cross_attention_dim),
    }
    if unet.config.addition_embed_type == "text_time":
        size = TIME_IDS * unet.config.addition_time_embed_dim
        inputs["text_embeds"] = _spec(dtype, rows, unet.config.projection_class_embeddings_input_dim - size)
        inputs["time_ids"] = _spec(dtype, rows, TIME_IDS)
        unet.add_time_proj = CastOutput(unet.add_time_proj, unet.dtype)
    return Network(Unet(unet), inputs, {"out_sample": latents})


def vae_decoder_network(vae: Any, shapes: PictureShapes, latent_scale: int) -> Network:
    """The decoder: ``latent_sample [B,4,h,w]`` to ``sample [B,3,H,W]`` in -1..1."""
    dtype, batch = DTYPE_NAMES[vae.dtype], _dim(shapes.batch)
    return Network(
        VaeDecoder(vae),
        {"latent_sample": _latents(dtype, batch, shapes, latent_scale)},
        {"sample": _spec(dtype, batch, 3, _dim(shapes.height), _dim(shapes.width))},
    )


def _spec(dtype: Any, *shape: int | Range) -> TensorSpec:
    return TensorSpec(dtype=dtype, shape=shape)


def _latents(dtype: Any, batch: int | Range, shapes: PictureShapes, scale: int) -> TensorSpec:
    height = shapes.height.divided(scale, "latent_height")
    width = shapes.width.divided(scale, "latent_width")
    return _spec(dtype, batch, LATENT_CHANNELS, _dim(height), _dim(width))


def _dim(extent: Range) -> int | Range:
    """A range of one value is a fixed dimension."""
    return extent.opt if extent.min == extent.max else extent
