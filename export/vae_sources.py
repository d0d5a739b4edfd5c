"""The VAE of a bundle: the base's own or one in its place, and whether it was made for the UNet's latents."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from ..engines.precision import PRECISIONS
from ..engines.progress import DownloadProgress
from ..errors import NetworkError, WeightsError
from ..families import FAMILIES, Family
from .checkpoints import CHECKPOINTS, SDXL, Checkpoint
from .layout import (
    Base,
    ComponentFile,
    ComponentFolder,
    ComponentSource,
    SingleFileBase,
    config_beside,
    weight_file,
)
from .repositories import Files, Found, get_file, open_files, open_known, read_json

KL, TINY = "AutoencoderKL", "AutoencoderTiny"
DEFAULT_FACTOR = {KL: 0.18215, TINY: 1.0}  # diffusers', for configurations that have none
# TAESD's configurations are the same for every family: only their place tells.
TINY_PLACES = {c.series.tiny_vae: c.family for c in CHECKPOINTS}


def scaling_factor(config: Mapping[str, Any]) -> float:
    """The factor of the latents, by which they are divided before they are decoded."""
    return float(config.get("scaling_factor", DEFAULT_FACTOR[config.get("_class_name") or KL]))


def open_vae(
    checkpoint: Checkpoint,
    location: str | None,
    revision: str | None,
    precision: str,
    base: Base,
    progress: DownloadProgress | None,
) -> ComponentSource | None:
    """The VAE that replaces the base's; None if that stays.

    Args:
        checkpoint: which of the Hyper-SD files.
        location: the user's choice; ``"tiny"`` is the family's TAESD, None the VAE that is best.
        revision: branch, tag or commit of it.
        precision: of the bundle; in fp16, the published SDXL's own VAE is replaced by the repaired one.
        base: the base.
        progress: told about downloads.

    Raises:
        WeightsError: there is no VAE at that place.
        NetworkError: the Hub could not be reached.
    """
    if location == "tiny":
        location = checkpoint.series.tiny_vae
    elif location is None and PRECISIONS[precision].compute == "float16" and base.location == checkpoint.base:
        location = checkpoint.series.fp16_vae
        if location is not None:
            return ComponentFolder(RepairedVae(open_known(location, revision, progress)), "vae")
    if location is None:
        return None
    if file := weight_file(location, "--vae"):
        own = get_file(base.files, "vae/config.json")
        config = config_beside(file.path, KL)
        folder = own.path.parent if config is None else file.path.parent
        return ComponentFile(file, read_json(own) if config is None else config, folder)
    return ComponentFolder(open_files(location, revision, progress, "--vae"), "vae")


@dataclasses.dataclass
class RepairedVae:
    """Files of the VAE that replaces the published SDXL's, which overflows in float16: absent, they name ways out."""

    repo: Files

    @property
    def name(self) -> str:
        return self.repo.name

    @property
    def revision(self) -> str | None:
        return self.repo.revision

    def find(self, filename: str) -> Found | None:
        try:
            return self.repo.find(filename)
        except NetworkError as error:
            raise NetworkError(
                f"{error}; it replaces SDXL's own VAE in fp16: --vae {SDXL.base} keeps that, in float32, and "
                "--vae tiny takes TAESD"
            ) from error


