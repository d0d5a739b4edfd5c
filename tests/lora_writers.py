"""Random LoRAs, written in every layout that diffusers reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hypersd.engines.lora_slot import LoraSlot
from hypersd.weights.lora_names import encoder_path, original_path

Place = tuple[str, str]  # component and path
Random = dict[Place, tuple[Tensor, Tensor, float]]  # down, up and alpha
KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
OLD = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out", "0": ""}


def layer_shapes(pipe: Any) -> dict[str, dict[str, tuple[int, ...]]]:
    """Weights of linear layers and convolutions, by component and path."""
    return {
        name: {
            path: tuple(module.weight.shape)
            for path, module in getattr(pipe, name).named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
        }
        for name in KOHYA
        if getattr(pipe, name, None) is not None
    }


def random_lora(shapes: Mapping[str, Mapping[str, tuple[int, ...]]], alpha: float | None = None) -> Random:
    """A LoRA over every layer, with ranks that differ; without an alpha it is the rank, as where a file has none."""
    generator, made = torch.Generator().manual_seed(1), {}
    for component, paths in shapes.items():
        for i, (path, shape) in enumerate(paths.items()):
            rank = 2 + i % 3
            down = torch.randn(rank, *shape[1:], generator=generator) * 0.3
            up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator) * 0.3
            made[component, path] = down, up, rank if alpha is None else alpha
    return made


def full_path(place: Place) -> str:
    """The path of older transformers, which is the one in files."""
    component, path = place
    return path if component == "unet" or path == "text_projection" else f"text_model.{encoder_path(path)}"


def kohya(lora: Random, name: Callable[[Place], str] = full_path) -> dict[str, Tensor]:
    tensors = {}
    for place, (down, up, alpha) in lora.items():
        key = KOHYA[place[0]] + name(place).replace(".", "_")
        if not any(component == "text_encoder_2" for component, _ in lora):
            key = key.replace("lora_te1_", "lora_te_")
        tensors |= {
            f"{key}.lora_down.weight": down,
            f"{key}.lora_up.weight": up,
            f"{key}.alpha": torch.tensor(float(alpha)),
        }
    return tensors


def original_names(lora: Random) -> Callable[[Place], str]:
    paths = [path for component, path in lora if component == "unet"]
    per_block = len({path.split(".")[3] for path in paths if path.startswith("down_blocks.0.resnets")})
    attended = {path.split(".")[1] for path in paths if path.startswith("up_blocks") and ".attentions." in path}

    def name(place: Place) -> str:
        renamed = original_path(place[1], per_block, attended) if place[0] == "unet" else None
        return renamed or full_path(place)

    return name


def pairs(lora: Random, down: str, up: str, name: Callable[[Place], str] | None = None) -> dict[str, Tensor]:
    """Two tensors for each layer, with these ends of their names."""
    name = name or (lambda place: f"{place[0]}.{full_path(place)}")
    made = {}
    for place, (first, second, _) in lora.items():
        made |= {name(place) + down: first, name(place) + up: second}
    return made


def old_attention(lora: Random) -> dict[str, Tensor]:
    """The attention processors of 2023: ``attn1.processor.to_out_lora.down.weight``, of text encoders too."""

    def name(place: Place) -> str:
        path, _, leaf = full_path(place).removesuffix(".0").rpartition(".")
        return f"{place[0]}.{path}{'.processor' if place[0] == 'unet' else ''}.{OLD.get(leaf, leaf)}"

    return pairs(lora, "_lora.down.weight", "_lora.up.weight", name)


def mixed_ends(lora: Random) -> dict[str, Tensor]:
    """diffusers' names of 2023: ``lora.down`` in the UNet, ``lora_linear_layer.down`` in text encoders."""
    unet = {place: layer for place, layer in lora.items() if place[0] == "unet"}
    encoders = {place: layer for place, layer in lora.items() if place[0] != "unet"}
    made = pairs(unet, ".lora.down.weight", ".lora.up.weight")
    return made | pairs(encoders, ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")


def is_attention(place: Place) -> bool:
    return ".attn" in place[1] or "self_attn" in place[1]


def is_read_by_diffusers(place: Place) -> bool:
    """diffusers 0.42 reads kohya's ``add_embedding_linear_1`` as another module, and leaves it out."""
    return "add_embedding" not in place[1]


def in_diffusers_blocks(place: Place) -> bool:
    """diffusers 0.42 misses an original upsampler that follows no attention."""
    return ".upsamplers." not in place[1] or "up_blocks.0" not in place[1]


# Its writer, alpha of the layers (None: the rank), the layers that diffusers reads, and the components.
LAYOUTS: dict[str, tuple[Callable[[Random], dict[str, Tensor]], float | None, Callable[[Place], bool]]] = {
    "kohya": (kohya, 1.5, is_read_by_diffusers),
    "kohya original": (lambda lora: kohya(lora, original_names(lora)), 1.5, in_diffusers_blocks),
    "diffusers": (lambda lora: pairs(lora, ".lora_A.weight", ".lora_B.weight"), None, lambda place: True),
    "diffusers 2023": (mixed_ends, None, lambda place: True),
    "attention processors": (old_attention, None, is_attention),
    "kohya attention": (kohya, 1.5, is_attention),
    "kohya text encoders": (kohya, 1.5, lambda place: place[0] != "unet"),
    "kohya without alpha": (
        lambda lora: {key: t for key, t in kohya(lora).items() if not key.endswith("alpha")},
        None,
        is_read_by_diffusers,
    ),
}  # fmt: skip


def real_unet(family: str) -> Any:
    """The real architecture, without weights."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        if family == "sd15":
            return UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        return UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), use_linear_projection=True,
            cross_attention_dim=2048, addition_embed_type="text_time", addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )  # fmt: skip


def write_slot_lora(slot: LoraSlot, file: Path, seed: int = 0, is_whole: bool = True) -> Path:
    """A LoRA of rank 4 for a bundle with a slot; if not ``is_whole``, with a convolution that has no place in it."""
    shapes = {
        component: {path: layer.weight for path, layer in layers.items() if layer.has_place or not is_whole}
        for component, layers in slot.layers.items()
    }
    lora = {place: (down.roll(seed, 0), up.roll(seed, 0), a) for place, (down, up, a) in random_lora(shapes).items()}
    unfinished = file.with_suffix(".unfinished")
    save_file({key: tensor.contiguous() for key, tensor in kohya(lora).items()}, unfinished)
    return unfinished.replace(file)
