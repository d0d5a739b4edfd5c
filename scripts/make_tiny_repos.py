#!/usr/bin/env python
"""Write tiny random stand-ins for every Hub repository that an export reads, under their real names.

    python scripts/make_tiny_repos.py FOLDER

The layout, file names, key names and formats are those of the real repositories; the networks have the real
architectures with few and narrow layers, and random weights: their images are noise. FOLDER then serves as a local
Hub (tests/loopback_hub.py) or as local folders for --base, --lora and --vae.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here comes from the network

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    ControlNetModel,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from real_layout import save_pipeline, scheduler, text_config
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from hypersd.export.tokenizer import write_byte_tokenizer

SD15_REPO = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SDXL_REPO = "stabilityai/stable-diffusion-xl-base-1.0"
SD15_INPAINT_REPO = "stable-diffusion-v1-5/stable-diffusion-inpainting"
SDXL_INPAINT_REPO = "diffusers/stable-diffusion-xl-1.0-inpainting-0.1"
HYPER_REPO = "ByteDance/Hyper-SD"
CONTROLNETS = {
    "lllyasviel/control_v11p_sd15_canny": "SD15",
    "lllyasviel/sd-controlnet-scribble": "SD15",
    "diffusers/controlnet-canny-sdxl-1.0": "SDXL",
    "xinsir/controlnet-scribble-sdxl-1.0": "SDXL",
}
LORAS = {
    "SD15": ("1step-lora", "2steps-lora", "4steps-lora", "8steps-lora", "8steps-CFG-lora", "12steps-CFG-lora"),
    "SDXL": ("1step-lora", "2steps-lora", "4steps-lora", "8steps-lora", "8steps-CFG-lora", "12steps-CFG-lora"),
}
WORDS = ["a", "photo", "of", "the", "cat", "dog", "red", "blue", "on", "with", "and", "in", "image"]


def load_tokenizer(folder: Path, pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    write_byte_tokenizer(folder, WORDS, pad_token)
    return CLIPTokenizer.from_pretrained(folder)


def small_config(tokenizer: CLIPTokenizer, **kwargs: object) -> CLIPTextConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 3}
    return text_config(tokenizer, **sizes, **kwargs)


def kl_vae(scaling_factor: float, force_upcast: bool) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 16, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=scaling_factor, force_upcast=force_upcast,
    )  # fmt: skip


def tiny_vae() -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1, 1, 1, 1), num_decoder_blocks=(1, 1, 1, 1), scaling_factor=1.0,
    )  # fmt: skip


def sd15_unet(in_channels: int = 4) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        in_channels=in_channels, sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32, attention_head_dim=4,
    )  # fmt: skip


def sdxl_unet(in_channels: int = 4) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        in_channels=in_channels, sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2), attention_head_dim=(2, 4), use_linear_projection=True,
        cross_attention_dim=64, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
    )  # fmt: skip


def write_sd15(root: Path) -> UNet2DConditionModel:
    torch.manual_seed(15)
    folder = root / SD15_REPO
    tokenizer = load_tokenizer(folder / "tokenizer")
    pipe = StableDiffusionPipeline(
        tokenizer=tokenizer, text_encoder=CLIPTextModel(small_config(tokenizer)), unet=sd15_unet(),
        vae=kl_vae(0.18215, force_upcast=False), scheduler=scheduler("sd15"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    save_pipeline(pipe, folder)
    torch.manual_seed(16)
    parts = {**pipe.components, "unet": sd15_unet(in_channels=9)}
    inpaint = StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    save_pipeline(inpaint, root / SD15_INPAINT_REPO)
    return pipe.unet


def write_sdxl(root: Path) -> UNet2DConditionModel:
    torch.manual_seed(10)
    folder = root / SDXL_REPO
    tokenizer = load_tokenizer(folder / "tokenizer")
    tokenizer_2 = load_tokenizer(folder / "tokenizer_2", pad_token="!")
    # The two encoders' activations are those of SDXL's, so that a mix-up of the two shows.
    pipe = StableDiffusionXLPipeline(
        tokenizer=tokenizer, tokenizer_2=tokenizer_2,
        text_encoder=CLIPTextModel(small_config(tokenizer, hidden_act="quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(small_config(tokenizer_2, hidden_act="gelu", projection_dim=32)),
        unet=sdxl_unet(), vae=kl_vae(0.13025, force_upcast=True), scheduler=scheduler("sdxl"),
        force_zeros_for_empty_prompt=True, add_watermarker=False,
    )  # fmt: skip
    save_pipeline(pipe, folder)
    torch.manual_seed(11)
    parts = {**pipe.components, "unet": sdxl_unet(in_channels=9)}
    save_pipeline(StableDiffusionXLInpaintPipeline(**parts, add_watermarker=False), root / SDXL_INPAINT_REPO)
    return pipe.unet


def kohya_lora(unet: UNet2DConditionModel, rank: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    """A LoRA over the layers that Hyper-SD's cover, kohya keys, random weights, alpha unequal to rank."""
    generator = torch.Generator().manual_seed(seed)
    lora = {}
    for name, module in unet.named_modules():
        covered = name.startswith(("down_blocks", "mid_block", "up_blocks"))
        if not covered or not isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            continue
        weight = module.weight
        down = torch.randn(rank, *weight.shape[1:], generator=generator) / weight[0].numel() ** 0.5
        up = torch.randn(weight.shape[0], rank, *[1] * (weight.dim() - 2), generator=generator) * 0.2
        key = "lora_unet_" + name.replace(".", "_")
        lora[f"{key}.lora_down.weight"] = down
        lora[f"{key}.lora_up.weight"] = up
        lora[f"{key}.alpha"] = torch.tensor(rank / 2)
    return lora


