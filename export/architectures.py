"""The published architectures of SD1.5 and SDXL, in the words of diffusers' and transformers' configurations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from .. import families

Config = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """Everything but the weights of a base, of its TAESD and of the LoRAs for it.

    Attributes:
        pipeline: diffusers' class of pipeline.
        text_encoders: arguments of ``CLIPTextConfig``, by folder (``text_encoder``, ``text_encoder_2``).
        pad_tokens: padding token of each text encoder's tokenizer.
        unet: arguments of ``UNet2DConditionModel``.
        vae: arguments of ``AutoencoderKL``.
        tiny_vae: arguments of ``AutoencoderTiny``.
        scheduler: the contents of ``scheduler_config.json``.
        pipeline_settings: the entries of ``model_index.json`` besides the networks.
        lora_rank: rank of Hyper-SD's LoRAs.
    """

    pipeline: str
    text_encoders: Mapping[str, Config]
    pad_tokens: Mapping[str, str]
    unet: Config
    vae: Config
    tiny_vae: Config
    scheduler: Config
    pipeline_settings: Config
    lora_rank: int = 64


# eos_token_id=2 as in the published files; it makes CLIP pool at the largest id, which is the end token's.
CLIP = {"vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
CLIP_L = {
    **CLIP,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
CLIP_G = {
    **CLIP,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
SD15_UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SDXL_UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
KL_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
TAESD = {"scaling_factor": 1.0}
BETAS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}
SD15 = Architecture(
    pipeline=families.SD15.pipeline_class,
    text_encoders={"text_encoder": CLIP_L},
    pad_tokens={"text_encoder": "<|endoftext|>"},
    unet=SD15_UNET,
    vae={**KL_VAE, "sample_size": 512, "scaling_factor": 0.18215},
    tiny_vae=TAESD,
    scheduler={"_class_name": "PNDMScheduler", **BETAS},
    pipeline_settings={
        "safety_checker": (None, None),
        "feature_extractor": (None, None),
        "requires_safety_checker": False,
    },
)
SDXL = Architecture(
    pipeline=families.SDXL.pipeline_class,
    text_encoders={"text_encoder": CLIP_L, "text_encoder_2": CLIP_G},
    pad_tokens={"text_encoder": "<|endoftext|>", "text_encoder_2": "!"},
    unet=SDXL_UNET,
    # force_upcast is off, as in the VAE that is repaired for float16: only trained weights overflow.
    vae={**KL_VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": False},
    tiny_vae=TAESD,
    scheduler={"_class_name": "EulerDiscreteScheduler", **BETAS, "timestep_spacing": "leading"},
    pipeline_settings={"force_zeros_for_empty_prompt": True},
)
PUBLISHED: Mapping[str, Architecture] = MappingProxyType({families.SD15.name: SD15, families.SDXL.name: SDXL})


def empty_networks(architecture: Architecture) -> dict[str, nn.Module]:
    """Every network on the meta device: shapes and names, no memory.

    Returns:
        The text encoders by folder, ``unet``, ``vae`` and ``tiny_vae``.
    """
    import transformers
    from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel

    family = next(f for f in families.FAMILIES.values() if f.pipeline_class == architecture.pipeline)
    with torch.device("meta"):
        encoders: dict[str, nn.Module] = {
            name: getattr(transformers, family.text_encoder(name).class_name)(transformers.CLIPTextConfig(**config))
            for name, config in architecture.text_encoders.items()
        }
        return {
            **encoders,
            "unet": UNet2DConditionModel(**architecture.unet),
            "vae": AutoencoderKL(**architecture.vae),
            "tiny_vae": AutoencoderTiny(**architecture.tiny_vae),
        }
