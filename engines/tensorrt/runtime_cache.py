"""The file beside a plan that keeps what TensorRT-RTX compiled for one GPU."""

from __future__ import annotations

from pathlib import Path

from ..bundle import write_whole


def cache_path(plan: Path, compute_capability: str) -> Path:
    """Where the kernels of a plan are kept for GPUs of a compute capability."""
    return plan.with_suffix(f".sm{compute_capability.replace('.', '')}.cache")


def read_cache(path: Path) -> bytes:
    """The file's content; nothing if there is none that can be read."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def write_cache(path: Path, content: bytes) -> bool:
    """Write the file whole, or say that its folder does not take it: a bundle may lie where nothing can be written."""
    try:
        write_whole(path, content)
    except OSError:
        return False
    return True
