"""An engine that is loaded when it is needed, and released while it is not.

SD1.5's VAE encoder takes 260 MB of a CPU's memory in float32, and half a second to load; many bundles are never given
an image to encode.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor

from .cuda.device import one_capture, release_cached_memory
from .engine import Engine
from .specs import Component

LATE = frozenset({"vae_encoder"})  # components that only some calls run
CPU = torch.device("cpu")


class LateEngine:
    """A component that is loaded at its first run, once for all threads, and again at the next run after a release.

    Args:
        component: its inputs and outputs.
        load: makes the engine. Its errors are those of the run that needs it.
        device: the engine's.
    """

    capturable = False  # a recorded graph would keep the engine

    def __init__(self, component: Component, load: Callable[[], Engine], device: torch.device = CPU) -> None:
        self.inputs = component.inputs
        self.outputs = component.outputs
        self.device = device
        self._load = load
        self._engine: Engine | None = None
        self._streams: set[torch.cuda.Stream] = set()  # with work of the engine
        self._lock = threading.Lock()

    def run(self, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Run the component once; see :class:`.engine.Engine` for how long the returned buffers hold."""
        with self._lock:
            if self._engine is None:
                self._engine = self._load()
            if self.device.type == "cuda":
                self._streams.add(torch.cuda.current_stream(self.device))
            engine = self._engine
        return engine.run(feeds)

    def release(self) -> None:
        """Free the engine's memory, on a GPU after its work there; no other thread may run it meanwhile.

        The buffers of earlier runs stay valid as long as they are referenced.
        """
        with self._lock:
            if self._engine is None:
                return
            for stream in self._streams:
                stream.synchronize()
            self._streams.clear()
            with one_capture if self.device.type == "cuda" else nullcontext():
                self._engine = None  # frees memory, which would invalidate a capture of another thread
            release_cached_memory(self.device)  # the next engine's weights do not come from torch's allocator
        _trim_heap()


def _trim_heap() -> None:
    """Give the heap's free pages back to the system, which glibc otherwise does for those at its end alone."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(ctypes.c_size_t(0))
