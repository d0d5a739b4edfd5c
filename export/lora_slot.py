"""The LoRA slot of an export: which layers get a place in it, and the module that takes LoRAs as an input."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ..engines.lora_slot import LARGEST_RANK, LORA, LoraSlot, SlotLayer, lay_out
from ..engines.specs import TensorSpec
from ..errors import RequestError
from ..weights.lora_file import Shapes
from ..weights.lora_names import encoder_path
from .components import ComponentModule, dtype_name

# The attention blocks of a UNet, with their projections in and out, and the layers of a text encoder.
PLACES = {True: re.compile(r".*\.attentions\..+"), False: re.compile(r".*\blayers\..+")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlotOptions:
    """Options of the slot.

    Attributes:
        rank: the sum of the ranks of the LoRAs that are in it at once.
        with_text: whether the text encoders have one too.
    """

    rank: int
    with_text: bool = False

    def check(self) -> None:
        """Reject a rank that is out of range.

        Raises:
            RequestError: it is.
        """
        if not 1 <= self.rank <= LARGEST_RANK:
            raise RequestError(f"--lora-slot {self.rank}: expected a rank of 1 to {LARGEST_RANK}, usually 16 to 64")


def make_slot(options: SlotOptions, shapes: Shapes) -> LoraSlot:
    """The layout: a place for every linear layer and convolution of size 1 in the blocks of attention.

    Args:
        options: rank and components.
        shapes: of all weights that a LoRA may change, by component and path.
    """
    layers = {}
    for component, weights in shapes.items():
        is_unet = component == "unet"
        own = {encoder_path(path): shape for path, shape in weights.items()} if not is_unet else weights
        placed = {
            path
            for path, shape in own.items()
            if (is_unet or options.with_text)
            and PLACES[is_unet].fullmatch(path)
            and all(extent == 1 for extent in shape[2:])
        }
        layers[component] = lay_out(own, placed)
    return LoraSlot(rank=options.rank, layers=layers)


class Slotted(nn.Module):
    """A component whose last input is ``lora``: layers with a place add their part of it to their outputs."""

    def __init__(self, module: nn.Module, model: nn.Module, rank: int, placed: Mapping[str, SlotLayer]) -> None:
        super().__init__()
        self.module = module
        self.rank = rank
        self._factors: list[tuple[Tensor, Tensor]] = []
        modules = {encoder_path(path): layer for path, layer in model.named_modules()}
        self._weights = [layer.weight for layer in placed.values()]
        for i, path in enumerate(placed):
            modules[path].register_forward_hook(self._adds(i))

    def forward(self, *inputs: Tensor) -> Any:
        *rest, lora = inputs
        rows, columns = [weight[1] for weight in self._weights], [weight[0] for weight in self._weights]
        downs, ups = lora.split([self.rank * sum(rows), self.rank * sum(columns)])
        each_down = downs.view(-1, self.rank).split(rows)
        each_up = ups.view(self.rank, -1).split(columns, dim=1)
        self._factors = list(zip(each_down, each_up, strict=True))
        return self.module(*rest)

    def _adds(self, i: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def add(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            down, up = self._factors[i]
            if isinstance(layer, nn.Conv2d):  # of size 1: a linear layer over the channels
                return output + (up.T @ (down.T @ args[0].flatten(2))).view(output.shape)
            return output + args[0] @ down @ up

        return add


def with_slot(component: ComponentModule, model: Any, slot: LoraSlot, name: str) -> ComponentModule:
    """A component that takes ``lora`` after its other inputs.

    Args:
        component: made of ``model``.
        model: has the layers; they are changed in place.
        slot: its rank, and the places of the layers.
        name: the component's.
    """
    spec = TensorSpec(dtype=dtype_name(model.dtype), shape=(slot.size(name),))
    module = Slotted(component.module, model, slot.rank, slot.placed(name))
    return dataclasses.replace(component, module=module, inputs={**component.inputs, LORA: spec})
