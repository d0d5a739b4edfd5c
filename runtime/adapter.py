"""A LoRA file in the form that a bundle's slot takes: two matrices for all layers of a component."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..engines import Manifest
from ..engines.engine import TORCH_DTYPES
from ..engines.files import sha256_file
from ..engines.lora_slot import LORA, LoraSlot, SlotLayer
from ..errors import RequestError, WeightsError, warn_user
from ..weights.lora_file import LoraFile, check_family
from ..weights.lora_layer import LoraLayer, check_finite
from ..weights.low_rank import balanced, factorize, ordered, squared_norm

LARGEST_STRENGTH = 10.0
LONGEST_NAME = 100
NEGLIGIBLE = 1e-6  # share of a squared norm, below which it counts as rounding


class AdapterWarning(UserWarning):
    """A part of a LoRA is left out, because the slot has no place or no rank for it."""


@dataclasses.dataclass(frozen=True)
class Factors:
    """A LoRA's change of one component: for each layer ``ups[:, columns].T @ downs[rows].T``.

    Attributes:
        downs: [I, r], a row for each input of every layer with a place.
        ups: [r, O], a column for each output.
    """

    downs: Tensor
    ups: Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """A loaded LoRA file.

    Attributes:
        name: of the adapter.
        path: the file.
        sha256: its hash.
        rank: the part of the slot's rank that it takes.
        factors: by component, in the bundle's precision, with alphas and scales in them.
        notes: the parts of the file that are left out.
        is_strict: whether nothing may be left out.
    """

    name: str
    path: Path
    sha256: str
    rank: int
    factors: Mapping[str, Factors]
    notes: tuple[str, ...]
    is_strict: bool


def slot_of(manifest: Manifest) -> LoraSlot:
    """The bundle's LoRA slot.

    Raises:
        RequestError: it has none.
    """
    if manifest.lora_slot is None:
        raise RequestError("this bundle has no LoRA slot: export it with --lora-slot RANK, such as 32")
    return manifest.lora_slot


def load_adapter(manifest: Manifest, path: Path, name: str, is_strict: bool = False) -> Adapter:
    """Read a LoRA file and put its layers into their places.

    Args:
        manifest: of a bundle with a LoRA slot.
        path: a ``.safetensors`` file in any layout of ``docs/guides/loras.md``.
        name: of the adapter.
        is_strict: reject a file of which a part would be left out.

    Raises:
        RequestError: the bundle has no slot, or the name is none.
        WeightsError: the file is damaged, of another family, a DoRA, or has no layer with a place.
    """
    slot = slot_of(manifest)
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= LONGEST_NAME:
        raise RequestError(f"adapter name {name!r}: expected up to {LONGEST_NAME} printable characters")
    if not path.is_file():
        raise WeightsError(f"LoRA {str(path)!r} is not a file: expected a .safetensors file")
    check_family(path, manifest.family)
    lora = LoraFile.match(path, slot.shapes)
    if any(layer.is_dora for _, layer in _layers(lora)):
        raise WeightsError(f"{path} is a DoRA, which depends on the base's weights: fuse it at export with --add-lora")
    try:
        fitted = _Fitted(slot, lora)
    except _NotFiniteError:
        check_finite(lora.file)  # names the tensor
        raise WeightsError(f"{path} holds numbers too large for float32: take another file") from None
    if not fitted.layers:
        raise WeightsError(f"{path}: {fitted.left_out}, and nothing is left: fuse it at export with --add-lora")
    notes = tuple(f"{path.name}: {note}" for note in (fitted.left_out, fitted.reduced) if note)
    if notes and is_strict:
        raise WeightsError(f"{'; '.join(notes)}; nothing may be left out (strict): fuse it at export with --add-lora")
    for note in notes:
        warn_user(note, AdapterWarning)
    return Adapter(name, path, sha256_file(path), fitted.rank, _stack(manifest, slot, fitted), notes, is_strict)


class _NotFiniteError(Exception):
    """A layer's norm is infinite or NaN."""


def _finite(norm: float) -> float:
    if not math.isfinite(norm):
        raise _NotFiniteError
    return norm


def _layers(lora: LoraFile) -> Iterator[tuple[tuple[str, str], LoraLayer]]:
    for component, layers in lora.layers.items():
        for path, layer in layers.items():
            yield (component, path), layer


