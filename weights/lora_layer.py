"""Arithmetic of one layer of a LoRA file: what it makes of a weight.

Every kind has a change ``delta``, and a scale ``alpha / rank``; the weight becomes ``weight + scale * delta``:

- LoRA: ``up @ down`` (Hu et al., https://arxiv.org/abs/2106.09685, section 4.1); LoCon puts a small convolution ``mid``
  between the two (Yeh et al., https://arxiv.org/abs/2309.14859, appendix B: Tucker decomposition).
- LoHa: ``(w1_a @ w1_b) * (w2_a @ w2_b)`` (Hyeon-Woo et al., https://arxiv.org/abs/2108.06098, section 2.2).
- LoKr: the Kronecker product of ``w1`` and ``w2`` (Edalati et al., https://arxiv.org/abs/2212.10650, section 3).

DoRA gives the sum a magnitude of its own for each output (Liu et al., https://arxiv.org/abs/2402.09353, equation 5).
Sums are computed in float32, whatever the files hold, and the caller rounds them once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from ..errors import WeightsError
from .safetensors_file import FLOATS, SafetensorsFile, is_finite

_W1 = (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
_W2 = (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"), ("lokr_w2_a", "lokr_w2_b", "lokr_t2"))
_HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
# The kind of a layer, by the tensors that it consists of.
KINDS: dict[frozenset[str], str] = {
    frozenset({"down", "up"}): "lora",
    frozenset({"down", "up", "mid"}): "lora",
    frozenset(_HADA): "loha",
    frozenset({*_HADA, "hada_t1", "hada_t2"}): "loha",
    **{frozenset({*w1, *w2}): "lokr" for w1 in _W1 for w2 in _W2},
}
BESIDES = frozenset({"alpha", "dora_scale", "magnitude"})  # that a layer of any kind may have
RANKED = ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")  # tensors whose first extent is the rank


class Scaling(Protocol):
    """Scales that lie outside the layers' tensors, in a configuration."""

    def scale(self, module: str, rank: int | None) -> float:
        """The factor ``alpha / rank`` of a layer; ``rank`` is its tensors', if they have one."""
        ...


