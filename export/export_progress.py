"""Progress of an export and of its downloads: the protocols by which a caller follows them."""

from __future__ import annotations

from typing import Protocol

from ..engines import progress


class DownloadProgress(Protocol):
    """Told about one file at a time, unless it is in the cache already."""

    def start(self, filename: str, total: int | None) -> None:
        """A download begins at zero bytes of `total`; called again for a file whose download starts over."""

    def advance(self, n: int) -> None:
        """`n` more bytes are here, also those kept from an earlier run; negative if the server starts over."""

    def finish(self) -> None:
        """The download ended, well or not."""


class ExportProgress(progress.BuildProgress, Protocol):
    """Told about the stages of an export."""

    @property
    def downloads(self) -> DownloadProgress | None:
        """Told about downloads."""
        ...


class Silent(progress.Silent):
    """Shows nothing."""

    downloads = None
