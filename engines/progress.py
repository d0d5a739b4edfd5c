"""What long work tells about its progress, to whoever shows it."""

from __future__ import annotations

import time
from typing import Protocol


class BuildProgress(Protocol):
    """Told what happens."""

    def start(self, stage: str) -> None:
        """A stage begins."""
        ...

    def update(self, fraction: float, detail: str) -> None:
        """The running stage is done to this part, 0 to 1, and busy with ``detail``."""
        ...

    def finish(self, stage: str, seconds: float, note: str, ok: bool) -> None:
        """The stage ended, well or not."""
        ...

    def note(self, text: str) -> None:
        """Something that the user should know."""
        ...


class Silent:
    """Shows nothing."""

    def start(self, stage: str) -> None:
        pass

    def update(self, fraction: float, detail: str) -> None:
        pass

    def finish(self, stage: str, seconds: float, note: str, ok: bool) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class Stage:
    """Tells the progress of a stage's begin and end, with the seconds it took and what ``note`` then says."""

    def __init__(self, progress: BuildProgress, name: str) -> None:
        self.progress = progress
        self.name = name
        self.note = ""
        self.seconds = 0.0

    def __enter__(self) -> Stage:
        self.progress.start(self.name)
        self._began = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.seconds = time.perf_counter() - self._began
        self.progress.finish(self.name, self.seconds, self.note, ok=kind is None)
