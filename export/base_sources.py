"""Opens a base, and rejects by name what looks like one and is not: other families, other parameterizations."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..engines.progress import DownloadProgress
from ..errors import WeightsError
from ..families import FAMILIES, Family, find_family
from ..weights.safetensors_file import SafetensorsFile
from .checkpoints import Checkpoint
from .layout import Base, DiffusersBase, SingleFileBase, weight_file
from .repositories import open_files, open_known

UNET = "model.diffusion_model."
# Beginnings of key names in single files of models that are not supported.
OTHER_MODELS = {
    "cond_stage_model.model.": "SD2.x",
    "conditioner.embedders.0.model.": "the SDXL refiner",
    "model.diffusion_model.joint_blocks.": "SD3",
    "model.diffusion_model.double_blocks.": "FLUX",
}
OTHER_INPUTS = {5: "depth", 7: "upscaling", 8: "pix2pix"}  # by the UNet's input channels
OTHER_TEXT_WIDTHS = {1024: "SD2.x", 1280: "the SDXL refiner"}  # by the UNet's cross_attention_dim
UNET_DEFAULTS = {"layers_per_block": 2, "transformer_layers_per_block": 1}  # diffusers'


def open_base(
    checkpoint: Checkpoint,
    location: str | None,
    revision: str | None,
    variant: str | None,
    progress: DownloadProgress | None,
) -> Base:
    """Open the user's base, or the checkpoint's own.

    Raises:
        WeightsError: there is none at that place, or it is none of the checkpoint's family.
    """
    location = checkpoint.base if location is None else location
    if (file := weight_file(location, "--base")) is None:
        return DiffusersBase(open_files(location, revision, progress, "--base"))
    if revision or variant:
        raise WeightsError(f"--base {location} is one file: leave --revision and --variant out")
    _check_single_file(file.path, checkpoint)
    channels = _first_layer(SafetensorsFile(file.path))[1:2]
    unet = {"in_channels": channels[0]} if channels else {}
    return SingleFileBase(file, open_known(checkpoint.base, None, progress), unet)


def check_family(model_index: Mapping[str, Any], checkpoint: Checkpoint, base: str) -> None:
    """Reject a base in diffusers layout whose pipeline is another family's."""
    class_name = str(model_index.get("_class_name"))
    titles = {name: f.title for f in FAMILIES.values() for name in (f.pipeline_class, f.inpaint_pipeline_class)}
    found = titles.get(class_name, class_name)
    if found != find_family(checkpoint.family).title:
        raise WeightsError(_other_family(f"{base} holds a {found} model", checkpoint))


def check_unet_config(config: Mapping[str, Any], checkpoint: Checkpoint, base: str) -> None:
    """Reject by name the UNets of other uses, from a base's configuration.

    Raises:
        WeightsError: the UNet takes other inputs, or is a smaller one that was distilled from the family's.
    """
    family = find_family(checkpoint.family)
    _check_channels(config.get("in_channels", family.latent_channels), checkpoint, base)
    if other := OTHER_TEXT_WIDTHS.get(config.get("cross_attention_dim", 0)):
        raise WeightsError(_other_family(f"{base} holds {other}", checkpoint))
    found = UNET_DEFAULTS | {key: config[key] for key in family.unet_layout if key in config}
    widths = config.get("block_out_channels")
    is_full_width = isinstance(widths, list) and _full_width(family) in widths[:1]
    is_shortened = config.get("mid_block_type", "") is None or config.get("reverse_transformer_layers_per_block")
    if is_shortened or (is_full_width and found != family.unet_layout):
        raise WeightsError(_distilled(base, checkpoint))


def check_scheduler(config: Mapping[str, Any], base: str) -> None:
    """Reject bases that were trained on other noise than a schedule of betas.

    Raises:
        WeightsError: the scheduler is one of EDM's, or of flow matching.
    """
    name = str(config.get("_class_name", ""))
    if "sigma_data" in config or name.startswith("EDM"):
        raise WeightsError(
            f"{base} was trained in the EDM parameterization ({name}), which Hyper-SD was not distilled from: "
            "take a --base that predicts noise or v"
        )
    if name.startswith("FlowMatch") or str(config.get("prediction_type", "")).startswith("flow"):
        raise WeightsError(f"{base} was trained with flow matching ({name}): take a --base that predicts noise or v")