def write_hyper_sd(root: Path, unets: dict[str, UNet2DConditionModel]) -> None:
    folder = root / HYPER_REPO
    folder.mkdir(parents=True)
    for family, names in LORAS.items():
        for seed, name in enumerate(names):
            save_file(kohya_lora(unets[family], seed=seed), folder / f"Hyper-{family}-{name}.safetensors")
    torch.manual_seed(800)
    save_file(sdxl_unet().state_dict(), folder / "Hyper-SDXL-1step-Unet.safetensors")


def write_vaes(root: Path) -> None:
    torch.manual_seed(16)
    kl_vae(0.13025, force_upcast=False).save_pretrained(root / "madebyollin/sdxl-vae-fp16-fix")
    tiny_vae().save_pretrained(root / "madebyollin/taesd")
    tiny_vae().save_pretrained(root / "madebyollin/taesdxl")


def controlnet(unet: UNet2DConditionModel, embedding: tuple[int, ...] = (4, 4, 8, 8)) -> ControlNetModel:
    """A ControlNet of a UNet's architecture on which the control image has an effect, and it on the UNet."""
    model = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=embedding, load_weights_from_unet=False)
    for module in (*model.controlnet_down_blocks, model.controlnet_mid_block):
        module.reset_parameters()  # they begin as zeros
    for module in model.controlnet_cond_embedding.modules():
        if isinstance(module, torch.nn.Conv2d):  # PyTorch's own weights are so small that no image gets through
            torch.nn.init.normal_(module.weight, std=2.5 / module.weight[0].numel() ** 0.5)
    return model


def write_controlnets(root: Path, unets: dict[str, UNet2DConditionModel]) -> None:
    for seed, (repo, family) in enumerate(CONTROLNETS.items()):
        torch.manual_seed(seed)
        controlnet(unets[family]).save_pretrained(root / repo)


def write_all(root: Path) -> None:
    """Write every repository under ``root``, which must not hold them yet."""
    transformers_logging.disable_progress_bar()
    unets = {"SD15": write_sd15(root), "SDXL": write_sdxl(root)}
    write_controlnets(root, unets)
    write_hyper_sd(root, unets)
    write_vaes(root)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where to write the repositories")
    folder = parser.parse_args().folder
    write_all(folder)
    print(f"tiny random repositories written to {folder}")


if __name__ == "__main__":
    main()
