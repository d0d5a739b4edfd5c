"""An engine whose runs are replayed from CUDA graphs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..engine import Engine, EngineWrapper
from .graphs import Capture, GraphedFunction


class GraphedEngine(EngineWrapper):
    """Runs an engine by replaying a CUDA graph of it, one for each stream and set of shapes.

    Inside a larger graph that is being recorded, and on the default stream, which cannot be, the engine itself runs.
    The outputs are the graph's, and hold as long as an engine's (:class:`.engine.Engine`). Threads may share a stream
    if they take turns on it.
    """

    def __init__(self, engine: Engine, capture: Capture | None = None) -> None:
        super().__init__(engine)
        self._capture = capture
        self._graphs: dict[int, GraphedFunction] = {}  # by stream, of which torch has few

    def run(self, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Run the network once."""
        if self.device.type != "cuda":
            return self._graphed(0)(None, feeds)
        stream = torch.cuda.current_stream(self.device)
        if stream == torch.cuda.default_stream(self.device) or torch.cuda.is_current_stream_capturing():
            return self.engine.run(feeds)
        return self._graphed(stream.cuda_stream)(None, feeds)

    def _graphed(self, stream: int) -> GraphedFunction:
        """The graphs on a stream: an engine's buffers belong to it."""
        if stream not in self._graphs:
            made = GraphedFunction(lambda _key, inputs: self.engine.run(inputs), self._capture)
            self._graphs.setdefault(stream, made)  # another thread may have been faster
        return self._graphs[stream]
