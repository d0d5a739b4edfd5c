"""Care for diffusers, transformers and the C library: silence, errors in one line, memory given back."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterator
from pathlib import Path

from ..errors import WeightsError, one_line


@contextlib.contextmanager
def explained(where: Path, kind: str) -> Iterator[None]:
    """Say a library's error in one line; its errors for files that do not fit share no base class."""
    try:
        yield
    except WeightsError:
        raise
    except Exception as error:
        raise WeightsError(f"{where} cannot be loaded as a {kind}: {one_line(error)}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and log messages of diffusers and transformers."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    levels = [(module, module.get_verbosity()) for module in (diffusers_logging, transformers_logging)]
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    for module, _ in levels:
        module.set_verbosity_error()
    try:
        yield
    finally:
        for module, level in levels:
            module.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def release_memory() -> None:
    """Give freed memory back to the system.

    glibc keeps freed blocks of less than 32 MB, which most weights are, for later: 5 GB after SDXL's UNet.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; musl has none
        if trim is not None:
            trim(0)
