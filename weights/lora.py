"""Hyper-SD's LoRA files (kohya keys) and what they add to a UNet's weights.

A LoRA layer adds ``scale * alpha / rank * up @ down`` to a weight (Hu et al., "LoRA", https://arxiv.org/abs/2106.09685,
section 4.1). It is computed in float32, whatever the files hold, and the sum is rounded once by the caller.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from ..errors import WeightsError
from ..families import find_family, lora_title
from .safetensors_file import SafetensorsFile

PREFIX = "lora_unet_"
PARTS = ("lora_down.weight", "lora_up.weight", "alpha")
LISTED_KEYS = 30
COVERED_BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")


@dataclasses.dataclass(frozen=True)
class Lora:
    """A LoRA file whose keys have been matched with a UNet's modules.

    Attributes:
        file: layers are read from it one at a time.
        keys: for each module path of the UNet (``mid_block.resnets.0.conv1``) its prefix in the file.
        scale: factor on top of the file's own alpha/rank.
    """

    file: SafetensorsFile
    keys: dict[str, str]
    scale: float

    def check_shapes(self, module: str, weight: tuple[int, ...]) -> None:
        """See from the file's header that the layer of a module adds to a weight of that shape.

        Raises:
            WeightsError: it does not.
        """
        down, up, alpha = (self.file.shape(f"{self.keys[module]}.{part}") for part in PARTS)
        rank = down[0] if down else 0
        fits = rank > 0 and down[1:] == weight[1:] and up == (weight[0], rank, *[1] * (len(weight) - 2))
        if not fits or math.prod(alpha) != 1:
            raise WeightsError(
                f"{self.file.path}: the layer {module} adds {list(up)} x {list(down)} (alpha {list(alpha)}) to a "
                f"weight of {list(weight)}: this LoRA was made for another base"
            )

    def fuse(self, name: str, weight: Tensor) -> Tensor:
        """The parameter ``name`` with its LoRA layer added, in float32; other parameters come back as they are."""
        module = name.removesuffix(".weight")
        if module == name or module not in self.keys:
            return weight
        self.check_shapes(module, tuple(weight.shape))
        down, up, alpha = (self.file.read(f"{self.keys[module]}.{part}").float() for part in PARTS)
        rank = down.shape[0]
        delta = up.flatten(1) @ down.flatten(1)  # [out, rank] @ [rank, in * kernel]
        return weight.float() + delta.view(weight.shape) * (self.scale * alpha.item() / rank)


def open_lora(path: Path, modules: Iterable[str], family: str, scale: float = 1.0) -> Lora:
    """Open a LoRA file and account for every key of it and for every module that Hyper-SD's LoRAs cover.

    Args:
        path: a ``.safetensors`` file with kohya keys.
        modules: paths of the UNet's linear and convolution layers.
        family: name of the base's.
        scale: factor on top of the file's own alpha/rank.

    Raises:
        WeightsError: the file is damaged, of the other family, or keys are left over or missing, which are listed.
    """
    file = SafetensorsFile(path)
    present = set(file.names)
    check_family(path, present, family)
    keys = {name: PREFIX + name.replace(".", "_") for name in modules if name.startswith(COVERED_BLOCKS)}
    expected = {f"{key}.{part}" for key in keys.values() for part in PARTS}
    if not any(key.startswith(PREFIX) for key in present):
        raise WeightsError(
            f"{path} is no LoRA with kohya keys ({PREFIX}….lora_down.weight), it has {min(present, default='none')}"
        )
    if present != expected:
        raise WeightsError(f"{path} does not fit the base's UNet: {describe_keys(present, expected)}")
    return Lora(file, keys, scale)


def check_family(path: Path, keys: set[str], family: str) -> None:
    """Refuse a LoRA that was made for another family of models, recognised by blocks that only one family has."""
    expected = find_family(family).title
    found = lora_title(keys) or expected
    if found != expected:
        raise WeightsError(
            f"{path} is a LoRA for {found}, the base is {expected}: take one for {expected}, or its own --base"
        )


def describe_keys(present: set[str], expected: set[str]) -> str:
    """Left-over and missing keys, sorted, as one line that stays readable when a whole file is wrong."""
    parts = []
    for what, keys in ("left over", present - expected), ("missing", expected - present):
        if keys:
            listed = ", ".join(sorted(keys)[:LISTED_KEYS]) + (", …" if len(keys) > LISTED_KEYS else "")
            parts.append(f"{len(keys)} {what}: {listed}")
    return "; ".join(parts)
