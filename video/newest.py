"""The newest frame of a source that does not wait."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Newest(Generic[T]):
    """Takes items as they come, in a thread of its own, and gives out the newest: a camera does not wait.

    Attributes:
        dropped: number of items that were not given out.
    """

    def __init__(self, items: Iterable[T]) -> None:
        self._news = threading.Condition()
        self._item: T | None = None
        self._has_ended = False
        self._error: BaseException | None = None
        self.dropped = 0
        threading.Thread(target=self._take, args=(items,), name="hypersd-newest", daemon=True).start()

    def __iter__(self) -> Iterator[T]:
        """The newest items; at the end the source's error, if it had one."""
        while True:
            with self._news:
                self._news.wait_for(lambda: self._item is not None or self._has_ended)
                item, self._item = self._item, None
            if item is None:
                break
            yield item
        if self._error is not None:
            raise self._error

    def _take(self, items: Iterable[T]) -> None:
        try:
            for item in items:
                with self._news:
                    self.dropped += self._item is not None
                    self._item = item
                    self._news.notify()
        except BaseException as error:  # whoever waits for an item gets it
            self._error = error
        with self._news:
            self._has_ended = True
            self._news.notify()