def prediction_of(base: Base) -> dict[str, Any]:
    """Changes to the family's scheduler configuration that a single file's marks ask for.

    ``v_pred`` and ``ztsnr`` are empty tensors that ComfyUI and sd-scripts read and write; the header's
    ``modelspec.prediction_type`` is of the specification at https://github.com/Stability-AI/ModelSpec; a YAML file of
    the same name beside it is the original Stable Diffusion's configuration, whose ``parameterization`` tells.
    """
    if not isinstance(base, SingleFileBase):
        return {}
    file = SafetensorsFile(base.file.path)
    changes: dict[str, Any] = {}
    is_v = "v_pred" in file.names or file.metadata.get("modelspec.prediction_type") == "v"
    if is_v or _has_yaml_of_v(base.file.path):
        changes["prediction_type"] = "v_prediction"
    if "ztsnr" in file.names:
        changes["rescale_betas_zero_snr"] = True
    return changes


def _has_yaml_of_v(path: Path) -> bool:
    """Whether the configuration beside a single file says v-prediction."""
    try:
        text = path.with_suffix(".yaml").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return re.search(r"""^\s*parameterization:\s*["']?v["']?\s*(#.*)?$""", text, re.MULTILINE) is not None


def _check_single_file(path: Path, checkpoint: Checkpoint) -> None:
    """Tell models apart by the names and shapes in a single file's header."""
    file, wanted = SafetensorsFile(path), find_family(checkpoint.family)
    if edm := [name for name in file.names if name.startswith("edm_")]:
        raise WeightsError(
            f"--base {path} was trained in the EDM parameterization ({edm[0]}), which Hyper-SD was not distilled from: "
            "take a --base that predicts noise or v"
        )
    found = next((f for f in FAMILIES.values() if _has(file.names, f.single_file_prefix)), None)
    if found is None:
        other = next((title for prefix, title in OTHER_MODELS.items() if _has(file.names, prefix)), None)
        if other:
            raise WeightsError(_other_family(f"--base {path} holds {other}", checkpoint))
        raise WeightsError(f"--base {path} holds no {wanted.title} model in the original Stable Diffusion's key names")
    if found != wanted:
        raise WeightsError(_other_family(f"{path} holds a {found.title} model", checkpoint))
    if shape := _first_layer(file):
        _check_channels(shape[1], checkpoint, str(path))
        if shape[0] == _full_width(wanted) and not all(_has(file.names, UNET + layer) for layer in wanted.unet_marks):
            raise WeightsError(_distilled(str(path), checkpoint))


def _first_layer(file: SafetensorsFile) -> tuple[int, ...]:
    """The shape of a UNet's first convolution in a single file; empty if there is none."""
    name = f"{UNET}input_blocks.0.0.weight"
    shape = file.shape(name) if name in file.names else ()
    return shape if len(shape) == 4 else ()


def _full_width(family: Family) -> int:
    """Channels of the published UNet's first block; tests' and toys' UNets are narrower, distilled ones are not."""
    return family.unet_layout["block_out_channels"][0]


def _has(names: Iterable[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)


def _check_channels(channels: Any, checkpoint: Checkpoint, base: str) -> None:
    """Check that a UNet's input is latents, or latents with a mask and a masked image."""
    family = find_family(checkpoint.family)
    if channels not in (family.latent_channels, family.inpainting_channels):
        use = OTHER_INPUTS.get(channels)
        raise WeightsError(
            f"{base}: the UNet takes {channels} channels{f', as for {use}' if use else ''}, expected "
            f"{family.latent_channels}, or {family.inpainting_channels} for inpainting: take another --base"
        )
    if channels == family.inpainting_channels and checkpoint.kind == "unet":
        raise WeightsError(
            f"{base} is for inpainting, and {checkpoint.name} is a whole UNet that would replace its own: "
            "take a checkpoint that is a LoRA, or a --base for text to image"
        )


def _distilled(base: str, checkpoint: Checkpoint) -> str:
    title = find_family(checkpoint.family).title
    return (
        f"{base} holds a UNet with fewer layers than {title}'s, such as SSD-1B or BK-SDM, which Hyper-SD's "
        f"files do not fit: take a --base of {title}, such as {checkpoint.base}"
    )


def _other_family(found: str, checkpoint: Checkpoint) -> str:
    wanted = find_family(checkpoint.family).title
    return f"{found}, {checkpoint.name} needs {wanted}: take a --base of {wanted}, such as {checkpoint.base}"
