"""LoRA arithmetic: what a LoRA adds to a model's weights.

A LoRA layer adds ``scale * alpha / rank * up @ down`` to a weight (Hu et al., "LoRA", https://arxiv.org/abs/2106.09685,
section 4.1). The sum is computed in float32, whatever the files hold, and the caller rounds it once.
"""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor

from ..errors import WeightsError
from .lora_keys import PARTS
from .safetensors_file import SafetensorsFile


@dataclasses.dataclass(frozen=True)
class Lora:
    """A LoRA file whose keys have been matched with a model's layers.

    Attributes:
        file: open; layers are read from it one at a time.
        keys: the layers' paths, each with the beginning of its keys in the file (:mod:`.lora_keys`).
        scale: factor on top of the file's own alpha/rank.
    """

    file: SafetensorsFile
    keys: dict[str, str]
    scale: float = 1.0

    def scaled(self, scale: float) -> Lora:
        """The LoRA with another scale."""
        return dataclasses.replace(self, scale=scale)

    def check_shapes(self, module: str, weight: tuple[int, ...]) -> None:
        """Compare the shapes in the file's header with the shape of the layer's weight.

        Raises:
            WeightsError: the layer adds to a weight of another shape.
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
        """A parameter with its layer of the LoRA added, in float32; other parameters come back as they are.

        Args:
            name: the parameter's path (``mid_block.resnets.0.conv1.weight``).
            weight: its value, of any floating type.

        Raises:
            WeightsError: the layer adds to a weight of another shape.
        """
        module = name.removesuffix(".weight")
        if module == name or module not in self.keys:
            return weight
        self.check_shapes(module, tuple(weight.shape))
        down, up, alpha = (self.file.read(f"{self.keys[module]}.{part}").float() for part in PARTS)
        rank = down.shape[0]
        delta = up.flatten(1) @ down.flatten(1)  # [out, rank] @ [rank, in * kernel]
        return weight.float() + delta.view(weight.shape) * (self.scale * alpha.item() / rank)