@dataclasses.dataclass(frozen=True)
class LoraLayer:
    """The tensors of a file that change one weight; they are read when they are needed.

    Attributes:
        file: open.
        module: path of the linear or convolution layer that they change.
        tensors: their names in the file, by part (``down``, ``up``, ``alpha``; see ``KINDS`` and ``BESIDES``).
        scaling: the scales, if a configuration gives them.
    """

    file: SafetensorsFile
    module: str
    tensors: Mapping[str, str]
    scaling: Scaling | None = None

    @property
    def kind(self) -> str | None:
        """``lora``, ``loha`` or ``lokr``; None if these tensors make no layer."""
        return KINDS.get(frozenset(self.tensors.keys() - BESIDES))

    @property
    def is_dora(self) -> bool:
        """Whether the sum gets a magnitude of its own."""
        return not self.tensors.keys().isdisjoint({"dora_scale", "magnitude"})

    def check(self, weight: tuple[int, ...]) -> None:
        """Compare the shapes in the file's header with the shape of the weight.

        Raises:
            WeightsError: tensors are missing, quantized, or change a weight of another shape.
        """
        if self.kind is None:
            raise WeightsError(
                f"{self.file.path}: the tensors {', '.join(sorted(self.tensors.values()))} make no layer: "
                "expected those of a LoRA, LoHa or LoKr"
            )
        for part, name in self.tensors.items():
            if (dtype := self.file.dtype(name)) not in FLOATS and part != "alpha":
                raise WeightsError(
                    f"{self.file.path}: {name} is stored as {dtype}, expected {', '.join(sorted(FLOATS))}: "
                    "take the unquantized LoRA"
                )
        shapes = {part: self.file.shape(name) for part, name in self.tensors.items()}
        # The arithmetic itself, on tensors without data, tells what shape it ends in.
        try:
            found = tuple(
                self._delta({part: torch.empty(shape, device="meta") for part, shape in shapes.items()}).shape
            )
        except (RuntimeError, IndexError):
            found = ()
        if not (_fits(found, weight) and self._rank() != 0 and self._besides_fit(shapes, weight)):
            raise WeightsError(f"{self.file.path}{self._why_misfit(found, weight, shapes)}")

    def _why_misfit(
        self, found: tuple[int, ...], weight: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]
    ) -> str:
        """The reason why a change of the shape ``found`` cannot be added to a weight, after the file's path."""
        if self.module == "conv_in" and len(weight) == 4 and found[:1] == weight[:1]:
            channels = math.prod(found[1:]) // math.prod(weight[2:])
            if channels != weight[1]:
                return (
                    f" changes the first layer (conv_in) of a UNet that takes {channels} channels, the base's takes "
                    f"{weight[1]}; for inpainting they take 9, others 4: take a LoRA of that kind, or without conv_in"
                )
        listed = ", ".join(f"{part} {list(shape)}" for part, shape in sorted(shapes.items()))
        return (
            f": the layer {self.module} ({listed}) does not change a weight of {list(weight)}: "
            "this LoRA was made for another base"
        )

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        """``down [rank, in * kernel]``, ``up [out, rank]`` in float32, and the scale of their product.

        None if the change is not a product of two matrices: LoHa, LoKr, DoRA.
        """
        if self.kind != "lora" or self.is_dora:
            return None
        down, up = _factors(self._read())
        return down.flatten(1), up, self.scale()

    def change(self) -> Tensor:
        """What the layer adds to its weight [out, in * kernel], in float32; of a DoRA before the magnitude."""
        return self._delta(self._read()).flatten(1) * self.scale()

    def scale(self) -> float:
        """The layer's own ``alpha / rank``; without an alpha it is 1."""
        rank = self._rank()
        if "alpha" not in self.tensors and self.scaling is not None:
            return self.scaling.scale(self.module, rank)
        if "alpha" not in self.tensors or rank is None:
            return 1.0  # LyCORIS makes rank and alpha equal where no factor of a LoKr is decomposed
        return self.file.read(self.tensors["alpha"]).item() / rank

    def fuse(self, weight: Tensor, scale: float) -> Tensor:
        """The weight with the layer added, in float32.

        Args:
            weight: of any floating type.
            scale: factor on top of the layer's own scale.
        """
        tensors = self._read()
        fused = weight.float() + self._delta(tensors).view(weight.shape) * (scale * self.scale())
        return self._with_magnitude(fused, tensors) if self.is_dora else fused

    def _read(self) -> dict[str, Tensor]:
        return {part: self.file.read(name).float() for part, name in self.tensors.items()}

    def _rank(self) -> int | None:
        part = next((part for part in RANKED if part in self.tensors), None)
        return None if part is None else self.file.shape(self.tensors[part])[0]

    def _delta(self, tensors: Mapping[str, Tensor]) -> Tensor:
        if self.kind == "lora":
            down, up = _factors(tensors)
            return (up @ down.flatten(1)).view(up.shape[0], *down.shape[1:])
        if self.kind == "loha":
            return _product(tensors, "hada_w1", "hada_t1") * _product(tensors, "hada_w2", "hada_t2")
        w1, w2 = _product(tensors, "lokr_w1"), _product(tensors, "lokr_w2", "lokr_t2")
        return torch.kron(w1, w2.flatten(1))

    def _besides_fit(self, shapes: Mapping[str, tuple[int, ...]], weight: tuple[int, ...]) -> bool:
        """Whether alpha is one number, and a magnitude has one for each row or column."""
        axis = self._axis(weight)
        sizes = {part: math.prod(shapes[part]) for part in BESIDES & shapes.keys()}
        return all(size == (1 if part == "alpha" else weight[axis]) for part, size in sizes.items()) and len(sizes) < 3

    def _axis(self, weight: tuple[int, ...]) -> int:
        """The axis that has a magnitude for each index: outputs, or inputs in kohya files of that layout."""
        name = self.tensors.get("dora_scale")
        return 0 if name is None or self.file.shape(name)[:1] == weight[:1] else 1

    def _with_magnitude(self, fused: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        axis = self._axis(tuple(fused.shape))
        others = [dim for dim in range(fused.dim()) if dim != axis]
        norm = torch.linalg.vector_norm(fused, dim=others, keepdim=True)
        magnitude = tensors["dora_scale"] if "dora_scale" in tensors else tensors["magnitude"]
        return fused / norm.clamp_min(torch.finfo(norm.dtype).tiny) * magnitude.reshape(norm.shape)


def check_finite(file: SafetensorsFile) -> None:
    """Reject a file with a NaN or an infinity.

    Raises:
        WeightsError: there is one; the message names file and tensor.
    """
    for name, tensor in file.tensors():
        if not is_finite(tensor):
            raise WeightsError(f"{file.path}: {name} holds a NaN or an infinity: the file is damaged, take another")


def _factors(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Down [rank, in, kernel...] and up [out, rank]; a convolution between them is joined with down."""
    down, up = tensors["down"], tensors["up"]
    if "mid" in tensors:
        down = torch.einsum("ij...,jr->ir...", tensors["mid"], down.squeeze((2, 3)) if down.dim() == 4 else down)
    return down, up.squeeze((2, 3)) if up.dim() == 4 else up


def _product(tensors: Mapping[str, Tensor], name: str, core: str = "") -> Tensor:
    """A factor of LoHa or LoKr: whole, a product of two matrices, or a Tucker decomposition."""
    if name in tensors:
        return tensors[name]
    a, b = tensors[f"{name}_a"], tensors[f"{name}_b"]
    return torch.einsum("ij...,ip,jr->pr...", tensors[core], a, b) if core in tensors else a @ b


def _fits(found: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether a change of that shape can be added: kernels of size 1 and rows may be written in either way."""
    if not found or found[0] != weight[0] or math.prod(found) != math.prod(weight):
        return False
    return len(found) == 2 or _without_ones(found) == _without_ones(weight)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    kept = len(shape)
    while kept > 2 and shape[kept - 1] == 1:
        kept -= 1
    return shape[:kept]
