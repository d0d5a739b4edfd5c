"""Loads components in the bundle's precision, one at a time, with one copy of their weights in memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import WeightsError, one_line
from ..families import Family, find_family, lora_title
from ..weights.lora import Lora
from ..weights.lora_keys import describe_keys, match_kohya
from ..weights.safetensors_file import SafetensorsFile
from .layout import Found, Part


def load_unet(part: Part, dtype: torch.dtype, lora: Lora | None = None, lora_scale: float = 1.0) -> nn.Module:
    """A UNet, with a LoRA fused into it.

    The weights are read one at a time, fused in float32 and rounded once to ``dtype``, so that memory holds one copy of
    the UNet in ``dtype`` and little besides.

    Args:
        part: the UNet's configuration and weight files.
        dtype: type of the weights.
        lora: as :func:`check_unet_sources` opened it.
        lora_scale: factor on top of the LoRA's own alpha/rank.

    Returns:
        A ``diffusers.UNet2DConditionModel`` in evaluation mode.

    Raises:
        WeightsError: keys are left over or missing in the weights, or a layer of the LoRA does not fit.
    """
    unet = _empty_unet(part)
    _fill(unet, _unet_tensors(part, unet), lora, lora_scale, dtype, part)
    return unet.eval().requires_grad_(False)


def check_unet_sources(part: Part, lora: Found | None, family: str) -> Lora | None:
    """Compare the files' headers with the UNet's configuration, before any time is spent.

    Returns:
        The LoRA, open, its keys matched with the UNet's layers; None if there is none to fuse.

    Raises:
        WeightsError: UNet, weights and LoRA do not fit each other. The key names of single files are only known after
            conversion: :func:`load_unet` checks those.
    """
    unet, channels = _empty_unet(part), find_family(family).latent_channels
    if (found := unet.config.in_channels) != channels:
        raise WeightsError(f"{part.folder}: the UNet takes {found} channels, expected {channels} (no inpainting)")
    opened = open_lora(lora.path, layer_names(unet), find_family(family)) if lora else None
    if opened is not None:
        for module in opened.keys:
            opened.check_shapes(module, tuple(unet.get_submodule(module).weight.shape))
    if not part.single_file:
        files = [SafetensorsFile(found.path) for found in part.weights]
        _check_keys(part, {name for file in files for name in file.names}, unet)
        for file in files:
            for name in file.names:
                _check_shape(file.path, name, file.shape(name), tuple(unet.get_parameter(name).shape))
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


def _empty_unet(part: Part) -> Any:
    """The UNet of a configuration, without weights."""
    from diffusers import UNet2DConditionModel

    try:
        with torch.device("meta"):
            unet: Any = UNet2DConditionModel.from_config(part.config)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise WeightsError(f"{part.folder / 'config.json'} is not a UNet's configuration: {one_line(error)}") from error
    config = unet.config
    unsupported = {
        "time_cond_proj_dim": config.time_cond_proj_dim,
        "class_embed_type": config.class_embed_type,
        "encoder_hid_dim_type": config.encoder_hid_dim_type,
    }
    if used := sorted(name for name, value in unsupported.items() if value is not None):
        raise WeightsError(f"{part.folder}: a UNet with {', '.join(used)} is not a Stable Diffusion base: take another")
    return unet


def _unet_tensors(part: Part, unet: Any) -> Iterator[tuple[str, Tensor]]:
    if part.single_file:
        from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

        # The converted entries are still views of the mapped file: nothing is copied here.
        checkpoint = dict(SafetensorsFile(part.weights[0].path).tensors())
        with _explained(part, "UNet2DConditionModel"):
            converted = convert_ldm_unet_checkpoint(checkpoint, unet.config)
        yield from converted.items()
        return
    for found in part.weights:
        yield from SafetensorsFile(found.path).tensors()


def _fill(
    unet: nn.Module,
    tensors: Iterator[tuple[str, Tensor]],
    lora: Lora | None,
    lora_scale: float,
    dtype: torch.dtype,
    part: Part,
) -> None:
    """Replace every parameter on the meta device by its weight."""
    expected = dict(unet.named_parameters())
    seen = set()
    for name, tensor in tensors:
        seen.add(name)
        if name not in expected:
            continue
        _check_shape(part.weights[0].path, name, tuple(tensor.shape), tuple(expected[name].shape))
        weight = lora.fuse(name, tensor, lora_scale) if lora else tensor
        module, _, leaf = name.rpartition(".")
        setattr(unet.get_submodule(module), leaf, nn.Parameter(weight.to(dtype, copy=True), requires_grad=False))
    _check_keys(part, seen, unet)


def _check_shape(
    path: Path, name: str, shape: tuple[int, ...], expected: tuple[int, ...], network: str = "UNet"
) -> None:
    if shape != expected:
        raise WeightsError(
            f"{path}: {name} has the shape {list(shape)}, the {network}'s configuration says {list(expected)}: "
            "these weights are another model's"
        )


def _check_keys(part: Part, seen: set[str], unet: nn.Module) -> None:
    expected = {name for name, _ in unet.named_parameters()}
    if seen != expected:
        raise WeightsError(
            f"{part.weights[0].path} does not fit the UNet's configuration: {describe_keys(seen, expected)}"
        )


def load_text_encoder(part: Part, class_name: str, dtype: torch.dtype) -> nn.Module:
    """A text encoder of that class of transformers, in evaluation mode."""
    import transformers

    cls = getattr(transformers, class_name)
    if part.single_file:
        from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm

        checkpoint = dict(SafetensorsFile(part.weights[0].path).tensors())
        with quiet(), _explained(part, cls.__name__):
            model = create_diffusers_clip_model_from_ldm(
                cls,
                checkpoint,
                subfolder=part.name,
                config=str(part.folder.parent),
                torch_dtype=dtype,
                local_files_only=True,
            )
        if lost := sorted(name for name, weight in model.named_parameters() if weight.is_meta):
            raise WeightsError(f"{part.weights[0].path} lacks weights of a {cls.__name__}: {json.dumps(lost[:30])}")
    else:
        model = _from_pretrained(cls, part, dtype=dtype)
    # sdpa is what diffusers runs, and what torch exports as one Attention node
    model.set_attn_implementation("sdpa")
    return model.to(dtype).eval().requires_grad_(False)


def load_vae(part: Part, dtype: torch.dtype) -> nn.Module:
    """``diffusers.AutoencoderKL``, or ``AutoencoderTiny`` for TAESD, in evaluation mode."""
    from diffusers import AutoencoderKL, AutoencoderTiny

    if part.single_file:
        with quiet(), _explained(part, "AutoencoderKL"):
            vae: Any = AutoencoderKL.from_single_file(
                str(part.weights[0].path), config=str(part.folder), torch_dtype=dtype, local_files_only=True
            )
    else:
        vae = _from_pretrained(AutoencoderTiny if is_tiny(part) else AutoencoderKL, part, torch_dtype=dtype)
    if getattr(vae.config, "latents_mean", None) is not None:
        raise WeightsError(f"{part.folder}: a VAE with latents_mean is not Stable Diffusion's: take another --vae")
    return vae.eval().requires_grad_(False)


def load_controlnet(part: Part, dtype: torch.dtype) -> nn.Module:
    """``diffusers.ControlNetModel``, in evaluation mode."""
    from diffusers import ControlNetModel

    return _from_pretrained(ControlNetModel, part, torch_dtype=dtype).eval().requires_grad_(False)


def check_controlnet_sources(part: Part) -> None:
    """Compare the files' headers with a ControlNet's configuration, before any time is spent.

    Raises:
        WeightsError: weights are missing, or have another shape than the configuration says.
    """
    from diffusers import ControlNetModel

    with _explained(part, "ControlNetModel"), torch.device("meta"):
        model: Any = ControlNetModel.from_config(part.config)
    files = [SafetensorsFile(found.path) for found in part.weights]
    where = {name: file for file in files for name in file.names}
    expected = dict(model.named_parameters())
    if missing := sorted(expected.keys() - where.keys()):
        raise WeightsError(f"{part.weights[0].path} lacks weights of a ControlNetModel: {json.dumps(missing[:30])}")
    for name, weight in expected.items():
        _check_shape(where[name].path, name, where[name].shape(name), tuple(weight.shape), "ControlNet")


def is_tiny(part: Part) -> bool:
    """Whether the part is a TAESD decoder."""
    return part.config.get("_class_name") == "AutoencoderTiny"


@contextlib.contextmanager
def _explained(part: Part, kind: str) -> Iterator[None]:
    """Say a library's error in one line; its errors for weights that do not fit share no base class."""
    try:
        yield
    except Exception as error:
        where = part.weights[0].path if part.single_file else part.folder
        raise WeightsError(f"{where} cannot be loaded as a {kind}: {one_line(error)}") from error


def _from_pretrained(cls: Any, part: Part, **dtype: torch.dtype) -> Any:
    """Load from the part's folder; missing weights are an error, because they would be random."""
    with quiet(), _explained(part, cls.__name__):
        model, info = cls.from_pretrained(
            str(part.folder),
            variant=part.variant,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **dtype,
        )
    missing = sorted(info["missing_keys"]) + sorted(map(str, info.get("mismatched_keys", ())))
    if missing:
        raise WeightsError(f"{part.weights[0].path} lacks weights of a {cls.__name__}: {json.dumps(missing[:30])}")
    return model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and log messages of diffusers and transformers."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    levels = [(module, module.get_verbosity()) for module in (diffusers_logging, transformers_logging)]
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    for module, _ in levels:
        module.set_verbosity_error()
    try:
        yield
    finally:
        for module, level in levels:
            module.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def release_memory() -> None:
    """Give freed memory back to the system.

    glibc keeps freed blocks of less than 32 MB, which most weights are, for later: 5 GB after SDXL's UNet.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; musl has none
        if trim is not None:
            trim(0)
