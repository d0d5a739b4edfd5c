"""Polygraphy chooses the backend that it drives when it is imported, once a process: tests want both in one."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from unittest import mock

from hypersd.engines.tensorrt.build_process import POLYGRAPHY_SWITCH


def _loaded() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] == "polygraphy"]


@contextlib.contextmanager
def polygraphy_for(backend: str) -> Iterator[None]:
    """Inside, Polygraphy is imported anew for a backend; afterwards everything is as it was."""
    before = {name: sys.modules.pop(name) for name in _loaded()}
    with mock.patch.dict(os.environ, {POLYGRAPHY_SWITCH: "1" if backend == "tensorrt-rtx" else "0"}):
        yield
    for name in _loaded():
        del sys.modules[name]
    sys.modules.update(before)
