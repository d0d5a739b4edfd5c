"""One block of device memory for the activations of several engines."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from ...errors import EngineError
from ..cuda.device import out_of_memory

Allocate = Callable[[int, torch.device], Tensor]  # bytes and device to a uint8 tensor


def allocate_bytes(size: int, device: torch.device) -> Tensor:
    """``size`` bytes from torch's allocator, which aligns them to 512."""
    return torch.empty(size, dtype=torch.uint8, device=device)


class ActivationMemory:
    """Activations of engines that run one after another: one block per stream, as large as the largest need.

    Work on a stream is done in order, so engines that run on one stream may share a block, in any threads. All engines
    announce their need before the first block is handed out, and a block then never moves: a CUDA graph that was
    recorded with it stays valid as long as the block is referenced.
    """

    def __init__(self, device: torch.device, allocate: Allocate = allocate_bytes) -> None:
        self.device = device
        self.size = 0
        self._allocate = allocate
        self._blocks: dict[int, Tensor] = {}
        self._lock = threading.Lock()

    def require(self, size: int) -> None:
        """Announce that an engine needs ``size`` bytes.

        Raises:
            EngineError: a smaller block is in use already.
        """
        with self._lock:
            if self._blocks and size > self.size:
                raise EngineError(
                    f"an engine needs {size} bytes of activation memory and {self.size} are handed out: "
                    "expected all engines to be loaded before the first one runs"
                )
            self.size = max(self.size, size)

    def block(self, stream: int) -> Tensor:
        """The block of a stream, uint8 [size].

        Args:
            stream: the address of the CUDA stream.

        Raises:
            EngineError: there is not enough memory.
        """
        with self._lock:
            if stream not in self._blocks:
                try:
                    self._blocks[stream] = self._allocate(self.size, self.device)
                except torch.OutOfMemoryError as error:
                    raise out_of_memory(f"activations need {self.size / 1e9:.2f} GB", self.device) from error
            return self._blocks[stream]

    def drop_blocks(self) -> None:
        """Release the blocks; each is freed when its last user is gone."""
        with self._lock:
            self._blocks.clear()
