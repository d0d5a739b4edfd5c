"""The cache of buffers by shapes, compared with a list of keys in the order of their last use."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypersd.engines.by_shapes import ByShapes, ByThread


class Value:
    def __init__(self, key: int) -> None:
        self.key = key


@given(keys=st.lists(st.integers(0, 6), max_size=60), kept=st.integers(1, 4))
def test_the_last_few_keys_are_kept(keys: list[int], kept: int) -> None:
    """A kept key gives its value again; one too many drops the least recently used one, before the new one is made."""
    dropped: list[Value] = []
    cache: ByShapes[Value] = ByShapes(dropped.append, kept)
    current: dict[int, Value] = {}  # the least recently used first

    def make() -> Value:
        assert len(cache._values) < kept
        return Value(key)

    for key in keys:
        before = list(dropped)
        value = cache.get(key, make)
        assert value.key == key
        if key in current:
            assert current.pop(key) is value
            assert dropped == before
        elif len(current) == kept:
            assert dropped == [*before, current.pop(next(iter(current)))]
        current[key] = value
        assert cache.values() == list(current.values())


def test_a_dropped_value_is_freed_before_the_next_is_made() -> None:
    """The memory of the old buffers is there for the new ones."""
    cache: ByShapes[Value] = ByShapes(kept=1)
    old = weakref.ref(cache.get(1, lambda: Value(1)))

    def make() -> Value:
        gc.collect()
        assert old() is None
        return Value(2)

    assert cache.get(2, make).key == 2


def test_a_value_that_cannot_be_made_is_tried_again() -> None:
    """As after an out-of-memory error, when memory is free again."""
    cache: ByShapes[Value] = ByShapes()
    with pytest.raises(ZeroDivisionError):
        cache.get(1, lambda: Value(1 // 0))
    assert cache.get(1, lambda: Value(1)).key == 1


def test_clear_releases_all() -> None:
    cache: ByShapes[Value] = ByShapes()
    value = weakref.ref(cache.get(1, lambda: Value(1)))
    cache.clear()
    gc.collect()
    assert value() is None


def test_every_thread_has_its_own_and_takes_it_along() -> None:
    """Another thread gets another value for the same key, which is freed when the thread ends."""
    cache: ByThread[Value] = ByThread()
    mine = cache.get(1, lambda: Value(1))
    with ThreadPoolExecutor(1) as pool:
        others = pool.submit(lambda: weakref.ref(cache.get(1, lambda: Value(1)))).result(60)
        assert others() is not None
        assert others() is not mine
    gc.collect()
    assert others() is None
    assert cache.get(1, lambda: Value(2)) is mine
