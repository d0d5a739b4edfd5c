"""ControlNets: the known ones with their recommended settings, and the check that one fits a UNet.

Source of the architecture: Zhang et al., "Adding Conditional Control to Text-to-Image Diffusion Models",
https://arxiv.org/abs/2302.05543; of the settings: the model cards, Hyper-SD's for SDXL's canny.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any

from ..engines.component_names import check_controlnet_name, split_named
from ..engines.manifest import ControlNetSettings
from ..engines.progress import DownloadProgress
from ..errors import RequestError, WeightsError, one_line
from ..families import FAMILIES, SD15, SDXL, find_family
from ..weights.safetensors_file import SafetensorsFile
from .checkpoints import DEMO_CONTROLNET
from .layout import ComponentFile, ComponentFolder, ComponentSource, config_beside, weight_file
from .repositories import open_files

CLASS_NAME = "ControlNetModel"
EMBEDDING_CHANNELS = (16, 32, 96, 256)  # diffusers' default
# The settings that a ControlNet has in common with its UNet. Its input is latents alone, also for an inpainting UNet.
UNET_SETTINGS = (
    *("flip_sin_to_cos", "freq_shift", "down_block_types", "mid_block_type", "only_cross_attention"),
    *("block_out_channels", "layers_per_block", "downsample_padding", "mid_block_scale_factor", "act_fn"),
    *("norm_num_groups", "norm_eps", "cross_attention_dim", "attention_head_dim", "num_attention_heads"),
    *("use_linear_projection", "upcast_attention", "resnet_time_scale_shift", "transformer_layers_per_block"),
    *("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnownControlNet:
    """A ControlNet whose settings are known, by its Hub repository or demonstration folder."""

    location: str
    family: str
    settings: ControlNetSettings


def _known(location: str, family: str, preprocess: Any, conditioning_scale: float = 1.0) -> KnownControlNet:
    settings = ControlNetSettings(conditioning_scale=conditioning_scale, preprocess=preprocess)
    return KnownControlNet(location=location, family=family, settings=settings)


KNOWN_CONTROLNETS: tuple[KnownControlNet, ...] = (
    _known("lllyasviel/control_v11p_sd15_canny", SD15.name, "canny"),
    _known("lllyasviel/sd-controlnet-canny", SD15.name, "canny"),
    _known("lllyasviel/sd-controlnet-scribble", SD15.name, "scribble"),
    _known("lllyasviel/control_v11p_sd15_scribble", SD15.name, "scribble"),
    _known("diffusers/controlnet-canny-sdxl-1.0", SDXL.name, "canny", 0.5),
    _known("diffusers/controlnet-canny-sdxl-1.0-mid", SDXL.name, "canny", 0.5),
    _known("diffusers/controlnet-canny-sdxl-1.0-small", SDXL.name, "canny", 0.5),
    _known(DEMO_CONTROLNET, SD15.name, "canny"),
)


def settings_of(location: str) -> ControlNetSettings:
    """The recommended settings of the ControlNet at that location; diffusers' defaults if it is not known."""
    return next((known.settings for known in KNOWN_CONTROLNETS if known.location == location), ControlNetSettings())


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlNetSource:
    """A ControlNet as the user names it.

    Attributes:
        location: a Hub repository, a folder, a ``.safetensors`` file, or a demonstration folder's name.
        name: its name in the bundle; by default the last part of ``location``.
        revision: branch, tag or commit on the Hub.
    """

    location: str
    name: str = ""
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> ControlNetSource:
        """``WHERE`` or ``NAME=WHERE``.

        Raises:
            RequestError: NAME cannot be a ControlNet's name.
        """
        name, location = (None, text) if os.path.exists(text) else split_named(text)
        return cls(location=location, name="" if name is None else _checked(name, text))


def named(sources: Iterable[ControlNetSource]) -> dict[str, ControlNetSource]:
    """The ControlNets by their names in the bundle, in the order given.

    Raises:
        RequestError: two have the same name, or one has no usable name.
    """
    by_name: dict[str, ControlNetSource] = {}
    for source in sources:
        name = _checked(source.name or PurePath(source.location).name.removesuffix(".safetensors"), source.location)
        if name.casefold() in map(str.casefold, by_name):  # one folder to some systems
            raise RequestError(
                f"--controlnet {source.location}: two ControlNets are named {name!r}: rename one with NAME=WHERE"
            )
        by_name[name] = source
    return by_name


def open_controlnet(
    source: ControlNetSource, unet: dict[str, Any], progress: DownloadProgress | None
) -> ComponentSource:
    """Open a ControlNet.

    Args:
        source: as the user named it.
        unet: configuration of the base's UNet, from which a ControlNet in a file of its own takes its own.
        progress: told about downloads.

    Raises:
        WeightsError: there is none at that place.
    """
    if (file := weight_file(source.location, "--controlnet")) is None:
        return ComponentFolder(open_files(source.location, source.revision, progress, "--controlnet"), "controlnet")
    config = config_beside(file.path, CLASS_NAME) or _config_like(unet, SafetensorsFile(file.path))
    return ComponentFile(file, config, file.path.parent)


