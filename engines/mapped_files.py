"""Memory of files that this process has mapped."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

MAPS = Path("/proc/self/maps")


def release_pages(folder: Path) -> None:
    """Give back the memory of all files in a folder that are mapped to be read; an access reads a page again.

    The kernel keeps such pages in its cache as long as nothing else needs the memory. On systems other than Linux
    nothing happens.
    """
    if not MAPS.exists():
        return
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    within = f"{folder.resolve()}/"
    for line in MAPS.read_text(errors="surrogateescape").splitlines():
        span, permissions, _, _, _, *path = line.split(maxsplit=5)
        if path and path[0].startswith(within) and "w" not in permissions:  # what was written would be lost
            begin, end = (int(address, 16) for address in span.split("-"))
            madvise(begin, end - begin, mmap.MADV_DONTNEED)
