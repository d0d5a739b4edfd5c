"""Stable Diffusion XL (Podell et al., https://arxiv.org/abs/2307.01952)."""

from __future__ import annotations

from .family import Family, TextEncoder


def size_conditioning(height: int, width: int) -> tuple[int, ...]:
    """Original size, crop corner and target size, in pixels (section 2.2), without a crop."""
    return height, width, 0, 0, height, width


SDXL = Family(
    name="sdxl",
    title="SDXL",
    text_encoders=(
        TextEncoder(component="text_encoder", tokenizer="tokenizer", class_name="CLIPTextModel", hidden_layer=-2),
        TextEncoder(
            component="text_encoder_2",
            tokenizer="tokenizer_2",
            class_name="CLIPTextModelWithProjection",
            hidden_layer=-2,
            is_pooled=True,
        ),
    ),
    size_conditioning=size_conditioning,
    addition_embed_type="text_time",
    scaling_factor=0.13025,
    default_size=1024,
    has_zeroed_negatives=True,
    is_vae_upcast=True,
    pipeline_class="StableDiffusionXLPipeline",
    img2img_pipeline_class="StableDiffusionXLImg2ImgPipeline",
    controlnet_pipeline_class="StableDiffusionXLControlNetPipeline",
    inpaint_pipeline_class="StableDiffusionXLInpaintPipeline",
    controlnet_inpaint_pipeline_class="StableDiffusionXLControlNetInpaintPipeline",
    pipeline_settings={"add_watermarker": False},
    single_file_prefix="conditioner.embedders.1.",
    unet_layout={
        "layers_per_block": 2,
        "block_out_channels": [320, 640, 1280],
        "transformer_layers_per_block": [1, 2, 10],
    },
    unet_marks=(
        "input_blocks.8.1.transformer_blocks.9.",
        "middle_block.1.transformer_blocks.9.",
        "output_blocks.8.0.",
    ),
    # SD1.5 has one transformer block per attention, and one text encoder
    lora_marks=("_transformer_blocks_1_", "lora_te2_", "text_encoder_2_"),
)
