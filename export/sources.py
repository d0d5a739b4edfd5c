"""Finds every file that an export reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..engines.component_names import controlnet
from ..engines.manifest import ControlNetOrigin, added_lora
from ..engines.progress import DownloadProgress
from ..families import find_family
from ..weights.safetensors_file import SafetensorsFile
from .base_sources import check_family, check_scheduler, check_unet_config, open_base, prediction_of
from .checkpoints import Checkpoint
from .controlnet_sources import ControlNetSource, check_fits, named, open_controlnet
from .layout import Base, ComponentSource, Part
from .lora_sources import AddedLora, LoraSource, find_added, local_file, with_settings
from .repositories import Found, get_file, open_known, read_json, tokenizer_folder
from .vae_sources import check_vae, open_vae, vae_note


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """The user's choice of sources; None takes the checkpoint's own.

    Attributes:
        base: a Hub repository, a folder in diffusers layout, a demonstration folder's name, or a single
            ``.safetensors`` file.
        revision: branch, tag or commit of ``base``.
        variant: ``"fp16"`` for the base's half-precision weight files.
        checkpoint_file: a local file in place of the published Hyper-SD file, LoRA or whole UNet.
        checkpoint_revision: branch, tag or commit of the published file on the Hub.
        vae: a Hub repository, a folder or a file, or ``"tiny"`` for TAESD.
        vae_revision: branch, tag or commit of ``vae``.
        controlnets: ControlNets for the bundle.
        added_loras: LoRAs to fuse after the checkpoint's own, in this order.
    """

    base: str | None = None
    revision: str | None = None
    variant: str | None = None
    checkpoint_file: str | None = None
    checkpoint_revision: str | None = None
    vae: str | None = None
    vae_revision: str | None = None
    controlnets: tuple[ControlNetSource, ...] = ()
    added_loras: tuple[LoraSource, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sources:
    """Every file that an export reads, on this machine.

    Attributes:
        base: the base model's location, as ``--base`` takes it.
        base_revision: its commit, if it is on the Hub.
        tokenizers: folders by name (``tokenizer``, ``tokenizer_2``).
        parts: the components' sources by name (``text_encoder``, ``text_encoder_2``, ``unet``, ``vae``,
            ``controlnet/NAME``).
        vae: the VAE's location, if it is not the base's.
        lora: the LoRA to fuse, if the checkpoint is one.
        added_loras: LoRAs to fuse after it, by the names of their records (``added_lora/1``), in order.
        controlnets: the ControlNets' locations, by name.
        notes: remarks for the user about sources that were taken with a doubt.
    """

    base: str
    base_revision: str | None
    model_index: dict[str, Any]
    scheduler_config: dict[str, Any]
    tokenizers: dict[str, Path]
    parts: dict[str, Part]
    vae: str | None
    vae_revision: str | None
    lora: Found | None
    added_loras: dict[str, AddedLora]
    controlnets: dict[str, ControlNetOrigin]
    notes: tuple[str, ...] = ()

    @property
    def weights(self) -> dict[str, tuple[Found, ...]]:
        """Every weight file, by the part that it is for."""
        files = {name: part.weights for name, part in self.parts.items()}
        files |= {"lora": with_settings(self.lora)} if self.lora else {}
        return files | {name: lora.files for name, lora in self.added_loras.items()}


def find_sources(
    checkpoint: Checkpoint, options: SourceOptions, precision: str, progress: DownloadProgress | None = None
) -> Sources:
    """Find every file that the export needs, and download the missing ones.

    Args:
        checkpoint: which of the Hyper-SD files.
        options: replacements of the checkpoint's own base, file or VAE, and its ControlNets.
        precision: a name of :data:`hypersd.engines.precision.PRECISIONS`; published SDXL takes the repaired VAE unless
            it is ``"fp32"``.
        progress: told about downloads.

    Raises:
        WeightsError: a file is missing, damaged or of another family of models.
        DownloadError: a file could not be downloaded.
    """
    # Small files and checks come first, and gigabytes last.
    wanted = named(options.controlnets)
    if options.checkpoint_file is not None:
        local_file(options.checkpoint_file, "--lora")
    base = open_base(checkpoint, options.base, options.revision, options.variant, progress)
    vae = open_vae(checkpoint, options.vae, options.vae_revision, precision, base, progress)
    model_index, configs = _read_configs(base, checkpoint)
    changes = prediction_of(base)
    notes = _notes(checkpoint, base, configs["vae"], vae, precision, changes)
    names = [encoder.tokenizer for encoder in find_family(checkpoint.family).text_encoders]
    tokenizers = {name: tokenizer_folder(base.files, name) for name in names}
    controlnets = {name: open_controlnet(source, configs["unet"], progress) for name, source in wanted.items()}
    scale = pixels_per_latent(vae.config if vae else configs["vae"])
    for place in controlnets.values():
        check_fits(place.location, place.config, configs["unet"], checkpoint.family, base.location, scale)
    added = {added_lora(i): find_added(source, progress) for i, source in enumerate(options.added_loras, 1)}
    checkpoint_file = _find_checkpoint_file(checkpoint, options, progress)
    parts = _find_parts(checkpoint, base, vae, checkpoint_file, options.variant)
    notes += _variant_notes(parts, options.variant, vae)
    parts |= {controlnet(name): place.part(controlnet(name), options.variant) for name, place in controlnets.items()}
    _check_whole(parts.values())
    return Sources(
        base=base.location,
        base_revision=base.revision,
        model_index=model_index,
        scheduler_config=configs["scheduler"] | changes,
        tokenizers=tokenizers,
        parts=parts,
        vae=vae.location if vae else None,
        vae_revision=vae.revision if vae else None,
        lora=checkpoint_file if checkpoint.kind == "lora" else None,
        added_loras=added,
        controlnets={
            name: ControlNetOrigin(location=place.location, revision=place.revision)
            for name, place in controlnets.items()
        },
        notes=tuple(notes),
    )


def _read_configs(base: Base, checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The base's ``model_index.json``, and the configurations of UNet, VAE and scheduler, all checked."""
    model_index = read_json(get_file(base.files, "model_index.json"))
    check_family(model_index, checkpoint, base.location)
    configs = {name: base.config(name) for name in ("unet", "vae")}
    configs["scheduler"] = read_json(get_file(base.files, "scheduler/scheduler_config.json"))
    check_scheduler(configs["scheduler"], base.location)
    check_unet_config(configs["unet"], checkpoint, base.location)
    return model_index, configs


