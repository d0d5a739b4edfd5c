"""Files that appear whole or not at all, locks, links, hashes and the cache folder. Needs no torch."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import UserError

HASH_CHUNK = 1 << 22  # bytes


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's contents, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def cache_folder() -> Path:
    """The folder ``hypersd`` in the user's cache folder, which the environment variable XDG_CACHE_HOME moves."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hypersd"


def link_or_copy(source: Path, target: Path) -> None:
    """Make ``target`` a hard link to ``source``, or a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def partial_path(path: Path) -> Path:
    """The hidden sibling in which a file or folder is written until it is whole."""
    return path.with_name(f".{path.name}.partial")


@contextlib.contextmanager
def whole_file(path: Path, *, is_locked: bool = False) -> Iterator[Path]:
    """A hidden sibling of ``path`` to write: renamed to it when the block ends, deleted when the block raises.

    A reader sees the old file or the new one, whole.

    Args:
        path: the file.
        is_locked: the caller holds a lock. The sibling is then :func:`partial_path`, so a file that a killed process
            left is overwritten; otherwise its name is the thread's own.
    """
    own = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
    partial = partial_path(path) if is_locked else own
    if is_locked:
        partial.unlink(missing_ok=True)
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: bytes) -> None:
    """Write a file by way of :func:`whole_file`."""
    with whole_file(path) as partial:
        partial.write_bytes(content)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A new hidden sibling of ``path`` to fill: renamed to it when the block ends, deleted when the block raises.

    The caller holds a lock. A folder that is already at ``path`` is replaced.
    """
    partial = partial_path(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        replace_folder(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def replace_folder(new: Path, path: Path) -> None:
    """Rename ``new`` to ``path``. A folder that is there is moved aside first and then deleted."""
    old = path.with_name(f".{path.name}.old")
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def lock_file(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of the file or folder at ``path``, which is a hidden file beside it.

    Args:
        path: the file or folder that one process at a time may write; links to it share the lock.
        on_wait: called once if another process holds the lock.

    Raises:
        UserError: the folder around ``path`` cannot be written.
    """
    import filelock  # only exporting and building need it

    path = Path(os.path.realpath(path))
    lock = filelock.FileLock(path.parent / f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            on_wait()
            lock.acquire()
    except OSError as error:
        why = f"{lock.lock_file}, the lock of {path}, cannot be written: {error.strerror or error}"
        raise UserError(f"{why}; make its folder writable, or choose another folder") from error
    try:
        yield
    finally:
        lock.release()
