"""An engine that computes nothing: it shows what the loop around the networks costs, and lets tests run without any."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .engine import TORCH_DTYPES, check_feeds, varying_extents
from .manifest import Component


class NullEngine:
    """Checks its inputs as a real engine does and returns zeros; counts its runs.

    An output dimension that varies takes the extent that the input dimension of the same name has, or its usual one.
    """

    def __init__(self, name: str, component: Component) -> None:
        self.name = name
        self.inputs = component.inputs
        self.outputs = component.outputs
        self.device = torch.device("cpu")
        self.capturable = False
        self.runs = 0

    def run(self, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Zeros of the outputs' dtypes and shapes."""
        check_feeds(self.name, self.inputs, feeds, self.device)
        self.runs += 1
        extents = varying_extents(self.inputs, feeds)
        return {
            key: torch.zeros(spec.shape_at(extents), dtype=TORCH_DTYPES[spec.dtype])
            for key, spec in self.outputs.items()
        }
