"""Tiny models under the names of the original Stable Diffusion, and single files that hold them all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hypersd.export.layout import DiffusersBase
from hypersd.export.repositories import LocalFolder

from .fake_hub import BASES
from .tiny_sources import load

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0", "conv_out": "out.2", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
OPEN_CLIP = {
    "self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}  # fmt: skip


def ldm_down_blocks(net: Any) -> dict[str, str]:
    """The original names of the down blocks of a UNet or ControlNet, by diffusers'."""
    layers, places = net.config.layers_per_block, {}
    for i, block in enumerate(net.down_blocks):
        for j in range(layers):
            places[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{(layers + 1) * i + j + 1}.0"
            places[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{(layers + 1) * i + j + 1}.1"
        if block.downsamplers:
            places[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{(layers + 1) * (i + 1)}.0.op"
    return places


def ldm_unet(unet: Any) -> dict[str, Tensor]:
    """A diffusers UNet under the original Stable Diffusion's names."""
    layers = unet.config.layers_per_block
    places = UNET_ENDS | ldm_down_blocks(unet)
    for i, block in enumerate(unet.up_blocks):
        for j in range(layers + 1):
            places[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{(layers + 1) * i + j}.0"
            places[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{(layers + 1) * i + j}.1"
        slot = 2 if getattr(block, "has_cross_attention", False) else 1
        places[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{(layers + 1) * i + layers}.{slot}.conv"
    places |= {f"mid_block.{kind}.{i}": f"middle_block.{at}"
               for kind, i, at in [("resnets", 0, 0), ("attentions", 0, 1), ("resnets", 1, 2)]}  # fmt: skip
    return {f"model.diffusion_model.{rename(name, places, RESNET)}": t for name, t in unet.state_dict().items()}


def ldm_vae(vae: Any) -> dict[str, Tensor]:
    """A diffusers VAE under the original names; its attention's layers are 1x1 convolutions there."""
    count = len(vae.config.block_out_channels)
    places = {}
    for coder, side in (("encoder", "down"), ("decoder", "up")):
        for i in range(count):
            at = i if side == "down" else count - 1 - i
            for j in range(vae.config.layers_per_block + 1):
                places[f"{coder}.{side}_blocks.{i}.resnets.{j}"] = f"{coder}.{side}.{at}.block.{j}"
            places[f"{coder}.{side}_blocks.{i}.{side}samplers.0"] = f"{coder}.{side}.{at}.{side}sample"
        places |= {f"{coder}.mid_block.resnets.{i}": f"{coder}.mid.block_{i + 1}" for i in range(2)}
        places |= {f"{coder}.mid_block.attentions.0": f"{coder}.mid.attn_1", f"{coder}.conv_norm_out":
                   f"{coder}.norm_out"}  # fmt: skip
    leaves = {"conv_shortcut": "nin_shortcut", "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v",
              "to_out.0": "proj_out"}  # fmt: skip
    renamed = {}
    for name, tensor in vae.state_dict().items():
        is_projection = "attentions" in name and tensor.dim() == 2
        renamed[f"first_stage_model.{rename(name, places, leaves)}"] = (
            tensor[:, :, None, None].clone() if is_projection else tensor
        )
    return renamed


def rename(name: str, places: dict[str, str], leaves: dict[str, str]) -> str:
    """``PLACE.LEAF.weight`` with place and leaf in the other naming; inside attentions the names are the same."""
    place = max((p for p in places if name.startswith(f"{p}.")), key=len, default="")
    rest = name[len(place) + 1 :] if place else name
    leaf = max((old for old in leaves if rest.startswith(f"{old}.")), key=len, default=None)
    if leaf is not None:
        rest = leaves[leaf] + rest[len(leaf) :]
    return f"{places[place]}.{rest}" if place else rest


def clip_names(encoder: Any) -> dict[str, Tensor]:
    """A CLIP text encoder's weights as OpenAI's repository names them (``text_model.``)."""
    names = {}
    for name, tensor in encoder.state_dict().items():
        inside = name.startswith(("text_model.", "text_projection"))
        names[name if inside else f"text_model.{name}"] = tensor
    return names


def open_clip(encoder: Any) -> dict[str, Tensor]:
    """A CLIP text encoder under OpenCLIP's names: q, k and v in one, the projection transposed."""
    source = {name.removeprefix("text_model."): tensor for name, tensor in clip_names(encoder).items()}
    renamed = {
        "token_embedding.weight": source.pop("embeddings.token_embedding.weight"),
        "positional_embedding": source.pop("embeddings.position_embedding.weight"),
        "ln_final.weight": source.pop("final_layer_norm.weight"),
        "ln_final.bias": source.pop("final_layer_norm.bias"),
        "text_projection": source.pop("text_projection.weight").T.contiguous(),
        "logit_scale": torch.tensor(4.6),
    }
    for i in range(encoder.config.num_hidden_layers):
        there = f"transformer.resblocks.{i}"
        for leaf in ("weight", "bias"):
            split = [source.pop(f"encoder.layers.{i}.self_attn.{p}_proj.{leaf}") for p in "qkv"]
            renamed[f"{there}.attn.in_proj_{leaf}"] = torch.cat(split)
            for ours, theirs in OPEN_CLIP.items():
                renamed[f"{there}.{theirs}.{leaf}"] = source.pop(f"encoder.layers.{i}.{ours}.{leaf}")
    assert not source
    return renamed


def single_file(root: Path, family: str) -> dict[str, Tensor]:
    """A tiny base as the one-file checkpoints of CompVis and Stability AI hold it, with what else they hold."""
    base = DiffusersBase(LocalFolder(root / BASES[family]))
    tensors = ldm_unet(load(base.part("unet"), family)) | ldm_vae(load(base.part("vae"), family))
    first = {f"transformer.{name}": t for name, t in clip_names(load(base.part("text_encoder"), family)).items()}
    first["transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    prefix = "cond_stage_model." if family == "sd15" else "conditioner.embedders.0."
    tensors |= {prefix + name: tensor for name, tensor in first.items()}
    if family == "sdxl":
        second = open_clip(load(base.part("text_encoder_2"), family))
        tensors |= {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in second.items()}
    tensors |= {"alphas_cumprod": torch.linspace(1, 0, 1000), "denoiser.sigmas": torch.linspace(0, 14, 1000)}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
