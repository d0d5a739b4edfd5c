"""Functions and engines that are recorded as CUDA graphs, one for each kind of call."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import one_line, warn_user
from ..by_shapes import KEPT, ByShapes
from ..engine import Engine, EngineWrapper
from .capture import Capture, GraphMemory, Replay, capture_cuda_graph, retained
from .device import one_capture

Work = Callable[[Any, Mapping[str, Tensor]], Mapping[str, Tensor]]

WARM_UPS = 2  # calls: the first finds shapes and kernels, the second allocates the memory for them


class GraphWarning(UserWarning):
    """Work cannot be recorded as a CUDA graph, and runs without one."""


class _Entry:
    """One key's graph and all memory that it uses, made and dropped together."""

    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        self.inputs = {
            name: torch.empty_like(tensor, memory_format=torch.contiguous_format) for name, tensor in inputs.items()
        }
        self.runs = 0  # of the work itself, in any thread: buffers belong to the stream
        self.is_recordable = True
        self.replay: Replay | None = None
        self.outputs: Mapping[str, Tensor] = {}
        self.kept: list[object] = []
        self.streams = [
            torch.cuda.current_stream(device) for device in {t.device for t in inputs.values() if t.is_cuda}
        ]

    def release(self) -> None:
        """Free the graph and its memory after its last run, during no capture of another thread."""
        for stream in self.streams:  # a wait for the device would spoil another's capture
            stream.synchronize()
        with one_capture:
            self.replay, self.outputs, self.inputs = None, {}, {}
            self.kept.clear()

    def load(self, inputs: Mapping[str, Tensor]) -> None:
        for name, tensor in inputs.items():
            self.inputs[name].copy_(tensor, non_blocking=True)


def _kind(key: Hashable, inputs: Mapping[str, Tensor]) -> Hashable:
    """Equal for calls that share a graph."""
    return (key, *((name, t.dtype, t.shape, t.device) for name, t in sorted(inputs.items())))


class GraphedFunction:
    """A function of tensors that is recorded as a CUDA graph for every key and set of shapes.

    ``work(key, inputs)`` returns named tensors. It must depend on nothing but the values of ``inputs``, ``key`` and
    constants, because it runs only a few times: the first calls run it directly, the next one records it, and later
    ones replay the recording. It must enqueue on the current stream, which cannot be the default one, draw no random
    numbers, copy nothing from the host and wait for nothing.

    Work that cannot be recorded runs directly at every call; the first such failure is a :class:`GraphWarning`.

    The caller makes sure that one thread at a time uses it, always on the same stream, and that the outputs of a call
    are read before the next one. Threads may take turns. So only one of its graphs runs at a time, and all share one
    pool of memory. Two functions do not: they may run at once on two streams, and within one image the results of one
    network are read after another one has run.
    """

    def __init__(self, work: Work, capture: Capture | None = None, kept: int = KEPT) -> None:
        self._work = work
        self._capture = capture_cuda_graph if capture is None else capture
        self._memory = GraphMemory()
        self._entries = ByShapes(_Entry.release, kept)
        self._has_warned = False

    def __call__(self, key: Hashable, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The outputs of ``work(key, inputs)``.

        They lie in memory that the next call overwrites, whatever its key, and that is freed with the graph. Copy them
        to keep them longer.
        """
        entry = self._entries.get(_kind(key, inputs), lambda: _Entry(inputs))
        entry.load(inputs)
        if entry.replay is None and entry.is_recordable and entry.runs >= WARM_UPS:
            self._record(key, entry)
        if entry.replay is None:
            outputs = self._work(key, entry.inputs)
            entry.runs += 1
            return outputs
        entry.replay()
        return entry.outputs

    def can_record(self, key: Hashable, inputs: Mapping[str, Tensor]) -> bool:
        """Whether such calls have a graph or may get one: as far as is known, none of their recordings has failed."""
        entry = self._entries.find(_kind(key, inputs))
        return entry is None or entry.is_recordable

    @property
    def recorded(self) -> list[bool]:
        """For each key that is kept, whether a graph of it was recorded."""
        return [entry.replay is not None for entry in self._entries.values()]

    def _record(self, key: Hashable, entry: _Entry) -> None:
        """Record the entry's graph, or mark the entry as not recordable."""
        # Other shapes may have run since the warm-ups, and some libraries plan for the last shape that they saw.
        self._work(key, entry.inputs)
        try:
            with retained() as kept:
                entry.replay, entry.outputs = self._capture(lambda: self._work(key, entry.inputs), self._memory)
            entry.kept = kept
        except Exception as error:  # of the recording; an error of the work is raised again when it runs directly
            entry.is_recordable = False
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        """Warn once: the next kind of call will most likely fail in the same way."""
        if self._has_warned:
            return
        self._has_warned = True
        message = (
            f"{one_line(error)}: this kind of call now runs without a graph, and slower; "
            "Pipeline.load(..., cuda_graphs=False) silences this"
        )
        warn_user(message, GraphWarning)


class GraphedEngine(EngineWrapper):
    """Runs an engine by replaying a CUDA graph of it, one for each stream and set of shapes.

    While a larger graph is recorded, and on the default stream, which cannot be recorded, the engine itself runs. The
    outputs belong to the graph and are valid as long as an engine's (:class:`..engine.Engine`). Threads may share a
    stream if they take turns on it.
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
