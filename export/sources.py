"""Finds every file that an export reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..engines.component_names import controlnet
from ..engines.manifest import ControlNetOrigin
from ..errors import WeightsError
from ..families import FAMILIES, find_family
from ..weights.safetensors_file import SafetensorsFile
from .checkpoints import Checkpoint
from .controlnet_sources import ControlNetSource, check_fits, named
from .export_progress import DownloadProgress
from .layout import (
    SAFETENSORS_HINT,
    Base,
    DiffusersBase,
    Found,
    Part,
    SingleFileBase,
    get_file,
    open_files,
    open_known,
    read_json,
    tokenizer_folder,
)


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
        vae: a Hub repository or folder, or ``"tiny"`` for TAESD.
        vae_revision: branch, tag or commit of ``vae``.
        controlnets: ControlNets for the bundle.
    """

    base: str | None = None
    revision: str | None = None
    variant: str | None = None
    checkpoint_file: str | None = None
    checkpoint_revision: str | None = None
    vae: str | None = None
    vae_revision: str | None = None
    controlnets: tuple[ControlNetSource, ...] = ()


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
        controlnets: the ControlNets' locations, by name.
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
    controlnets: dict[str, ControlNetOrigin]

    @property
    def weights(self) -> dict[str, tuple[Found, ...]]:
        """Every weight file, by the part that it is for."""
        files = {name: part.weights for name, part in self.parts.items()}
        return files | ({"lora": (self.lora,)} if self.lora else {})


def find_sources(
    checkpoint: Checkpoint, options: SourceOptions, precision: str, progress: DownloadProgress | None = None
) -> Sources:
    """Find every file that the export needs, and download the missing ones.

    Args:
        checkpoint: which of the Hyper-SD files.
        options: replacements of the checkpoint's own base, file or VAE, and its ControlNets.
        precision: ``"fp16"`` or ``"fp32"``; published SDXL in fp16 takes the repaired VAE.
        progress: told about downloads.

    Raises:
        WeightsError: a file is missing, damaged or of another family of models.
        DownloadError: a file could not be downloaded.
    """
    # Small files and checks come first, and gigabytes last.
    wanted = named(options.controlnets)
    if options.checkpoint_file is not None:
        _local_file(options.checkpoint_file)
    base = _open_base(checkpoint, options, progress)
    vae = _open_vae(checkpoint, options, precision, progress)
    model_index = read_json(get_file(base.files, "model_index.json"))
    _check_family(model_index, checkpoint, base.location)
    scheduler_config = read_json(get_file(base.files, "scheduler/scheduler_config.json"))
    encoders = find_family(checkpoint.family).text_encoders
    tokenizers = {encoder.tokenizer: tokenizer_folder(base.files, encoder.tokenizer) for encoder in encoders}
    controlnets = _open_controlnets(wanted, progress)
    _check_controlnets(controlnets, checkpoint, base, vae)
    checkpoint_file = _find_checkpoint_file(checkpoint, options, progress)
    parts = _find_parts(checkpoint, base, vae, checkpoint_file, options.variant)
    parts |= {
        controlnet(name): _controlnet_part(place, controlnet(name), options.variant)
        for name, place in controlnets.items()
    }
    _check_whole(parts.values())
    return Sources(
        base=base.location,
        base_revision=base.files.revision if isinstance(base, DiffusersBase) else None,
        model_index=model_index,
        scheduler_config=scheduler_config,
        tokenizers=tokenizers,
        parts=parts,
        vae=vae.location if vae else None,
        vae_revision=vae.files.revision if vae else None,
        lora=checkpoint_file if checkpoint.kind == "lora" else None,
        controlnets={
            name: ControlNetOrigin(location=place.location, revision=place.files.revision)
            for name, place in controlnets.items()
        },
    )


def _check_whole(parts: Iterable[Part]) -> None:
    """Reject a damaged file now, not after minutes of work."""
    for part in parts:
        for file in part.weights:
            SafetensorsFile(file.path)


