"""The demonstration networks: the architectures of SD1.5, SDXL, their ControlNet and TAESD with few, narrow layers.

Everything that does not set a size is as in the real repositories' configurations.
"""

from __future__ import annotations

import functools

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    ControlNetModel,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from real_layout import BETAS, text_config
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from .scenes import SIZE

FACTOR = 8  # pixels a latent
LATENT_SIZE = SIZE // FACTOR
SCALING_FACTORS = {"sd15": 0.18215, "sdxl": 0.13025}
TEXT_WIDTHS = {"sd15": (64,), "sdxl": (48, 64)}


def encoder_config(tokenizer: CLIPTokenizer, width: int, layers: int, **changes: object) -> CLIPTextConfig:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": 2}
    return text_config(tokenizer, **sizes, num_hidden_layers=layers, **changes)


def text_encoders(family: str, tokenizers: list[CLIPTokenizer]) -> list[nn.Module]:
    """SD1.5's one, or SDXL's two, of which the UNet reads the layer before the last."""
    if family == "sd15":
        return [CLIPTextModel(encoder_config(tokenizers[0], *TEXT_WIDTHS["sd15"], layers=3, hidden_act="quick_gelu"))]
    first, second = TEXT_WIDTHS["sdxl"]
    return [
        CLIPTextModel(encoder_config(tokenizers[0], first, layers=3, hidden_act="quick_gelu")),
        CLIPTextModelWithProjection(
            encoder_config(tokenizers[1], second, layers=4, hidden_act="gelu", projection_dim=second)
        ),
    ]


def unet(family: str) -> UNet2DConditionModel:
    common = {"sample_size": LATENT_SIZE, "layers_per_block": 1, "norm_num_groups": 8}
    if family == "sd15":
        model = UNet2DConditionModel(
            **common, block_out_channels=(32, 48), cross_attention_dim=sum(TEXT_WIDTHS["sd15"]), attention_head_dim=2,
            down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        )  # fmt: skip
    else:
        model = UNet2DConditionModel(
            **common, block_out_channels=(32, 48), cross_attention_dim=sum(TEXT_WIDTHS["sdxl"]),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=(1, 2),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2),
            use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=TEXT_WIDTHS["sdxl"][1] + 6 * 8,
        )  # fmt: skip
    return quick_to_train(model)


def controlnet(base: UNet2DConditionModel) -> ControlNetModel:
    """A ControlNet that starts as a copy of the base's encoder (Zhang et al., https://arxiv.org/abs/2302.05543)."""
    return quick_to_train(ControlNetModel.from_unet(base, conditioning_embedding_out_channels=(16, 16, 24, 32)))


class Float32Conv(nn.Conv2d):
    """A convolution that autocast leaves alone."""

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        with torch.autocast(sample.device.type, enabled=False):
            return super().forward(sample.float())


def quick_to_train(model: nn.Module) -> nn.Module:
    """Attention written out, whose backward pass is several times faster on CPUs than that of the fused kernel."""
    model.set_attn_processor(AttnProcessor())
    # The layers that the noise itself passes stay in float32: at the first timesteps the image is a thousandth of it.
    for name, module in model.named_modules():
        if name in ("conv_in", "conv_out") or name.endswith("conv_shortcut"):
            module.__class__ = Float32Conv
    return model


def vae(family: str) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 32, 48, 48), layers_per_block=1, latent_channels=4, norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, sample_size=SIZE,
        scaling_factor=SCALING_FACTORS[family], force_upcast=False,
    )  # fmt: skip


def tiny_vae() -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(24,) * 4, decoder_block_out_channels=(24,) * 4,
        num_encoder_blocks=(1, 1, 1, 1), num_decoder_blocks=(2, 2, 2, 1), scaling_factor=1.0,
    )  # fmt: skip


@functools.cache
def alphas_cumprod() -> torch.Tensor:
    """SD's noise schedule: float64 [1000]."""
    betas = torch.linspace(BETAS["beta_start"] ** 0.5, BETAS["beta_end"] ** 0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)
