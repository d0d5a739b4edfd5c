#!/usr/bin/env python
"""Write tiny random stand-ins for every Hub repository that an export reads, under their real names.

    python scripts/make_tiny_repos.py FOLDER

The layout, file names, key names and formats are those of the real repositories; the networks have the real
architectures with few and narrow layers, and random weights: their pictures are noise. FOLDER then serves as a local
Hub (tests/loopback_hub.py) or as local folders for --base, --lora and --vae.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here comes from the network

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils import logging as transformers_logging

SD15_REPO = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SDXL_REPO = "stabilityai/stable-diffusion-xl-base-1.0"
HYPER_REPO = "ByteDance/Hyper-SD"
LORAS = {
    "SD15": ("1step-lora", "2steps-lora", "4steps-lora", "8steps-lora", "8steps-CFG-lora", "12steps-CFG-lora"),
    "SDXL": ("1step-lora", "2steps-lora", "4steps-lora", "8steps-lora", "8steps-CFG-lora", "12steps-CFG-lora"),
}
BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
WORDS = ["a", "photo", "of", "the", "cat", "dog", "red", "blue", "on", "with", "and", "in", "picture"]


def byte_alphabet() -> list[str]:
    """The 256 printable stand-ins for bytes of GPT-2's byte-level BPE, in CLIP's vocabulary order ("!" is 0)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [256 + i for i in range(256 - len(printable))]
    return [chr(c) for c in printable + others]


def write_tokenizer(folder: Path, pad_token: str) -> None:
    """A CLIP tokenizer with a small vocabulary: every byte, a few whole words, the two special tokens."""
    alphabet = byte_alphabet()
    vocab = alphabet + [c + "</w>" for c in alphabet]
    merges = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            if (merge := f"{pieces[0]} {pieces[1]}") not in merges:
                merges.append(merge)
                vocab.append(pieces[0] + pieces[1])
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special["pad_token"] = pad_token
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    config = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", "add_prefix_space": False, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def load_tokenizer(folder: Path, pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    write_tokenizer(folder, pad_token)
    return CLIPTokenizer.from_pretrained(folder)


def text_config(tokenizer: CLIPTokenizer, **kwargs: object) -> CLIPTextConfig:
    size = len(tokenizer)
    # eos_token_id=2 is what the real files say; it makes CLIP pool at the largest id, which is the end token's.
    return CLIPTextConfig(
        vocab_size=size, hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=3,
        max_position_embeddings=77, bos_token_id=0, eos_token_id=2, pad_token_id=1, **kwargs,
    )  # fmt: skip


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


def sd15_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32, attention_head_dim=4,
    )  # fmt: skip


def sdxl_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
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
        tokenizer=tokenizer, text_encoder=CLIPTextModel(text_config(tokenizer)), unet=sd15_unet(),
        vae=kl_vae(0.18215, force_upcast=False), scheduler=PNDMScheduler(**BETAS, skip_prk_steps=True),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.scheduler.register_to_config(clip_sample=False)  # stands in the real file, and matters to DDIM
    save_without_tokenizers(pipe, folder)
    return pipe.unet


def write_sdxl(root: Path) -> UNet2DConditionModel:
    torch.manual_seed(10)
    folder = root / SDXL_REPO
    tokenizer = load_tokenizer(folder / "tokenizer")
    tokenizer_2 = load_tokenizer(folder / "tokenizer_2", pad_token="!")
    # The two encoders' activations are those of SDXL's, so that a mix-up of the two shows.
    pipe = StableDiffusionXLPipeline(
        tokenizer=tokenizer, tokenizer_2=tokenizer_2,
        text_encoder=CLIPTextModel(text_config(tokenizer, hidden_act="quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer_2, hidden_act="gelu", projection_dim=32)),
        unet=sdxl_unet(), vae=kl_vae(0.13025, force_upcast=True), scheduler=EulerDiscreteScheduler(
            **{k: v for k, v in BETAS.items() if k != "set_alpha_to_one"}, timestep_spacing="leading"),
        force_zeros_for_empty_prompt=True, add_watermarker=False,
    )  # fmt: skip
    pipe.scheduler.register_to_config(clip_sample=False, set_alpha_to_one=False)
    save_without_tokenizers(pipe, folder)
    return pipe.unet


def save_without_tokenizers(pipe: StableDiffusionPipeline | StableDiffusionXLPipeline, folder: Path) -> None:
    """Save the pipeline but keep the tokenizer folders as the real repositories have them: no tokenizer.json."""
    kept = {path: path.read_bytes() for path in folder.glob("tokenizer*/*")}
    pipe.save_pretrained(folder)
    for path in folder.glob("tokenizer*/*"):
        path.unlink()
    for path, content in kept.items():
        path.write_bytes(content)


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


def write_all(root: Path) -> None:
    """Write every repository under ``root``, which must not hold them yet."""
    transformers_logging.disable_progress_bar()
    unets = {"SD15": write_sd15(root), "SDXL": write_sdxl(root)}
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
