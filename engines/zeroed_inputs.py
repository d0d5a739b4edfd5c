"""An engine whose other inputs are zeros, such as a UNet's residuals when no ControlNet is used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .by_shapes import ByShapes
from .cuda.capture import retain
from .engine import TORCH_DTYPES, Engine, EngineWrapper, varying_extents
from .specs import TensorSpec


class ZeroedInputs(EngineWrapper):
    """Hides some inputs of an engine and feeds zeros to them.

    The zeros are made once for every set of shapes and only read: several threads may share them, on a CUDA device on
    one stream.

    Args:
        engine: the engine; the outputs are its buffers (:class:`.engine.Engine`).
        zeroed: names of inputs; their extents follow from the extents of the other inputs.
    """

    def __init__(self, engine: Engine, zeroed: Iterable[str]) -> None:
        super().__init__(engine)
        names = frozenset(zeroed)
        self._inputs = {name: spec for name, spec in engine.inputs.items() if name not in names}
        self._specs = {name: spec for name, spec in engine.inputs.items() if name in names}
        self._zeros: ByShapes[dict[str, Tensor]] = ByShapes()

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        return self._inputs

    def run(self, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Run the engine once."""
        extents = varying_extents(self.inputs, feeds)
        zeros = self._zeros.get(frozenset(extents.items()), lambda: self._make_zeros(extents))
        retain(zeros)
        return self.engine.run({**zeros, **feeds})

    def _make_zeros(self, extents: Mapping[str, int]) -> dict[str, Tensor]:
        return {
            name: torch.zeros(spec.shape_at(extents), dtype=TORCH_DTYPES[spec.dtype], device=self.device)
            for name, spec in self._specs.items()
        }