def check_vae(family: Family, base: Base, own: Mapping[str, Any], vae: ComponentSource | None) -> list[str]:
    """Compare a VAE with the base's own, whose latents the UNet makes.

    Args:
        family: of the base.
        base: the base.
        own: configuration of the base's own VAE.
        vae: the one in its place, if any.

    Returns:
        Notes for the user about doubts that the configurations leave.

    Raises:
        WeightsError: the UNet's latents are not those of the family, or the VAE is another family's.
    """
    _check_latents(family, own, f"the VAE of {base.location}", "--base")
    if vae is None:
        _check_class(own, f"the VAE of {base.location}")
        return []
    _check_latents(family, vae.config, f"--vae {vae.location}", "--vae")
    _check_class(vae.config, f"--vae {vae.location}")
    if vae.config.get("_class_name") == TINY:
        return _check_tiny(family, vae)
    if isinstance(vae, ComponentFile) and vae.folder != vae.file.path.parent:
        return [
            f"{vae.location} has no configuration, so it is taken as a VAE of {family.title} (scaling factor "
            f"{scaling_factor(own):g}); {_others(family)}"
        ]
    found, expected = scaling_factor(vae.config), scaling_factor(own)
    if found == expected:
        return []
    if other := next((f for f in FAMILIES.values() if f != family and f.scaling_factor == found), None):
        raise WeightsError(
            f"--vae {vae.location} is {other.title}'s (scaling factor {found:g}), the base is {family.title} "
            f"({expected:g}): take a VAE for {family.title}"
        )
    return [
        f"--vae {vae.location} has the scaling factor {found:g}, the base's own VAE {expected:g}: if images "
        "look wrong, it was made for another base"
    ]


def _others(family: Family) -> str:
    others = (f"{f.title}'s have {f.scaling_factor:g}" for f in FAMILIES.values() if f != family)
    return f"{' and '.join(others)}, and would make wrong images"


def _check_tiny(family: Family, vae: ComponentSource) -> list[str]:
    """The places of the published TAESDs tell their families; others leave a doubt."""
    places = (vae.location, str(vae.config.get("_name_or_path", "")))
    found = next(filter(None, map(_tiny_family, places)), None)
    if found and found != family.name:
        raise WeightsError(
            f"--vae {vae.location} is a TAESD for {FAMILIES[found].title}, the base is {family.title}: "
            "take --vae tiny, which is the right one"
        )
    if found or not vae.location.count("/"):  # a demonstration folder, which serves both families
        return []
    return [
        f"--vae {vae.location} is a TAESD whose configuration names no family (scaling factor "
        f"{scaling_factor(vae.config):g} in all): it is taken as one for {family.title}"
    ]


def _tiny_family(place: str) -> str | None:
    """The family of a TAESD at a published place or in a copy of it; a folder named just taesd may be any."""
    parts = PurePath(place).parts[-2:]
    if (family := TINY_PLACES.get("/".join(parts))) is not None:
        return family
    names = {PurePath(known).name: family for known, family in TINY_PLACES.items()}
    return None if parts[-1:] == ("taesd",) else names.get("".join(parts[-1:]))


def _check_class(config: Mapping[str, Any], where: str) -> None:
    if (kind := config.get("_class_name") or KL) not in DEFAULT_FACTOR:
        raise WeightsError(f"{where} is a {kind}, expected an {KL} or {TINY}: take another --vae")


def _check_latents(family: Family, config: Mapping[str, Any], where: str, option: str) -> None:
    """Reject latents that are normalized otherwise, or have other channels."""
    for key in ("latents_mean", "latents_std"):
        if config.get(key) is not None:
            raise WeightsError(
                f"{where} has {key}, as EDM models have (Playground v2.5): its latents are not {family.title}'s; "
                f"take another {option}"
            )
    channels = config.get("latent_channels", family.latent_channels)
    if channels != family.latent_channels:
        raise WeightsError(
            f"{where} has {channels} latent channels, as SD3's and FLUX's have, expected {family.latent_channels}: "
            f"take another {option}"
        )


def vae_note(family: Family, base: Base, own: Mapping[str, Any], precision: str) -> list[str]:
    """Tell that the base's own VAE stays float32 in a float16 bundle, and what would change it."""
    if PRECISIONS[precision].compute != "float16" or not family.is_vae_upcast or not own.get("force_upcast", True):
        return []
    whose = "the file" if isinstance(base, SingleFileBase) else "the base"
    return [
        f"the VAE of {whose} decodes in float32, because {family.title}'s overflows in float16; "
        "--vae madebyollin/sdxl-vae-fp16-fix is quicker, if it is SDXL's own"
    ]