class _Fitted:
    """The layers of a file that have a place, as factors of at most the slot's rank, and what was lost on the way."""

    def __init__(self, slot: LoraSlot, lora: LoraFile) -> None:
        self.slot = slot
        self.path = lora.file.path
        self.layers: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
        self.original_rank = 0  # of the layers that lose a part
        self._lost = self._placed = self._error = 0.0  # squared norms
        self._outside: dict[str, int] = {}
        for (component, path), layer in _layers(lora):
            if slot.layers[component][path].has_place:
                self.layers[component, path] = self._fit(layer)
            else:
                self._outside[component] = self._outside.get(component, 0) + 1
                self._lost += _finite(layer.change().square().sum().item())

    @property
    def rank(self) -> int:
        return max(len(down) for down, _ in self.layers.values())

    @property
    def left_out(self) -> str | None:
        if not self._outside:
            return None
        counts = ", ".join(f"{count} layers of {component}" for component, count in self._outside.items())
        share = math.sqrt(self._lost / max(self._lost + self._placed, torch.finfo(torch.float32).tiny))
        return f"the LoRA slot has no place for {counts}, which are left out ({share:.0%} of its change)"

    @property
    def reduced(self) -> str | None:
        if not self.original_rank:
            return None
        error = math.sqrt(self._error / max(self._placed, torch.finfo(torch.float32).tiny))
        return f"rank {self.original_rank} is reduced to the slot's {self.slot.rank} (relative error {error:.1%})"

    def _fit(self, layer: LoraLayer) -> tuple[Tensor, Tensor]:
        """Down and up in float32, of at most the slot's rank, with the layer's scale in them."""
        most = self.slot.rank
        if (factors := layer.factors()) is not None:
            down, up = factors[0], factors[1] * factors[2]
            norm, rank = _finite(squared_norm(down, up)), len(down)
            if rank > most:
                down, up = ordered(down, up)
                down, up = down[:most], up[:, :most]
        else:  # LoHa and LoKr are no product of two thin matrices
            change = layer.change()
            norm, rank = _finite(change.square().sum().item()), min(change.shape)
            down, up = factorize(change, most)
        error = 0.0 if rank <= most and factors is not None else max(0.0, norm - squared_norm(down, up))
        if error > NEGLIGIBLE * norm:
            self.original_rank = max(self.original_rank, rank)
        self._placed += norm
        self._error += error
        return balanced(down, up)


def _stack(manifest: Manifest, slot: LoraSlot, fitted: _Fitted) -> dict[str, Factors]:
    stacked = {}
    for component in dict.fromkeys(component for component, _ in fitted.layers):
        dtype = TORCH_DTYPES[manifest.components[component].inputs[LORA].dtype]
        rows, columns = slot.widths(component)
        downs, ups = torch.zeros(rows, fitted.rank, dtype=dtype), torch.zeros(fitted.rank, columns, dtype=dtype)
        for path, layer in slot.placed(component).items():
            if (factors := fitted.layers.get((component, path))) is not None:
                _write(Factors(downs, ups), layer, *factors)
        limit = torch.finfo(dtype).max
        if not (_largest(downs) <= limit and _largest(ups) * LARGEST_STRENGTH <= limit):
            raise WeightsError(f"{fitted.path} has factors that overflow {dtype}: fuse it at export with --add-lora")
        stacked[component] = Factors(downs, ups)
    return stacked


def _largest(tensor: Tensor) -> float:
    low, high = tensor.aminmax()
    return max(-low.item(), high.item())


def _write(factors: Factors, layer: SlotLayer, down: Tensor, up: Tensor) -> None:
    """Put a layer's ``down [r, in]`` and ``up [out, r]`` into its place; a rank that it lacks stays zero."""
    rows, columns = _view_layer(factors, layer)
    rows[:, : len(down)] = down.T
    columns[: len(down)] = up.T


def _view_layer(factors: Factors, layer: SlotLayer) -> tuple[Tensor, Tensor]:
    """The layer's rows of ``downs`` [in, r] and columns of ``ups`` [r, out]."""
    assert layer.down is not None
    assert layer.up is not None
    outputs, inputs = layer.weight[:2]
    return factors.downs[layer.down : layer.down + inputs], factors.ups[:, layer.up : layer.up + outputs]


def reduce(slot: LoraSlot, factors: Mapping[str, Factors], rank: int) -> tuple[dict[str, Factors], float]:
    """The best factors of a smaller rank, and their relative error."""
    reduced, norm, error = {}, 0.0, 0.0
    for component, own in factors.items():
        smaller = Factors(torch.zeros_like(own.downs[:, :rank]), torch.zeros_like(own.ups[:rank]))
        for layer in slot.placed(component).values():
            down, up = (factor.float().T for factor in _view_layer(own, layer))
            before = squared_norm(down, up)
            down, up = balanced(*ordered(down, up))
            down, up = down[:rank], up[:, :rank]
            _write(smaller, layer, down, up)
            norm += before
            error += max(0.0, before - squared_norm(down, up))
        reduced[component] = smaller
    return reduced, math.sqrt(error / norm) if norm else 0.0
