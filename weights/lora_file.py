"""LoRA files of any layout, matched with the layers of a base, and the sum of several."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..errors import WeightsError
from ..families import find_family, lora_title
from .key_lists import listed
from .lora_layer import LoraLayer, check_finite
from .lora_names import ModuleNames, encoder_path, is_original, split_key
from .peft_settings import read_settings
from .safetensors_file import SafetensorsFile

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]


@dataclasses.dataclass(frozen=True)
class LoraFile:
    """An open LoRA file whose layers have been matched with a base's.

    Attributes:
        file: open; layers are read from it one at a time.
        layers: by component, and by the path of the module that they change. A text encoder's paths are those of
            transformers 5, without ``text_model.`` before them.
        strength: factor on top of the layers' own scales.
    """

    file: SafetensorsFile
    layers: dict[str, dict[str, LoraLayer]]
    strength: float = 1.0

    @classmethod
    def open(cls, path: Path, shapes: Shapes, strength: float = 1.0) -> LoraFile:
        """Open a file, compare its header with a base, and read every tensor once, to find a NaN or an infinity.

        Args:
            path: a ``.safetensors`` file in any layout of ``docs/guides/loras.md``.
            shapes: the base's weights of linear layers and convolutions, by component and path.
            strength: factor on top of the layers' own scales.

        Raises:
            WeightsError: as of :meth:`match`, or a tensor holds a NaN or an infinity.
        """
        lora = cls.match(path, shapes, strength)
        check_finite(lora.file)
        return lora

    @classmethod
    def match(cls, path: Path, shapes: Shapes, strength: float = 1.0) -> LoraFile:
        """As :meth:`open`, without reading any tensor.

        Raises:
            WeightsError: the file is damaged or no LoRA, has tensors of an unknown kind, or changes modules that the
                base lacks or that have other shapes. All of them are listed.
        """
        file = SafetensorsFile(path)
        settings = {component: read_settings(path, file.metadata, component) for component in shapes}
        layers = {
            component: {
                module: LoraLayer(file, module, tensors, settings[component]) for module, tensors in modules.items()
            }
            for component, modules in _match(file, shapes).items()
        }
        for component, modules in layers.items():
            weights = {encoder_path(module): shape for module, shape in shapes[component].items()}
            for module, layer in modules.items():
                layer.check(weights[module])
        return cls(file, layers, strength)

    def __str__(self) -> str:
        counts = ", ".join(f"{len(layers)} layers of {component}" for component, layers in self.layers.items())
        return f"{self.file.path.name}: {counts}, at scale {self.strength:g}"


def check_family(path: Path, family: str) -> None:
    """Reject a LoRA for another family.

    Raises:
        WeightsError: it is; the message names both.
    """
    title = find_family(family).title
    if (found := lora_title(SafetensorsFile(path).names) or title) != title:
        raise WeightsError(
            f"{path} is a LoRA for {found}, the base is {title}: take one for {title}, or its own --base"
        )


@dataclasses.dataclass(frozen=True)
class Fusion:
    """LoRAs that are added to one component, one after another.

    Attributes:
        component: its name (``unet``, ``text_encoder_2``).
        loras: the files, in order.
    """

    component: str
    loras: tuple[LoraFile, ...]

    def fuse(self, name: str, weight: Tensor) -> Tensor:
        """A parameter with its layers added, in float32; other parameters come back as they are.

        Args:
            name: the parameter's path (``mid_block.resnets.0.conv1.weight``).
            weight: its value, of any floating type.
        """
        if not name.endswith(".weight"):
            return weight
        module = encoder_path(name.removesuffix(".weight"))
        for lora in self.loras:
            if layer := lora.layers.get(self.component, {}).get(module):
                weight = layer.fuse(weight, lora.strength)
        return weight


def _match(file: SafetensorsFile, shapes: Shapes) -> dict[str, dict[str, dict[str, str]]]:
    """The tensors' names by component, module and part."""
    names, found = ModuleNames(shapes), {}
    unknown, lacking = [], set()
    # A file may hold the blocks in both spellings: diffusers takes its own, so that comes last here.
    for key in sorted(file.names, key=lambda key: (not is_original(key), key)):
        if (split := split_key(key)) is None:
            unknown.append(key)
        elif (place := names.find(split[0])) is None:
            lacking.add(split[0])
        else:
            component, module = place
            parts = found.setdefault(component, {}).setdefault(module, {})
            if not is_original(key) and any(map(is_original, parts.values())):
                parts.clear()
            if split[1] in parts:
                raise WeightsError(f"{file.path} changes {module} twice: by {parts[split[1]]} and by {key}")
            parts[split[1]] = key
    if not found and not lacking:
        raise WeightsError(
            f"{file.path} is no LoRA that hypersd knows: its first tensor is {min(unknown, default='')!r}"
        )
    if unknown:
        raise WeightsError(f"{file.path} has {listed(unknown)}: parts of no kind of LoRA that hypersd knows")
    if lacking:
        raise WeightsError(f"{file.path} changes {listed(lacking)}: the base has no such modules")
    return {component: found[component] for component in shapes if component in found}
