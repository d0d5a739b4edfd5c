"""The LoRA slot of a bundle: the layout of the input ``lora``, through which its graphs take LoRAs at run time.

A component with a slot of rank R takes ``lora [P]``: the matrix ``downs [I, R]`` row by row, and after it the matrix
``ups [R, O]``. Each layer that has a place owns as many rows of ``downs`` as it has inputs, and as many columns of
``ups`` as it has outputs, and adds ``x @ downs[rows] @ ups[:, columns]`` to its output. Zeros add nothing. A LoRA of
rank r is therefore one block of r columns of ``downs`` and r rows of ``ups`` for all layers together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import msgspec

from .specs import Positive, Record, Size

LORA = "lora"  # the input's name
LARGEST_RANK = 256
Rank = Annotated[int, msgspec.Meta(ge=1, le=LARGEST_RANK)]


class SlotLayer(Record, frozen=True, kw_only=True):
    """A linear layer or convolution, which a LoRA file may change.

    Attributes:
        weight: the shape of its weight.
        down: the first of its rows in ``downs``; None if it has no place in the slot.
        up: the first of its columns in ``ups``; None likewise.
    """

    weight: tuple[Positive, ...]
    down: Size | None = None
    up: Size | None = None

    @property
    def has_place(self) -> bool:
        return self.down is not None


class LoraSlot(Record, frozen=True, kw_only=True):
    """Rank and layout of the slot.

    Attributes:
        rank: the sum of the ranks of the LoRAs that are in it at once.
        layers: by component and path, all layers that a LoRA file may change, with a place or without. Paths in a text
            encoder are those of transformers 5.
    """

    rank: Rank
    layers: dict[str, dict[str, SlotLayer]]

    def __post_init__(self) -> None:
        for component, layers in self.layers.items():
            rows = columns = 0
            for path, layer in layers.items():
                if layer.down is None and layer.up is None:
                    continue
                if (layer.down, layer.up) != (rows, columns) or len(layer.weight) < 2:
                    raise ValueError(f"LoRA slot of {component}: the place of {path} does not follow the one before it")
                rows, columns = rows + layer.weight[1], columns + layer.weight[0]

    @property
    def components(self) -> list[str]:
        """The components that take ``lora``."""
        return [name for name in self.layers if self.placed(name)]

    def placed(self, component: str) -> dict[str, SlotLayer]:
        """The layers of a component that have a place, by path."""
        return {path: layer for path, layer in self.layers.get(component, {}).items() if layer.has_place}

    def widths(self, component: str) -> tuple[int, int]:
        """The number of rows of ``downs`` and of columns of ``ups``."""
        weights = [layer.weight for layer in self.placed(component).values()]
        return sum(weight[1] for weight in weights), sum(weight[0] for weight in weights)

    def size(self, component: str) -> int:
        """The number of elements of the component's ``lora``."""
        return self.rank * sum(self.widths(component))

    @property
    def shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """The shapes of the weights that a LoRA file may change, by component and path."""
        return {name: {path: layer.weight for path, layer in layers.items()} for name, layers in self.layers.items()}


def lay_out(shapes: Mapping[str, tuple[int, ...]], placed: set[str]) -> dict[str, SlotLayer]:
    """The layers of one component; those in ``placed`` get places one after another."""
    layers, rows, columns = {}, 0, 0
    for path, weight in shapes.items():
        if path in placed:
            layers[path] = SlotLayer(weight=weight, down=rows, up=columns)
            rows, columns = rows + weight[1], columns + weight[0]
        else:
            layers[path] = SlotLayer(weight=weight)
    return layers
