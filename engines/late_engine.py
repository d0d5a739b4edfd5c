"""An engine that is loaded when it is needed: many bundles are never given an image to encode.

SD1.5's VAE encoder takes 260 MB of a CPU's memory in float32, and half a second to load.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .engine import Engine
from .specs import Component

LATE = frozenset({"vae_encoder"})  # components that only some calls run


class LateEngine:
    """A component on the CPU that is loaded at its first run, once for all threads.

    Args:
        component: its inputs and outputs.
        load: makes the engine. Its errors are those of the first run.
    """

    capturable = False
    device = torch.device("cpu")

    def __init__(self, component: Component, load: Callable[[], Engine]) -> None:
        self.inputs = component.inputs
        self.outputs = component.outputs
        self._load = load
        self._engine: Engine | None = None
        self._lock = threading.Lock()

    def run(self, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Run the component once; see :class:`.engine.Engine` for how long the returned buffers hold."""
        with self._lock:
            if self._engine is None:
                self._engine = self._load()
        return self._engine.run(feeds)
