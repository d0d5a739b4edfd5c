"""CUDA graphs: work that is enqueued once, recorded, and from then on launched as a whole.

A recorded graph reads and writes the same addresses as during the recording, so the memory must live as long as the
graph: see :class:`GraphedFunction` and :func:`retain`.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...errors import EngineError, one_line, warn_user
from ..by_shapes import KEPT, ByShapes
from ..engine import Engine, EngineWrapper

T = TypeVar("T")
Replay = Callable[[], None]
Capture = Callable[[Callable[[], Any]], tuple[Replay, Any]]
Work = Callable[[Any, Mapping[str, Tensor]], Mapping[str, Tensor]]

WARM_UPS = 2  # calls: the first finds shapes and kernels, the second allocates the memory for them

_recording = threading.local()
_one_capture = threading.Lock()  # torch: "only one capture may be underway at a time in the process"
_broken: list[object] = []  # graphs whose capture torch could not end; its allocator may still point at them


class GraphWarning(UserWarning):
    """Work cannot be recorded as a CUDA graph, and runs without one."""


def between_captures() -> contextlib.AbstractContextManager[Any]:
    """Keep other threads from recording: a wait for the device, or memory that is freed, would invalidate a capture."""
    return _one_capture


def retain(*owners: object) -> None:
    """Keep ``owners`` alive as long as the graph that this thread is recording; outside a recording do nothing.

    Engines call it with the owners of all memory that their kernels use and that torch does not manage.
    """
    if (kept := getattr(_recording, "kept", None)) is not None:
        kept.extend(owners)


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

    def load(self, inputs: Mapping[str, Tensor]) -> None:
        for name, tensor in inputs.items():
            self.inputs[name].copy_(tensor, non_blocking=True)


class GraphedFunction:
    """A function of tensors that is recorded as a CUDA graph for every key and set of shapes.

    ``work(key, inputs)`` returns named tensors. It must depend on nothing but the values of ``inputs``, ``key`` and
    constants, because it runs only a few times: the first calls run it directly, the next one records it, and later
    ones replay the recording. It must enqueue on the current stream, draw no random numbers, copy nothing from the host
    and wait for nothing.

    Work that cannot be recorded runs directly at every call; the first such failure is a :class:`GraphWarning`.

    The caller makes sure that one thread at a time uses it, always on the same stream. Threads may take turns.
    """

    def __init__(self, work: Work, capture: Capture | None = None, kept: int = KEPT) -> None:
        self._work = work
        self._capture = capture_cuda_graph if capture is None else capture
        self._entries = ByShapes(_finish, kept)
        self._has_warned = False

    def __call__(self, key: Hashable, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The outputs of ``work(key, inputs)``.

        They lie in the graph's own memory, which the next call of the same key overwrites, and which is freed with the
        graph. Copy them to keep them longer.
        """
        whole_key = (key, *((name, t.dtype, t.shape, t.device) for name, t in sorted(inputs.items())))
        entry = self._entries.get(whole_key, lambda: _Entry(inputs))
        entry.load(inputs)
        if entry.replay is None and entry.is_recordable and entry.runs >= WARM_UPS:
            self._record(key, entry)
        if entry.replay is None:
            outputs = self._work(key, entry.inputs)
            entry.runs += 1
            return outputs
        entry.replay()
        return entry.outputs

    @property
    def recorded(self) -> list[bool]:
        """For each key that is kept, whether a graph of it was recorded."""
        return [entry.replay is not None for entry in self._entries.values()]

    def _record(self, key: Hashable, entry: _Entry) -> None:
        """Record the entry's graph, or mark the entry as not recordable."""
        # Other shapes may have run since the warm-ups, and some libraries plan for the last shape that they saw.
        self._work(key, entry.inputs)
        kept: list[object] = []
        _recording.kept = kept
        try:
            entry.replay, entry.outputs = self._capture(lambda: self._work(key, entry.inputs))
            entry.kept = kept
        except Exception as error:  # of the recording; an error of the work is raised again when it runs directly
            entry.is_recordable = False
            self._warn(error)
        finally:
            _recording.kept = None

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


def _finish(entry: _Entry) -> None:
    """Wait for the device before an entry is dropped: its memory may go to another stream."""
    with between_captures():
        for device in {tensor.device for tensor in entry.inputs.values() if tensor.is_cuda}:
            torch.cuda.synchronize(device)


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


def capture_cuda_graph(work: Callable[[], T]) -> tuple[Replay, T]:
    """Record the work that ``work`` enqueues on the current stream.

    Nothing is computed until the first launch. Memory that torch allocates inside belongs to the graph and lives as
    long as the returned function; ``work`` must have run before, so that nothing else has to be allocated. A launch
    goes to the stream that is current then. Work of other threads on other streams is neither recorded nor disturbed,
    but no other thread may wait for the whole device meanwhile.

    Returns:
        A function that launches the graph, and the result of ``work``.

    Raises:
        EngineError: something inside cannot be recorded. The current stream is unchanged and usable.
    """
    with _one_capture:
        pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: other threads may allocate and synchronise their own streams.
            with _capture_stream() as stream, _no_collection():
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    result = work()
        except Exception as error:
            _abandon(graph, pool)
            raise EngineError(
                f"CUDA graph: recording failed ({one_line(_first_cause(error))}), expected work that only enqueues"
            ) from error
    return graph.replay, result


@contextlib.contextmanager
def _capture_stream() -> Iterator[torch.cuda.Stream]:
    """The current stream; in place of the default stream, which cannot be recorded, one that is ordered with it.

    Also restores the current stream after a capture that fails to end and leaves its own.
    """
    current = torch.cuda.current_stream()
    is_default = current == torch.cuda.default_stream()
    stream = torch.cuda.Stream() if is_default else current
    if is_default:
        stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield stream
    if is_default:
        current.wait_stream(stream)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's garbage collector from freeing CUDA memory inside: a capture does not survive that."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _abandon(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    """Clean up after a capture that was invalidated and so could not be ended.

    Torch's allocator still routes requests to the graph's pool: stop that, and keep the graph alive in case it fails.
    """
    _broken.append(graph)
    end = getattr(torch._C, "_cuda_endAllocateToPool", None)  # a private name: a newer torch may lack it
    if end is not None:
        with contextlib.suppress(RuntimeError):  # there is nothing to end if the capture was ended after all
            end(torch.cuda.current_device(), pool)


def _first_cause(error: BaseException) -> BaseException:
    """The first error: once a recording is invalid, all later calls fail too and hide it."""
    chain = [error]
    while (earlier := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(earlier)
    ours = [one for one in chain if isinstance(one, EngineError)]  # it names the engine, and contains its own cause
    return (ours or chain)[-1]
