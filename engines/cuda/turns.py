"""Turns of threads on a device, on one stream, and copies from there to the host."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .streams import claim_stream


class Turns:
    """Lets threads take turns on a device.

    On CUDA all work is enqueued on one stream. It starts each turn after the work of the caller's current stream, which
    afterwards waits for it; the host does not wait. Turns of one thread may be nested.
    """

    def __init__(self, device: torch.device) -> None:
        self._lock = threading.RLock()
        self._stream = claim_stream(device) if device.type == "cuda" else None
        self._block: Tensor | None = None

    @contextmanager
    def turn(self) -> Iterator[torch.cuda.Stream | None]:
        """Run the block alone, and on CUDA on the stream; yields the caller's stream, or None on the CPU."""
        with self._lock:
            if self._stream is None:
                yield None
                return
            caller = torch.cuda.current_stream(self._stream.device)
            self._stream.wait_stream(caller)
            try:
                with torch.cuda.stream(self._stream):
                    yield caller
            finally:
                caller.wait_stream(self._stream)

    def to_host(self, tensor: Tensor) -> Tensor:
        """A contiguous tensor's values on the host, which waits for them here, once.

        Call it in a turn. The next call overwrites the result: all share one pinned block, which is as large as the
        largest tensor so far. A tensor on the CPU is returned unchanged.
        """
        if not tensor.is_cuda:
            return tensor
        size = tensor.numel() * tensor.element_size()
        if self._block is None or len(self._block) < size:
            self._block = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        host = self._block[:size].view(tensor.dtype).view(tensor.shape)
        host.copy_(tensor, non_blocking=True)
        torch.cuda.current_stream(tensor.device).synchronize()
        return host


def hand_out(tensor: Tensor, stream: torch.cuda.Stream | None) -> Tensor:
    """The tensor for a caller who works on ``stream``: its memory is not reused before that work is done."""
    if stream is not None and tensor.is_cuda:
        tensor.record_stream(stream)
    return tensor
