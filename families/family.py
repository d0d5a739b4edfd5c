"""A family of models as one value: everything that differs between SD1.5 and SDXL.

Classes are given by name, so that a service that embeds the runtime needs neither diffusers nor transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """A text encoder of a family.

    Attributes:
        component: the component's name in a bundle, which is its folder in diffusers layout.
        tokenizer: the tokenizer's folder, in both.
        class_name: its class in transformers.
        hidden_layer: index of the hidden state that conditions the denoiser; None for the last, after the final norm.
        is_pooled: whether its pooled projection conditions the denoiser too (``text_embeds``).
    """

    component: str
    tokenizer: str
    class_name: str
    hidden_layer: int | None = None
    is_pooled: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """An architecture. The encoders' hidden states are joined on their last axis, in the order of ``text_encoders``.

    Attributes:
        name: its name in a manifest.
        title: its name in messages.
        text_encoders: in the order of the denoiser's conditioning.
        size_conditioning: makes a row of ``time_ids`` from height and width in pixels; None if the denoiser takes none.
        addition_embed_type: the embedding of ``text_embeds`` and ``time_ids`` in diffusers' configurations.
        latent_channels: channels of the latents.
        scaling_factor: factor of the latents of its published VAE.
        default_size: side of the images that the base was trained on, in pixels.
        denoiser: the denoiser's component.
        denoiser_class: its class in diffusers.
        has_zeroed_negatives: whether the base was trained with zeros, not with an empty text, for no prompt.
        is_vae_upcast: whether diffusers decodes in float32 if the VAE's configuration has ``force_upcast``.
        pipeline_class: diffusers' pipeline.
        img2img_pipeline_class: its pipeline for init images.
        controlnet_pipeline_class: its pipeline for ControlNets.
        inpaint_pipeline_class: its pipeline for inpainting, and for bases that were trained for that.
        controlnet_inpaint_pipeline_class: the same with ControlNets.
        pipeline_parts: components of that pipeline that are left out, as it takes them.
        pipeline_settings: its other settings.
        single_file_prefix: beginning of a key that only this family's single-file checkpoints have.
        unet_layout: the fields of the published UNet's configuration by which distilled, smaller ones are told.
        unet_marks: beginnings of layers that those lack, in the original Stable Diffusion's key names.
        lora_prefix: beginning of every key of a LoRA for the denoiser, in kohya's layout.
        lora_marks: parts of keys that only this family's LoRAs have, with underscores for dots.
    """

    name: str
    title: str
    text_encoders: tuple[TextEncoder, ...]
    size_conditioning: Callable[[int, int], tuple[int, ...]] | None = None
    addition_embed_type: str | None = None
    latent_channels: int = 4
    scaling_factor: float = 0.18215
    default_size: int
    denoiser: str = "unet"
    denoiser_class: str = "UNet2DConditionModel"
    has_zeroed_negatives: bool = False
    is_vae_upcast: bool = False
    pipeline_class: str
    img2img_pipeline_class: str
    controlnet_pipeline_class: str
    inpaint_pipeline_class: str
    controlnet_inpaint_pipeline_class: str
    pipeline_parts: Mapping[str, None] = dataclasses.field(default_factory=dict)
    pipeline_settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    single_file_prefix: str
    unet_layout: Mapping[str, Any]
    unet_marks: tuple[str, ...]
    lora_prefix: str = "lora_unet_"
    lora_marks: tuple[str, ...]

    def text_encoder(self, component: str) -> TextEncoder:
        """The text encoder of that name; KeyError if there is none."""
        return {encoder.component: encoder for encoder in self.text_encoders}[component]

    @property
    def inpainting_channels(self) -> int:
        """Input channels of a denoiser for inpainting: the latents, a mask, and the latents of the masked image."""
        return 2 * self.latent_channels + 1

    @property
    def encoder_names(self) -> tuple[str, ...]:
        """The text encoders' components, in order."""
        return tuple(encoder.component for encoder in self.text_encoders)