def _config_like(unet: dict[str, Any], file: SafetensorsFile) -> dict[str, Any]:
    """The configuration of a ControlNet that was made for this UNet, as diffusers' ``from_unet`` makes it.

    The layers that embed the control image are in the file's header, in either naming.
    """
    beginnings = ("controlnet_cond_embedding.", "control_model.input_hint_block.", "input_hint_block.")
    hint = next((b for b in beginnings if any(name.startswith(b) for name in file.names)), None)
    if hint is None:
        raise WeightsError(f"--controlnet {file.path} holds no ControlNet in diffusers' or the original key names")
    layers = sorted((name for name in file.names if name.startswith(hint) and name.endswith(".weight")), key=_place)
    channels = [file.shape(name)[0] for name in layers][:-1]  # the last one leads to the UNet's
    shared = {key: value for key, value in unet.items() if key in UNET_SETTINGS}
    return {**shared, "_class_name": CLASS_NAME, "conditioning_embedding_out_channels": channels[::2]}


def _place(name: str) -> tuple[bool, bool, list[int]]:
    """The order of the embedding's layers: conv_in, blocks.0 and so on, conv_out, or by number."""
    return "conv_out" in name, "conv_in" not in name, [int(number) for number in re.findall(r"\d+", name)]


def _checked(name: str, text: str) -> str:
    try:
        check_controlnet_name(name)
    except ValueError as error:
        raise RequestError(f"--controlnet {' '.join(text.split())}: {error}: give it one, NAME=WHERE") from error
    return name


def check_fits(
    location: str, config: dict[str, Any], unet: dict[str, Any], family: str, base: str, latent_scale: int
) -> None:
    """Compare the configurations: a ControlNet's residuals must have the shapes that the UNet takes.

    Args:
        location: the ControlNet's, for messages.
        config: its configuration.
        unet: the UNet's.
        family: the checkpoint's.
        base: the checkpoint's base, for messages.
        latent_scale: pixels per latent.

    Raises:
        WeightsError: it is not a ControlNet, is for another family or UNet, or is of a kind that is not supported.
    """
    kind = config.get("_class_name", "no class")
    if kind != CLASS_NAME:
        raise WeightsError(f"--controlnet {location} holds {kind}, expected a {CLASS_NAME}")
    wanted = find_family(family)
    if (embedding := config.get("addition_embed_type")) != wanted.addition_embed_type:
        found = next((f.title for f in FAMILIES.values() if f.addition_embed_type == embedding), embedding)
        offer = next(known.location for known in KNOWN_CONTROLNETS if known.family == family)
        raise WeightsError(
            f"--controlnet {location} is for {found}, the checkpoint is {wanted.title}: "
            f"take one of its family, such as {offer}"
        )
    for key in ("cross_attention_dim", "projection_class_embeddings_input_dim"):
        if config.get(key) != unet.get(key):
            raise WeightsError(
                f"--controlnet {location} has {key} {config.get(key)}, the UNet of {base} has {unet.get(key)}: "
                "take one that was made for this base"
            )
    try:
        ours, theirs, embedding = residual_shapes(config), residual_shapes(unet), _embedding_channels(config)
    except (TypeError, ValueError) as error:
        raise WeightsError(
            f"--controlnet {location}: its config.json is not a ControlNet's ({one_line(error)}): download it again"
        ) from error
    if ours != theirs:
        raise WeightsError(
            f"--controlnet {location} makes residuals of {_words(ours)}, the UNet of {base} takes {_words(theirs)}: "
            "take one that was made for this base"
        )
    unusual = _unusual(config, wanted.latent_channels, 2 ** (len(embedding) - 1) != latent_scale)
    if used := [f"{key} {config.get(key)}" for key, is_used in unusual.items() if is_used]:
        raise WeightsError(f"--controlnet {location} with {', '.join(used)} is not supported: take another")


def _unusual(config: dict[str, Any], latent_channels: int, is_other_scale: bool) -> dict[str, bool]:
    """The settings that not every ControlNet has and that are not supported, each with whether this one has it."""
    order = config.get("controlnet_conditioning_channel_order", "rgb")
    return {
        "global_pool_conditions": bool(config.get("global_pool_conditions")),
        "class_embed_type": config.get("class_embed_type") is not None,
        "num_class_embeds": config.get("num_class_embeds") is not None,
        "encoder_hid_dim_type": config.get("encoder_hid_dim_type") is not None,
        "conditioning_channels": config.get("conditioning_channels", 3) != 3,
        "in_channels": config.get("in_channels", latent_channels) != latent_channels,
        "conditioning_embedding_out_channels": is_other_scale,
        "controlnet_conditioning_channel_order": order not in ("rgb", "bgr"),
    }


def _embedding_channels(config: dict[str, Any]) -> tuple[int, ...]:
    """Channels of the layers that embed the control image: a convolution of stride 2 between each two."""
    return tuple(config.get("conditioning_embedding_out_channels") or EMBEDDING_CHANNELS)


def residual_shapes(config: dict[str, Any]) -> list[tuple[int, int]]:
    """Channels and number of halvings of every residual on a UNet's way down, and then of the middle one.

    There is one after the first convolution, after every layer of every block, and after every downsampler.
    """
    channels = tuple(config.get("block_out_channels") or (320, 640, 1280, 1280))
    layers = config.get("layers_per_block", 2)
    per_block = [layers] * len(channels) if isinstance(layers, int) else list(layers)
    shapes = [(channels[0], 0)]
    for level, (width, count) in enumerate(zip(channels, per_block, strict=True)):
        shapes += [(width, level)] * count
        if level < len(channels) - 1:
            shapes.append((width, level + 1))
    return [*shapes, (channels[-1], len(channels) - 1)]


def _words(shapes: list[tuple[int, int]]) -> str:
    return ", ".join(f"{channels} channels at 1/{2**level}" for channels, level in shapes)