def _find_parts(
    checkpoint: Checkpoint, base: Base, vae: DiffusersBase | None, checkpoint_file: Found, variant: str | None
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
    parts["vae"] = vae.part_in(_folder(vae, "vae"), "vae") if vae else base.part("vae", variant)
    return parts


def _open_base(checkpoint: Checkpoint, options: SourceOptions, progress: DownloadProgress | None) -> Base:
    location = checkpoint.base if options.base is None else options.base
    if not (path := Path(location)).is_file():
        return DiffusersBase(open_files(location, options.revision, progress, "--base"))
    if path.suffix != ".safetensors":
        raise WeightsError(f"--base {location}: {SAFETENSORS_HINT}")
    if options.revision or options.variant:
        raise WeightsError(f"--base {location} is one file: leave --revision and --variant out")
    _check_single_file(path, checkpoint)
    return SingleFileBase(Found(path, path.name), open_known(checkpoint.base, None, progress))


def _check_single_file(path: Path, checkpoint: Checkpoint) -> None:
    """Tell the families apart by where a single file has its text encoders."""
    names = SafetensorsFile(path).names
    found = next((f for f in FAMILIES.values() if any(name.startswith(f.single_file_prefix) for name in names)), None)
    wanted = find_family(checkpoint.family).title
    if found is None:
        raise WeightsError(f"--base {path} holds no {wanted} model in the original Stable Diffusion's key names")
    if found.name != checkpoint.family:
        raise WeightsError(
            f"{path} holds a {found.title} model, {checkpoint.name} needs {wanted}: "
            f"take a --base of {wanted}, such as {checkpoint.base}"
        )


def _find_checkpoint_file(checkpoint: Checkpoint, options: SourceOptions, progress: DownloadProgress | None) -> Found:
    """The Hyper-SD file: the published one, or the local one that ``--lora`` names."""
    if options.checkpoint_file is None:
        return open_known(checkpoint.series.files, options.checkpoint_revision, progress).get(checkpoint.filename)
    return _local_file(options.checkpoint_file)


def _local_file(location: str) -> Found:
    path = Path(location)
    if not path.is_file():
        raise WeightsError(
            f"--lora {location!r} is not a file: expected a .safetensors file in place of the checkpoint's own"
        )
    SafetensorsFile(path)  # rejects a damaged file
    return Found(path, path.name)


def _open_vae(
    checkpoint: Checkpoint, options: SourceOptions, precision: str, progress: DownloadProgress | None
) -> DiffusersBase | None:
    """The VAE that replaces the base's, if any."""
    location = options.vae
    if location == "tiny":
        location = checkpoint.series.tiny_vae
    if location is None and precision == "fp16":
        location = checkpoint.series.fp16_vae
    if location is None:
        return None
    return DiffusersBase(open_files(location, options.vae_revision, progress, "--vae"))


def _open_controlnets(
    sources: Mapping[str, ControlNetSource], progress: DownloadProgress | None
) -> dict[str, DiffusersBase]:
    return {
        name: DiffusersBase(open_files(source.location, source.revision, progress, "--controlnet"))
        for name, source in sources.items()
    }


def _check_controlnets(
    controlnets: dict[str, DiffusersBase], checkpoint: Checkpoint, base: Base, vae: DiffusersBase | None
) -> None:
    """Compare the ControlNets' configurations with the UNet's, before gigabytes of weights are fetched."""
    if not controlnets:
        return
    unet = read_json(get_file(base.files, "unet/config.json"))
    vae_config = f"{_folder(vae, 'vae')}config.json" if vae else "vae/config.json"
    scale = pixels_per_latent(read_json(get_file((vae or base).files, vae_config)))
    for place in controlnets.values():
        config = read_json(get_file(place.files, f"{_folder(place, 'controlnet')}config.json"))
        check_fits(place.location, config, unet, checkpoint.family, base.location, scale)


def _controlnet_part(place: DiffusersBase, component: str, variant: str | None) -> Part:
    """The ControlNet's files, of half precision if they are wanted and exist: not every ControlNet has them."""
    folder = _folder(place, "controlnet")
    has_variant = variant and place.files.find(f"{folder}diffusion_pytorch_model.{variant}.safetensors")
    return place.part_in(folder, component, variant if has_variant else None)


def pixels_per_latent(vae: dict[str, Any]) -> int:
    """Pixels per latent, from a VAE's configuration: each of its levels but the first halves the image."""
    levels = vae.get("block_out_channels") or vae.get("decoder_block_out_channels")
    return 2 ** (len(levels) - 1) if levels else 8


def _folder(place: DiffusersBase, name: str) -> str:
    """The part's folder: the top of a repository of one component, a folder of its name in a whole model."""
    is_inside = not place.files.find("config.json") and place.files.find(f"{name}/config.json")
    return f"{name}/" if is_inside else ""


def _check_family(model_index: dict[str, Any], checkpoint: Checkpoint, base: str) -> None:
    class_name, wanted = model_index.get("_class_name"), find_family(checkpoint.family)
    if class_name != wanted.pipeline_class:
        found = next((family.title for family in FAMILIES.values() if family.pipeline_class == class_name), class_name)
        raise WeightsError(
            f"{base} holds a {found} model, {checkpoint.name} needs {wanted.title}: "
            f"take a --base of {wanted.title}, such as {checkpoint.base}"
        )
