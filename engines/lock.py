"""One process at a time writes to a bundle."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import UserError


@contextlib.contextmanager
def locked(root: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """The lock of the bundle at ``root``, a file beside it; ``on_wait`` is called if another process has it.

    Raises:
        UserError: the folder around the bundle cannot be written.
    """
    import filelock  # only exporting and building need it

    root = Path(os.path.realpath(root))  # one lock, whatever links lead there
    lock = filelock.FileLock(root.parent / f".{root.name}.lock")
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            on_wait()
            lock.acquire()
    except OSError as error:
        what = f"{lock.lock_file}, the lock of {root}, cannot be written: {error.strerror or error}"
        raise UserError(f"{what}; make its folder writable, or choose another folder") from error
    try:
        yield
    finally:
        lock.release()
