"""The adapters of a pipeline: LoRA files that calls take by name, and the slot's tensors made of them."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engines import Manifest
from ..engines.by_shapes import ByShapes
from ..engines.engine import TORCH_DTYPES
from ..engines.lora_slot import LORA
from ..errors import RequestError, warn_user
from ..samplers.numbers import real_number
from .adapter import LARGEST_STRENGTH, Adapter, AdapterWarning, Factors, load_adapter, reduce, slot_of

KEPT_SLOTS = 4  # packed ones: tens of MB each, hundreds for SDXL with a high rank


@dataclasses.dataclass(frozen=True)
class ChosenAdapter:
    """An adapter of a call.

    Attributes:
        name: of the adapter.
        strength: -10..10, factor on top of the file's own scales.
        adapter: the loaded file; None where a manifest alone decides (:func:`.params.decide`).
    """

    name: str
    strength: float
    adapter: Adapter | None = None


@dataclasses.dataclass(frozen=True)
class PackedSlot:
    """The contents of a bundle's LoRA slot for one call.

    Attributes:
        tensors: ``lora [P]`` by component, on its device; empty for a bundle without a slot.
        text_key: equal for slots under which the text encoders compute the same.
    """

    tensors: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    text_key: Hashable = None


NO_SLOT = PackedSlot()


def choose_adapters(
    manifest: Manifest, given: Mapping[str, float] | tuple[ChosenAdapter, ...] | None
) -> tuple[ChosenAdapter, ...]:
    """The adapters of a call, by name; those of a request that was decided are as they were.

    Raises:
        RequestError: they are no names with strengths of -10 to 10, or the bundle has no slot.
    """
    if not given:
        return ()
    if isinstance(given, tuple) and all(isinstance(each, ChosenAdapter) for each in given):
        return given
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise RequestError(f"adapters {given!r}: expected strengths by name, such as {{'style': 0.8}}")
    slot_of(manifest)
    strengths = {
        name: real_number(f"adapters {name!r}", strength, -LARGEST_STRENGTH, LARGEST_STRENGTH)
        for name, strength in sorted(given.items())
    }
    return tuple(ChosenAdapter(name, strength) for name, strength in strengths.items())


class Adapters:
    """Loaded LoRA files by name; threads may share it.

    Args:
        manifest: the bundle's.
        devices: the device of each component that has a slot.
    """

    def __init__(self, manifest: Manifest, devices: Mapping[str, torch.device]) -> None:
        self._manifest = manifest
        self._devices = devices
        self._loaded: dict[str, Adapter] = {}
        self._lock = threading.Lock()
        self._packed: ByShapes[PackedSlot] = ByShapes(kept=KEPT_SLOTS)
        self._reduced: ByShapes[tuple[dict[str, Factors], float]] = ByShapes(kept=KEPT_SLOTS)
        self._empty = PackedSlot({name: self._zeros(name).to(device) for name, device in devices.items()})

    def __iter__(self) -> Iterator[Adapter]:
        with self._lock:
            return iter(list(self._loaded.values()))

    def load(self, path: str | Path, name: str | None = None, strict: bool = False) -> Adapter:
        """Load a file under a name, by default the file's without its ending; see :func:`.adapter.load_adapter`.

        Raises:
            RequestError: the name is taken, or is none; or the bundle has no slot.
            WeightsError: the file does not fit the bundle.
        """
        path = Path(path)
        name = path.stem if name is None else name
        slot_of(self._manifest)
        self._check_free(name)
        adapter = load_adapter(self._manifest, path, name, strict)
        with self._lock:
            self._check_free(name)
            self._loaded[name] = adapter
        return adapter

    def add(self, adapter: Adapter) -> None:
        """Take in an adapter of this bundle that is loaded already, in place of another of its name."""
        with self._lock:
            self._loaded[adapter.name] = adapter

    def unload(self, name: str | None = None) -> None:
        """Forget an adapter, or all; calls that run keep theirs.

        Raises:
            RequestError: there is none of that name.
        """
        with self._lock:
            if name is None:
                self._loaded.clear()
            elif self._loaded.pop(name, None) is None:
                raise self._unknown(name)

    def resolve(self, chosen: Sequence[ChosenAdapter]) -> tuple[ChosenAdapter, ...]:
        """The adapters of a call with their files; one that has its file keeps it.

        Raises:
            RequestError: one is not loaded; the message lists those that are.
        """
        with self._lock:
            return tuple(each if each.adapter else self._with_file(each) for each in chosen)

    def pack(self, chosen: Sequence[ChosenAdapter]) -> PackedSlot:
        """The slot's tensors for a call. If the ranks add up to more than the slot's, each gets a fair share.

        Raises:
            RequestError: that would leave out a part of an adapter that was loaded as strict.
        """
        active = [(each.adapter, each.strength) for each in chosen if each.adapter is not None and each.strength != 0]
        if not active:
            return self._empty
        active.sort(key=lambda each: (each[0].sha256, each[1]))
        shares = fair_shares([adapter.rank for adapter, _ in active], slot_of(self._manifest).rank)
        parts = [(adapter, share, strength) for (adapter, strength), share in zip(active, shares, strict=True)]
        key = tuple((adapter.sha256, share, strength) for adapter, share, strength in parts)
        return self._packed.get(key, lambda: self._make(parts))

    def _make(self, parts: Sequence[tuple[Adapter, int, float]]) -> PackedSlot:
        factors = [self._share(adapter, rank) for adapter, rank, _ in parts]
        tensors = dict(self._empty.tensors)
        for component in {name for own in factors for name in own}:
            slot = self._zeros(component)
            downs, ups = self._views(component, slot)
            begin = 0
            for (_, rank, strength), own in zip(parts, factors, strict=True):
                if component in own:
                    downs[:, begin : begin + rank] = own[component].downs
                    torch.mul(own[component].ups, strength, out=ups[begin : begin + rank])
                begin += rank
            tensors[component] = slot.to(self._devices[component])
        text = [(adapter.sha256, *rest) for adapter, *rest in parts if any(name != "unet" for name in adapter.factors)]
        return PackedSlot(tensors, tuple(text) or None)

    def _share(self, adapter: Adapter, rank: int) -> Mapping[str, Factors]:
        """The adapter's factors of a rank; a smaller one than its own is said."""
        if rank == adapter.rank:
            return adapter.factors
        slot = slot_of(self._manifest)
        if not rank:
            raise RequestError(f"the LoRA slot of rank {slot.rank} has no room for so many adapters: take fewer")
        note = f"adapter {adapter.name!r} has rank {adapter.rank}, and {rank} of the LoRA slot's {slot.rank} are free"
        if adapter.is_strict:
            raise RequestError(f"{note}: take fewer adapters, or export with a larger --lora-slot")
        key = adapter.sha256, rank
        factors, error = self._reduced.get(key, lambda: reduce(slot, adapter.factors, rank))
        warn_user(f"{note}: it is reduced (relative error {error:.1%})", AdapterWarning)
        return factors

    def _zeros(self, component: str) -> Tensor:
        spec = self._manifest.components[component].inputs[LORA]
        return torch.zeros(slot_of(self._manifest).size(component), dtype=TORCH_DTYPES[spec.dtype])

    def _views(self, component: str, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """``downs [I, R]`` and ``ups [R, O]`` in a component's ``lora``."""
        slot = slot_of(self._manifest)
        rows, columns = slot.widths(component)
        downs, ups = tensor.split([slot.rank * rows, slot.rank * columns])
        return downs.view(rows, slot.rank), ups.view(slot.rank, columns)

    def _with_file(self, chosen: ChosenAdapter) -> ChosenAdapter:
        if chosen.name not in self._loaded:
            raise self._unknown(chosen.name)
        return dataclasses.replace(chosen, adapter=self._loaded[chosen.name])

    def _check_free(self, name: str) -> None:
        if name in self._loaded:
            raise RequestError(f"adapter {name!r} is loaded already: give another name, or unload it first")

    def _unknown(self, name: Any) -> RequestError:
        has = ", ".join(self._loaded) or "none"
        return RequestError(f"adapter {name!r} is not loaded: expected some of: {has}; load it first")


def fair_shares(ranks: Sequence[int], room: int) -> list[int]:
    """Ranks that add up to at most ``room``: small ones are kept whole, larger ones get equal shares of the rest."""
    shares, left = [0] * len(ranks), room
    for count, i in enumerate(sorted(range(len(ranks)), key=lambda i: ranks[i])):
        shares[i] = min(ranks[i], left // (len(ranks) - count))
        left -= shares[i]
    return shares
