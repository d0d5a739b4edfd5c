"""What an export tells about its progress, to whoever shows it."""

from __future__ import annotations

from typing import Protocol

from .hub import DownloadProgress


class ExportProgress(Protocol):
    """Told what happens."""

    @property
    def downloads(self) -> DownloadProgress | None:
        """Told about downloads."""
        ...

    def start(self, stage: str) -> None:
        """A stage begins."""
        ...

    def finish(self, stage: str, seconds: float, note: str, ok: bool) -> None:
        """The stage ended, well or not."""
        ...

    def note(self, text: str) -> None:
        """Something that the user should know."""
        ...


class Silent:
    """Shows nothing."""

    downloads = None

    def start(self, stage: str) -> None:
        pass

    def finish(self, stage: str, seconds: float, note: str, ok: bool) -> None:
        pass

    def note(self, text: str) -> None:
        pass
