"""What an export tells about its progress, to whoever shows it."""

from __future__ import annotations

from .hub import DownloadProgress


class ExportProgress:
    """Told what happens; this one says nothing. The command line's shows it."""

    #: told about downloads
    downloads: DownloadProgress | None = None

    def start(self, stage: str) -> None:
        """A stage begins."""

    def finish(self, stage: str, seconds: float, note: str, ok: bool) -> None:
        """The stage ended, well or not."""

    def note(self, text: str) -> None:
        """Something that the user should know."""
