"""The parts of a model: in diffusers layout, in one file of a whole model, or in a file of their own."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from ..errors import WeightsError
from .repositories import SAFETENSORS_HINT, Files, Found, get_file, read_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """The sources of one component, before it is loaded.

    Attributes:
        name: the component's folder in diffusers layout (``unet``, ``text_encoder_2``).
        folder: a local folder that holds its ``config.json``.
        config: its configuration.
        weights: its weight files; more than one if they are sharded.
        variant: ``"fp16"`` if these are the half-precision files.
        single_file: whether the file may have the original Stable Diffusion's key names, and other parts besides.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    weights: tuple[Found, ...]
    variant: str | None = None
    single_file: bool = False


class Base(Protocol):
    """A whole model, which finds its parts by name.

    ``files`` holds its configuration and tokenizer.
    """

    @property
    def files(self) -> Files: ...

    @property
    def location(self) -> str:
        """The value of ``--base`` that finds the same model again."""
        ...

    @property
    def revision(self) -> str | None:
        """Its commit, if it is on the Hub."""
        ...

    def config(self, name: str) -> dict[str, Any]:
        """The configuration of the part of that name, which :meth:`part` has too."""
        ...

    def part(self, name: str, variant: str | None = None) -> Part:
        """The part of that name; ``variant="fp16"`` selects its half-precision weight files."""
        ...


@dataclasses.dataclass(frozen=True)
class DiffusersBase:
    """A repository or folder with a folder for each part."""

    files: Files

    @property
    def location(self) -> str:
        return self.files.name

    @property
    def revision(self) -> str | None:
        return self.files.revision

    def config(self, name: str) -> dict[str, Any]:
        return read_json(get_file(self.files, f"{name}/config.json"))

    def part(self, name: str, variant: str | None = None) -> Part:
        return self.part_in(f"{name}/", name, variant)

    def part_in(self, folder: str, name: str, variant: str | None = None) -> Part:
        """The part in ``folder``, which ends with a slash, or is empty for the top folder.

        A part that has no files of the variant comes with its full-size ones; its own ``variant`` tells.
        """
        config = get_file(self.files, f"{folder}config.json")
        stem = folder + ("model" if name.startswith("text_encoder") else "diffusion_pytorch_model")
        for candidate in (variant, None) if variant else (None, "fp16"):
            if weights := _find_weights(self.files, stem, candidate):
                return Part(
                    name=name,
                    folder=config.path.parent,
                    config=read_json(config),
                    weights=weights,
                    variant=candidate,
                )
        raise WeightsError(f"{self.files.name} has no {stem}.safetensors: {SAFETENSORS_HINT}")


@dataclasses.dataclass(frozen=True)
class SingleFileBase:
    """One file with the weights of every part, in the original Stable Diffusion's key names.

    Attributes:
        file: the weights.
        files: a repository of the same family, for configurations and tokenizers.
        unet: settings of its UNet in the place of those of that repository's.
    """

    file: Found
    files: Files
    unet: Mapping[str, Any]
    revision = None

    @property
    def location(self) -> str:
        return str(self.file.path.resolve())

    def config(self, name: str) -> dict[str, Any]:
        config = read_json(get_file(self.files, f"{name}/config.json"))
        return {**config, **self.unet} if name == "unet" else config

    def part(self, name: str, variant: str | None = None) -> Part:
        folder = get_file(self.files, f"{name}/config.json").path.parent
        return Part(name=name, folder=folder, config=self.config(name), weights=(self.file,), single_file=True)


class ComponentSource(Protocol):
    """A component that does not come from the base: a VAE, a ControlNet."""

    @property
    def location(self) -> str: ...

    @property
    def revision(self) -> str | None: ...

    @property
    def config(self) -> dict[str, Any]: ...

    def part(self, name: str, variant: str | None = None) -> Part:
        """The component's sources; ``name`` is what the bundle calls the part."""
        ...


@dataclasses.dataclass(frozen=True)
class ComponentFolder:
    """A repository or folder of one component, or a whole model that has it in a folder of the name ``inside``."""

    files: Files
    inside: str

    @property
    def location(self) -> str:
        return self.files.name

    @property
    def revision(self) -> str | None:
        return self.files.revision

    @functools.cached_property
    def folder(self) -> str:
        """Empty or ``vae/``."""
        is_inside = not self.files.find("config.json") and self.files.find(f"{self.inside}/config.json")
        return f"{self.inside}/" if is_inside else ""

    @property
    def config(self) -> dict[str, Any]:
        return self._config

    @functools.cached_property
    def _config(self) -> dict[str, Any]:
        return read_json(get_file(self.files, f"{self.folder}config.json"))

    def part(self, name: str, variant: str | None = None) -> Part:
        return DiffusersBase(self.files).part_in(self.folder, name, variant)


@dataclasses.dataclass(frozen=True)
class ComponentFile:
    """One component in a file of its own, in diffusers' or the original key names.

    Attributes:
        file: the weights.
        config: its configuration.
        folder: the folder of that configuration, for messages.
    """

    file: Found
    config: dict[str, Any]
    folder: Path
    revision = None

    @property
    def location(self) -> str:
        return str(self.file.path.resolve())

    def part(self, name: str, variant: str | None = None) -> Part:
        return Part(name=name, folder=self.folder, config=self.config, weights=(self.file,), single_file=True)


def config_beside(path: Path, class_name: str) -> dict[str, Any] | None:
    """The ``config.json`` in a weight file's own folder, if there is one and it is of that class."""
    beside = path.with_name("config.json")
    config = read_json(Found(beside, beside.name)) if beside.is_file() else {}
    return config if config.get("_class_name") == class_name else None


def weight_file(location: str, option: str) -> Found | None:
    """A local weight file; None if the location is no file.

    Raises:
        WeightsError: the file is not of the safetensors format.
    """
    path = Path(location)
    if not os.path.isfile(location):  # Path.is_file raises for a long name
        return None
    if path.suffix != ".safetensors":
        raise WeightsError(f"{option} {location}: {SAFETENSORS_HINT}")
    return Found(path, path.name)


def _find_weights(files: Files, stem: str, variant: str | None) -> tuple[Found, ...]:
    """The weight file of that stem, or the shards that its index names; empty if there is neither.

    Libraries have named a variant's index in two ways.
    """
    dotted = f".{variant}" if variant else ""
    if whole := files.find(f"{stem}{dotted}.safetensors"):
        return (whole,)
    indexes = dict.fromkeys((f"{stem}.safetensors.index{dotted}.json", f"{stem}{dotted}.safetensors.index.json"))
    index = next((found for name in indexes if (found := files.find(name))), None)
    if index is None:
        return ()
    weight_map = read_json(index).get("weight_map")
    shards = set(weight_map.values()) if isinstance(weight_map, dict) else {None}
    names = sorted(shard for shard in shards if isinstance(shard, str) and PurePosixPath(shard).name == shard)
    if len(names) != len(shards):
        raise WeightsError(f"{index.path} is not an index of weight files: download it again")
    folder = stem.rpartition("/")[0]
    return tuple(get_file(files, f"{folder}/{name}" if folder else name) for name in names)
