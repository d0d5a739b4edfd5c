"""The recording of one CUDA graph: work that is enqueued once, and from then on launched as a whole.

A recorded graph reads and writes the same addresses as during the recording, so all memory that it uses must live as
long as the graph: torch's own by :class:`GraphMemory`, all other by :func:`retain`.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from ...errors import EngineError, one_line
from .device import one_capture

T = TypeVar("T")
Replay = Callable[[], None]
Capture = Callable[[Callable[[], Any], "GraphMemory"], tuple[Replay, Any]]

_recording = threading.local()
_broken: list[object] = []  # graphs whose capture torch did not end: its allocators may still point at them


class GraphMemory:
    """Memory that torch allocates during recordings, in one pool for all graphs that are recorded with it.

    Only one of them may run at a time, and its results must be read before another one is launched: a graph reuses
    memory that an earlier recording gave free, and each launch may write over what another left there. Inputs must
    therefore lie elsewhere. Torch asks besides that graphs are launched in the order of their recording, which matters
    only if one reads what another computed.
    """

    def __init__(self) -> None:
        self._pool: Any = None
        self._graphs: weakref.WeakSet[Any] = weakref.WeakSet()

    def pool(self) -> Any:
        """The pool for the next graph, by torch's handle."""
        # A pool ends with its last graph, but its handle is known until its memory is freed; to record into it then
        # fails an assertion of torch (create_or_incref_pool of c10/cuda/CUDACachingAllocator.cpp).
        if not len(self._graphs):
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool

    def add(self, graph: Any) -> None:
        """Take note of a graph that was recorded into the pool."""
        self._graphs.add(graph)

    def leave_pool(self) -> None:
        """Take another pool from now on; graphs that were recorded keep theirs."""
        self._graphs.clear()


def retain(*owners: object) -> None:
    """Keep ``owners`` alive as long as the graph that this thread is recording; outside a recording do nothing.

    Engines call it with the owners of all memory that their kernels use and that torch does not manage.
    """
    if (kept := getattr(_recording, "kept", None)) is not None:
        kept.extend(owners)


@contextlib.contextmanager
def retained() -> Iterator[list[object]]:
    """Collect in a list all that :func:`retain` is given inside, in this thread."""
    _recording.kept = kept = []
    try:
        yield kept
    finally:
        _recording.kept = None


def capture_cuda_graph(work: Callable[[], T], memory: GraphMemory) -> tuple[Replay, T]:
    """Record the work that ``work`` enqueues on the current stream, which is not the default stream.

    Nothing is computed until the first launch. Memory that torch allocates inside belongs to the graph and lives as
    long as the returned function; ``work`` must have run before, so that nothing else has to be allocated. A launch
    goes to the stream that is current then. Work of other threads on other streams is neither recorded nor disturbed,
    but no other thread may wait for the whole device meanwhile.

    Args:
        work: enqueues, and waits for nothing.
        memory: shared with graphs that never run at the same time.

    Returns:
        A function that launches the graph, and the result of ``work``.

    Raises:
        EngineError: ``work`` failed, or something inside cannot be recorded. The current stream is unchanged and
            usable.
    """
    with one_capture:
        pool = memory.pool()
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        try:
            # The outer block restores the stream after a capture that fails to end. thread_local: other threads may
            # allocate and synchronise their own streams.
            with torch.cuda.stream(stream), _no_collection():
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    result = work()
        except Exception as error:
            if not _was_ended(pool):
                memory.leave_pool()
                _broken.append(graph)
            raise EngineError(
                f"CUDA graph: recording failed ({one_line(_first_cause(error))}), expected work that only enqueues"
            ) from error
        memory.add(graph)
    return graph.replay, result


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's garbage collector from freeing CUDA memory inside: a capture does not survive that.

    Torch collected garbage before every capture up to 2.8, and does no longer (pytorch/pytorch#161037).
    """
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _was_ended(pool: Any) -> bool:
    """Whether torch ended the capture of a recording that failed, as it does unless the capture was invalidated.

    Else its allocator still routes requests to the graph's pool: that is stopped here. True only if it is known.
    """
    end = getattr(torch._C, "_cuda_endAllocateToPool", None)  # a private name: a newer torch may lack it
    if end is None:
        return False
    try:
        end(torch.cuda.current_device(), pool)
    except RuntimeError:  # it does not record into the pool
        return True
    return False


def _first_cause(error: BaseException) -> BaseException:
    """The first error: once a recording is invalid, all later calls fail too and hide it."""
    chain = [error]
    while (earlier := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(earlier)
    ours = [one for one in chain if isinstance(one, EngineError)]  # it names the engine, and contains its own cause
    return (ours or chain)[-1]
