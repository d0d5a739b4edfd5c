"""One bounded cache for buffers, contexts and graphs: each belongs to one set of shapes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

KEPT = 8  # sets of shapes; a server whose shapes vary must not keep buffers for all that it ever saw

T = TypeVar("T")


class ByShapes(Generic[T]):
    """Values by key; the least recently used one is dropped before one too many is made.

    Threads may share it: they make and drop values one at a time.

    Args:
        drop: called with a value that is about to be released.
        kept: the largest number of values.
    """

    def __init__(self, drop: Callable[[T], object] | None = None, kept: int = KEPT) -> None:
        self._drop = drop
        self._kept = kept
        self._values: OrderedDict[Hashable, T] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of ``key``, made by ``make`` if there is none; an error of ``make`` leaves none."""
        with self._lock:
            if key not in self._values:
                while len(self._values) >= self._kept:
                    self._release(self._values.popitem(last=False)[1])
                self._values[key] = make()
            self._values.move_to_end(key)
            return self._values[key]

    def find(self, key: Hashable) -> T | None:
        """The value of ``key``, if there is one; that is no use of it."""
        with self._lock:
            return self._values.get(key)

    def values(self) -> list[T]:
        """All values, the least recently used one first."""
        with self._lock:
            return list(self._values.values())

    def clear(self) -> None:
        """Release all values; ``drop`` is not called."""
        with self._lock:
            self._values.clear()

    def _release(self, value: T) -> None:
        if self._drop is not None:
            self._drop(value)


class ByThread(threading.local, ByShapes[T]):
    """A :class:`ByShapes` of its own for every thread, which goes with the thread."""
