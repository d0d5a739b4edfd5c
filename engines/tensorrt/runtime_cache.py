"""Kernels that TensorRT-RTX compiled for a GPU, kept for the next load: beside the plan, or in the user's cache folder.

The user's folder serves bundles that cannot be written, as on a read-only mount.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

from ..files import cache_folder, write_whole

FOLDER = "kernels"  # in the user's cache folder


@dataclasses.dataclass(frozen=True)
class RuntimeCache:
    """The files that may hold a plan's compiled kernels for one kind of GPU.

    At most one is read: the first that TensorRT-RTX takes. One beside the plan is written if possible.

    Attributes:
        beside: the file beside the plan.
        own: the file in the user's cache folder; None if no home folder is known.
    """

    beside: Path
    own: Path | None

    def contents(self) -> Iterator[bytes]:
        """What the files hold, the user's own first: it was written because the bundle's was missing or of no use."""
        for path in filter(None, (self.own, self.beside)):
            with contextlib.suppress(OSError):
                if content := path.read_bytes():
                    yield content

    def keep(self, content: bytes) -> str:
        """Write the compiled kernels unless a file already holds them.

        Args:
            content: the serialized kernels; empty for a library that compiles none.

        Returns:
            A note for the user.
        """
        if not content:
            return ""
        if content in self.contents():
            return "compiled at an earlier load"
        if _is_written(self.beside, content):
            if self.own is not None:
                with contextlib.suppress(OSError):
                    self.own.unlink(missing_ok=True)  # it is read first
            return "compiled for this GPU: the next load is quicker"
        if self.own is not None and _is_written(self.own, content):
            return f"compiled for this GPU and kept in {self.own.parent}: the next load is quicker"
        folders = filter(None, (self.beside.parent, self.own and self.own.parent))
        return f"compiled for this GPU at every load: cannot write {' or '.join(map(str, folders))}"


def find_runtime_cache(plan: Path, sha256: str, version: str, gpu: str, compute_capability: str) -> RuntimeCache:
    """The place of a plan's compiled kernels.

    TensorRT-RTX takes them on the same model of GPU only, not on all of a compute capability, and with the same version
    of itself (``IRuntimeCache.deserialize`` in its Python documentation, 1.7).

    Args:
        plan: the plan's file.
        sha256: the hash of its content.
        version: of TensorRT-RTX.
        gpu: the GPU's name.
        compute_capability: the GPU's, such as ``"8.9"``.
    """
    device = f"{re.sub(r'[^A-Za-z0-9]+', '-', gpu)}-sm{compute_capability.replace('.', '')}"
    own = None
    with contextlib.suppress(RuntimeError):  # a user without a home folder, as containers have
        own = cache_folder() / FOLDER / f"{sha256[:16]}-{version}-{device}.cache"
    return RuntimeCache(plan.with_suffix(f".{device}.cache"), own)


def _is_written(path: Path, content: bytes) -> bool:
    """Write a file atomically, and its folder if it is missing; False if that is not possible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    except OSError:
        return False
    return True
