"""An engine whose runs are replayed from CUDA graphs."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .cuda_graphs import Capture, GraphedFunction
from .engine import Engine


class GraphedEngine:
    """Runs an engine by replaying a CUDA graph of it, one for each set of shapes, thread and stream.

    Inside a larger graph that is being recorded, and on the default stream, which cannot be, the engine itself runs.
    The outputs are the graph's, and hold as long as an engine's (:class:`.engine.Engine`).
    """

    def __init__(self, engine: Engine, capture: Capture | None = None) -> None:
        self.engine = engine
        self.capturable = engine.capturable
        self._capture = capture
        self._local = threading.local()

    @property
    def inputs(self) -> Mapping[str, Any]:
        return self.engine.inputs

    @property
    def outputs(self) -> Mapping[str, Any]:
        return self.engine.outputs

    @property
    def device(self) -> torch.device:
        return self.engine.device

    def run(self, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Run the network once."""
        if self.device.type != "cuda":
            return self._graphed(0)(None, feeds)
        stream = torch.cuda.current_stream(self.device)
        if stream == torch.cuda.default_stream(self.device) or torch.cuda.is_current_stream_capturing():
            return self.engine.run(feeds)
        return self._graphed(stream.cuda_stream)(None, feeds)

    def _graphed(self, stream: int) -> GraphedFunction:
        """This thread's graphs on a stream: an engine has buffers by both."""
        graphs: dict[int, GraphedFunction] = self._local.__dict__.setdefault("graphs", {})
        if stream not in graphs:
            graphs[stream] = GraphedFunction(lambda _key, inputs: self.engine.run(inputs), self._capture)
        return graphs[stream]
