"""An engine some of whose inputs are zeros: a UNet that takes a ControlNet's residuals, without one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .cuda.graphs import retain
from .engine import TORCH_DTYPES, Engine, EngineWrapper, varying_extents
from .manifest import TensorSpec

KEPT_SHAPES = 8  # sets of zeros; the least recently used goes first


class ZeroedInputs(EngineWrapper):
    """An engine without its inputs ``zeroed``, for which it feeds zeros.

    The zeros are made once for every set of shapes and only read: several threads may share them, on a CUDA device on
    one stream.

    Args:
        engine: the engine, whose buffers the outputs are (:class:`.engine.Engine`).
        zeroed: names of inputs, whose extents follow from those of the other inputs.
    """

    def __init__(self, engine: Engine, zeroed: Iterable[str]) -> None:
        super().__init__(engine)
        names = frozenset(zeroed)
        self._inputs = {name: spec for name, spec in engine.inputs.items() if name not in names}
        self._specs = {name: spec for name, spec in engine.inputs.items() if name in names}
        self._zeros: OrderedDict[tuple[tuple[str, int], ...], dict[str, Tensor]] = OrderedDict()

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        return self._inputs

    def run(self, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Run the engine once."""
        zeros = self._zeros_at(varying_extents(self.inputs, feeds))
        retain(zeros)
        return self.engine.run({**zeros, **feeds})

    def _zeros_at(self, extents: Mapping[str, int]) -> dict[str, Tensor]:
        key = tuple(sorted(extents.items()))
        zeros = self._zeros.pop(key, None)  # two threads may both make them: either's are zeros
        if zeros is None:
            zeros = {
                name: torch.zeros(spec.shape_at(extents), dtype=TORCH_DTYPES[spec.dtype], device=self.device)
                for name, spec in self._specs.items()
            }
        self._zeros[key] = zeros
        while len(self._zeros) > KEPT_SHAPES:
            self._zeros.popitem(last=False)
        return zeros
