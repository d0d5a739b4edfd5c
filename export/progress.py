"""What an export tells about its progress, to whoever shows it."""

from __future__ import annotations

from typing import Protocol

from ..engines import progress
from .hub import DownloadProgress


class ExportProgress(progress.BuildProgress, Protocol):
    """Told what happens."""

    @property
    def downloads(self) -> DownloadProgress | None:
        """Told about downloads."""
        ...


class Silent(progress.Silent):
    """Shows nothing."""

    downloads = None
