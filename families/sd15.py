"""Stable Diffusion 1.5 (Rombach et al., "High-Resolution Image Synthesis", https://arxiv.org/abs/2112.10752)."""

from __future__ import annotations

from .family import Family, TextEncoder

SD15 = Family(
    name="sd15",
    title="SD1.5",
    text_encoders=(TextEncoder(component="text_encoder", tokenizer="tokenizer", class_name="CLIPTextModel"),),
    default_size=512,
    pipeline_class="StableDiffusionPipeline",
    img2img_pipeline_class="StableDiffusionImg2ImgPipeline",
    controlnet_pipeline_class="StableDiffusionControlNetPipeline",
    inpaint_pipeline_class="StableDiffusionInpaintPipeline",
    controlnet_inpaint_pipeline_class="StableDiffusionControlNetInpaintPipeline",
    pipeline_parts={"safety_checker": None, "feature_extractor": None},
    pipeline_settings={"requires_safety_checker": False},
    single_file_prefix="cond_stage_model.transformer.",
    unet_layout={
        "layers_per_block": 2,
        "block_out_channels": [320, 640, 1280, 1280],
        "transformer_layers_per_block": 1,
    },
    unet_marks=("input_blocks.2.1.", "middle_block.1.", "output_blocks.11.1."),
    lora_marks=("down_blocks_0_attentions_", "input_blocks_1_1_"),  # SDXL has no attention at full resolution
)
