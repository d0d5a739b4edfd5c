"""Architectures with few and narrow layers, for random weights that take no gigabytes."""

from __future__ import annotations

import dataclasses

from hypersd.export.architectures import SD15, SDXL

TEXT = {"vocab_size": 514, "hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 3}
VAE = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 64}
TINY_VAE = {
    "encoder_block_out_channels": (8,) * 4,
    "decoder_block_out_channels": (8,) * 4,
    "num_encoder_blocks": (1,) * 4,
    "num_decoder_blocks": (1,) * 4,
}
UNET = {"sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
SD15_UNET = {
    **UNET,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
}
SDXL_UNET = {
    **UNET,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (2, 4),
    "cross_attention_dim": 64,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 32 + 6 * 8,
}
SMALL = {
    "sd15": dataclasses.replace(
        SD15,
        text_encoders={"text_encoder": {**SD15.text_encoders["text_encoder"], **TEXT, "projection_dim": 32}},
        unet={**SD15.unet, **SD15_UNET},
        vae={**SD15.vae, **VAE},
        tiny_vae={**SD15.tiny_vae, **TINY_VAE},
        lora_rank=4,
    ),
    "sdxl": dataclasses.replace(
        SDXL,
        text_encoders={name: {**config, **TEXT, "projection_dim": 32} for name, config in SDXL.text_encoders.items()},
        unet={**SDXL.unet, **SDXL_UNET},
        vae={**SDXL.vae, **VAE},
        tiny_vae={**SDXL.tiny_vae, **TINY_VAE},
        lora_rank=4,
    ),
}
