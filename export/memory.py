"""Giving memory back."""

from __future__ import annotations

import ctypes
import gc
import sys


def release_memory() -> None:
    """Give the memory of what was just dropped back to the system.

    glibc keeps freed blocks of less than 32 MB, which most weights are, for later: 5 GB after SDXL's UNet.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; musl has none
        if trim is not None:
            trim(0)
