"""The components' modules with their weights, and the checks of everything that is known before they are loaded."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..engines.component_names import controlnet
from ..errors import WeightsError
from ..families import find_family
from ..weights.key_lists import describe_keys
from ..weights.lora_file import LoraFile, Shapes, check_family
from ..weights.lora_names import published_layers
from .layout import Part
from .part_weights import Fuser, PartWeights, open_part
from .sources import Sources

VaeHalf = Literal["encoder", "decoder"]
VAE_HALVES: dict[VaeHalf, tuple[str, ...]] = {  # and the modules of each
    "encoder": ("encoder", "quant_conv"),
    "decoder": ("post_quant_conv", "decoder"),
}


def load_unet(part: Part, dtype: torch.dtype, fuser: Fuser | None = None) -> nn.Module:
    """``diffusers.UNet2DConditionModel``, with LoRAs fused into it.

    Args:
        part: configuration and weight files.
        dtype: type of the weights.
        fuser: the LoRAs, a :class:`.lora_file.Fusion` of those that :func:`check_sources` opened.

    Raises:
        WeightsError: configuration, weights and LoRAs do not fit each other.
    """
    return open_part(part, _unet_class()).load(dtype, fuser)


def load_text_encoder(part: Part, class_name: str, dtype: torch.dtype, fuser: Fuser | None = None) -> nn.Module:
    """A text encoder of that class of transformers; arguments and errors as of :func:`load_unet`."""
    import transformers

    encoder: Any = open_part(part, getattr(transformers, class_name)).load(dtype, fuser)
    # sdpa is what diffusers runs, and what torch exports as one Attention node
    encoder.set_attn_implementation("sdpa")
    return encoder


def load_vae(part: Part, dtype: torch.dtype, half: VaeHalf | None = None) -> nn.Module:
    """``diffusers.AutoencoderKL``, or ``AutoencoderTiny`` for TAESD; errors as of :func:`load_unet`.

    With ``half`` it can only encode or decode, and the other half need not be in the file.
    """
    return _open_vae(part, half).load(dtype)


def _open_vae(part: Part, half: VaeHalf | None = None) -> PartWeights:
    unused = [module for other, modules in VAE_HALVES.items() if half not in (None, other) for module in modules]
    return open_part(part, _vae_class(part), unused)


def load_controlnet(part: Part, dtype: torch.dtype) -> nn.Module:
    """``diffusers.ControlNetModel``; errors as of :func:`load_unet`."""
    return open_part(part, _controlnet_class()).load(dtype)


@dataclasses.dataclass(frozen=True)
class CheckedSources:
    """Sources that fit each other.

    Attributes:
        loras: the LoRAs to fuse, open, in order, by the names of their records (:attr:`.sources.Sources.weights`).
        shapes: of all weights that a LoRA may change, by component and path.
    """

    loras: dict[str, LoraFile]
    shapes: Shapes


def check_sources(sources: Sources, family: str, lora_scale: float = 1.0, text_only: bool = False) -> CheckedSources:
    """Compare the headers of all weight files with the configurations, before any time is spent.

    Args:
        sources: where the weights are.
        family: of the base.
        lora_scale: factor of the checkpoint's LoRA.
        text_only: whether the VAE's encoder is not needed.

    Raises:
        WeightsError: configurations, weights and LoRAs do not fit each other.
    """
    import transformers

    modules = {"unet": check_unet_sources(sources.parts["unet"], family)}
    for encoder in find_family(family).text_encoders:
        cls = getattr(transformers, encoder.class_name)
        modules[encoder.component] = open_part(sources.parts[encoder.component], cls).module
    _check_vae(sources.parts["vae"], text_only)
    for name in sources.controlnets:
        open_part(sources.parts[controlnet(name)], _controlnet_class())
    shapes = {name: layer_shapes(module) for name, module in modules.items()}
    return CheckedSources(open_loras(sources, shapes, family, lora_scale), shapes)


def _check_vae(part: Part, text_only: bool) -> None:
    """Tell a file that lacks the encoder from one that does not fit at all."""
    decoder = _open_vae(part, "decoder")
    if text_only:
        return
    if not decoder.has_stored("encoder"):
        raise WeightsError(
            f"{part.weights[0].path} holds the VAE's decoder without its encoder, which images in need: take a whole "
            "--vae, or --text-only for a bundle of text to image"
        )
    _open_vae(part)


def check_unet_sources(part: Part, family: str) -> nn.Module:
    """As :func:`check_sources`, for the UNet alone; the result has no weights."""
    unsupported = ("time_cond_proj_dim", "class_embed_type", "encoder_hid_dim_type")
    if used := [name for name in sorted(unsupported) if part.config.get(name) is not None]:
        raise WeightsError(f"{part.folder}: a UNet with {', '.join(used)} is not a Stable Diffusion base: take another")
    return open_part(part, _unet_class()).module


def open_loras(sources: Sources, shapes: Shapes, family: str, lora_scale: float = 1.0) -> dict[str, LoraFile]:
    """As :func:`check_sources`, for the LoRAs alone; ``shapes`` are those of the base's layers."""
    opened = {}
    if sources.lora is not None:
        opened["lora"] = lora = open_lora(sources.lora.path, shapes, family, lora_scale)
        if sources.lora.repo:  # published files cover the same layers all
            covered = {c: set(published_layers(paths) if c == "unet" else ()) for c, paths in shapes.items()}
            for component, expected in covered.items():
                if (present := lora.layers.get(component, {}).keys()) != expected:
                    described = describe_keys(set(present), expected)
                    raise WeightsError(f"{sources.lora.path} does not fit the base's {component}: {described}")
    for name, added in sources.added_loras.items():
        opened[name] = open_lora(added.files[0].path, shapes, family, added.scale)
    return opened


def open_lora(path: Path, shapes: Shapes, family: str, scale: float = 1.0) -> LoraFile:
    """Open a LoRA for a base of that family; arguments and errors as of :meth:`.lora_file.LoraFile.open`."""
    check_family(path, family)
    return LoraFile.open(path, shapes, scale)


def layer_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights that a LoRA can change: those of linear layers and convolutions, by path."""
    layers = ((path, layer) for path, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d))
    return {path: tuple(layer.weight.shape) for path, layer in layers}


def is_tiny(part: Part) -> bool:
    """Whether the part is a TAESD."""
    return part.config.get("_class_name") == "AutoencoderTiny"


def _unet_class() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel


def _controlnet_class() -> Any:
    from diffusers import ControlNetModel

    return ControlNetModel


def _vae_class(part: Part) -> Any:
    from diffusers import AutoencoderKL, AutoencoderTiny

    return AutoencoderTiny if is_tiny(part) else AutoencoderKL