def _notes(
    checkpoint: Checkpoint,
    base: Base,
    own_vae: Mapping[str, Any],
    vae: ComponentSource | None,
    precision: str,
    changes: Mapping[str, Any],
) -> list[str]:
    """Notes about the VAE and a single file's marks, for the user; a VAE of another family is rejected."""
    family = find_family(checkpoint.family)
    notes = check_vae(family, base, own_vae, vae)
    if changes:
        notes.append(f"the marks of {base.location} say: {', '.join(f'{key} {changes[key]}' for key in changes)}")
    return notes + (vae_note(family, base, own_vae, precision) if vae is None else [])


def _variant_notes(parts: Mapping[str, Part], variant: str | None, vae: ComponentSource | None) -> list[str]:
    """Tell which parts of the base have no files of the variant."""
    full = [name for name, part in parts.items() if variant and part.variant != variant and not (vae and name == "vae")]
    return [f"the base's {' and '.join(full)} has no {variant} files: full-size ones are taken"] if full else []


def _check_whole(parts: Iterable[Part]) -> None:
    """Reject a damaged file now, not after minutes of work."""
    for part in parts:
        for file in part.weights:
            SafetensorsFile(file.path)


def _find_parts(
    checkpoint: Checkpoint, base: Base, vae: ComponentSource | None, checkpoint_file: Found, variant: str | None
) -> dict[str, Part]:
    """Every component's configuration and weight files."""
    parts = {name: base.part(name, variant) for name in find_family(checkpoint.family).encoder_names}
    if checkpoint.kind == "unet":
        config = get_file(base.files, "unet/config.json")
        parts["unet"] = Part(
            name="unet", folder=config.path.parent, config=read_json(config), weights=(checkpoint_file,)
        )
    else:
        parts["unet"] = base.part("unet", variant)
    parts["vae"] = vae.part("vae") if vae else base.part("vae", variant)
    return parts


def _find_checkpoint_file(checkpoint: Checkpoint, options: SourceOptions, progress: DownloadProgress | None) -> Found:
    """The Hyper-SD file: the published one, or the local one that ``--lora`` names."""
    if options.checkpoint_file is None:
        return open_known(checkpoint.series.files, options.checkpoint_revision, progress).get(checkpoint.filename)
    return local_file(options.checkpoint_file, "--lora")


def pixels_per_latent(vae: dict[str, Any]) -> int:
    """Pixels per latent, from a VAE's configuration: each of its levels but the first halves the image."""
    levels = vae.get("block_out_channels") or vae.get("decoder_block_out_channels")
    return 2 ** (len(levels) - 1) if levels else 8
