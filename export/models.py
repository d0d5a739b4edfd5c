"""The components' modules with their weights, and the checks of everything that is known before they are loaded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..engines.component_names import controlnet
from ..errors import WeightsError
from ..families import Family, find_family, lora_title
from ..weights.lora import Lora
from ..weights.lora_keys import match_kohya
from ..weights.safetensors_file import SafetensorsFile
from .layout import Part
from .part_weights import Fuser, empty_module, open_part
from .repositories import Found
from .sources import Sources


def load_unet(part: Part, dtype: torch.dtype, fuser: Fuser | None = None) -> nn.Module:
    """``diffusers.UNet2DConditionModel``, with a LoRA fused into it.

    Args:
        part: configuration and weight files.
        dtype: type of the weights.
        fuser: the LoRA, as :func:`check_sources` opened it.

    Raises:
        WeightsError: configuration, weights and LoRA do not fit each other.
    """
    return open_part(part, _unet_class()).load(dtype, fuser)


def load_text_encoder(part: Part, class_name: str, dtype: torch.dtype, fuser: Fuser | None = None) -> nn.Module:
    """A text encoder of that class of transformers; arguments and errors as of :func:`load_unet`."""
    import transformers

    encoder: Any = open_part(part, getattr(transformers, class_name)).load(dtype, fuser)
    # sdpa is what diffusers runs, and what torch exports as one Attention node
    encoder.set_attn_implementation("sdpa")
    return encoder


def load_vae(part: Part, dtype: torch.dtype) -> nn.Module:
    """``diffusers.AutoencoderKL``, or ``AutoencoderTiny`` for TAESD; errors as of :func:`load_unet`."""
    return open_part(part, _vae_class(part)).load(dtype)


def load_controlnet(part: Part, dtype: torch.dtype) -> nn.Module:
    """``diffusers.ControlNetModel``; errors as of :func:`load_unet`."""
    return open_part(part, _controlnet_class()).load(dtype)


def check_sources(sources: Sources, family: str) -> Lora | None:
    """Compare the headers of all weight files with the configurations, before any time is spent.

    Returns:
        The LoRA, open, its keys matched with the UNet's layers; None if there is none to fuse.

    Raises:
        WeightsError: configurations, weights and LoRA do not fit each other.
    """
    import transformers

    lora = check_unet_sources(sources.parts["unet"], sources.lora, family)
    for encoder in find_family(family).text_encoders:
        open_part(sources.parts[encoder.component], getattr(transformers, encoder.class_name))
    open_part(sources.parts["vae"], _vae_class(sources.parts["vae"]))
    for name in sources.controlnets:
        open_part(sources.parts[controlnet(name)], _controlnet_class())
    return lora


def check_unet_sources(part: Part, lora: Found | None, family: str) -> Lora | None:
    """As :func:`check_sources`, for the UNet and its LoRA alone."""
    unet = _empty_unet(part)
    opened = open_lora(lora.path, layer_names(unet), find_family(family)) if lora else None
    if opened is not None:
        for module in opened.keys:
            opened.check_shapes(module, tuple(unet.get_submodule(module).weight.shape))
    open_part(part, _unet_class())
    return opened


def open_lora(path: Path, modules: Iterable[str], family: Family) -> Lora:
    """Open a Hyper-SD LoRA, a ``.safetensors`` file with kohya keys.

    Args:
        path: the file.
        modules: paths of the UNet's linear and convolution layers (:func:`layer_names`).
        family: of the base.

    Raises:
        WeightsError: the file is damaged or of another family, or keys are left over or missing, which are listed.
    """
    file = SafetensorsFile(path)
    found = lora_title(file.names) or family.title
    if found != family.title:
        raise WeightsError(
            f"{path} is a LoRA for {found}, the base is {family.title}: take one for {family.title}, or its own --base"
        )
    return Lora(file, match_kohya(path, file.names, modules, family.lora_prefix))


def layer_names(unet: nn.Module) -> list[str]:
    """Paths of the layers that a LoRA can change: linear layers and convolutions."""
    return [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def is_tiny(part: Part) -> bool:
    """Whether the part is a TAESD decoder."""
    return part.config.get("_class_name") == "AutoencoderTiny"


def _empty_unet(part: Part) -> Any:
    """The UNet of a configuration, without weights."""
    unet = empty_module(part, _unet_class())
    config = unet.config
    unsupported = {
        "time_cond_proj_dim": config.time_cond_proj_dim,
        "class_embed_type": config.class_embed_type,
        "encoder_hid_dim_type": config.encoder_hid_dim_type,
    }
    if used := sorted(name for name, value in unsupported.items() if value is not None):
        raise WeightsError(f"{part.folder}: a UNet with {', '.join(used)} is not a Stable Diffusion base: take another")
    return unet


def _unet_class() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel


def _controlnet_class() -> Any:
    from diffusers import ControlNetModel

    return ControlNetModel


def _vae_class(part: Part) -> Any:
    from diffusers import AutoencoderKL, AutoencoderTiny

    return AutoencoderTiny if is_tiny(part) else AutoencoderKL
