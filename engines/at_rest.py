"""Work that waits until nothing has happened for a while."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class AtRest:
    """Calls ``action`` once when ``touch`` has not been called for ``seconds``, on a thread of its own.

    Args:
        action: may run beside later calls of ``touch``, and must not raise.
        seconds: how long nothing has to happen.
    """

    def __init__(self, action: Callable[[], object], seconds: float) -> None:
        self._action = action
        self._seconds = seconds
        self._lock = threading.Lock()
        self._touched = 0.0
        self._is_watched = False

    def touch(self) -> None:
        """Begin the wait again."""
        with self._lock:
            self._touched = time.monotonic()
            if not self._is_watched:
                self._is_watched = True
                threading.Thread(target=self._watch, name="at rest", daemon=True).start()

    def _watch(self) -> None:
        while (left := self._remaining()) > 0:
            time.sleep(left)
        self._action()

    def _remaining(self) -> float:
        """Seconds to wait; at 0 or less the watch ends, and the next touch begins another."""
        with self._lock:
            left = self._touched + self._seconds - time.monotonic()
            self._is_watched = left > 0
            return left
