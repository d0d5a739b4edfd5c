"""Progress of long work: the interfaces of its displays, stages, and TensorRT's nested phases."""

from __future__ import annotations

import dataclasses
import time
from typing import Protocol


class DownloadProgress(Protocol):
    """Told about one file at a time, unless it is in the cache already."""

    def start(self, filename: str, total: int | None) -> None:
        """A download begins at zero bytes of ``total``; called again for a file whose download starts over."""

    def advance(self, n: int) -> None:
        """``n`` more bytes are here, also those kept from an earlier run; negative if the server starts over."""

    def finish(self) -> None:
        """The download ended, well or not."""


class Progress(Protocol):
    """A display of long work: its stages and its downloads."""

    @property
    def downloads(self) -> DownloadProgress | None:
        """Told about downloads."""
        ...

    def start(self, stage: str) -> None:
        """A stage begins."""
        ...

    def update(self, fraction: float, detail: str) -> None:
        """This part of the running stage is done, 0 to 1; ``detail`` names the current work."""
        ...

    def finish(self, stage: str, seconds: float, note: str, ok: bool) -> None:
        """The stage ended; ``ok`` is False after an error."""
        ...

    def note(self, text: str) -> None:
        """A remark for the user."""
        ...


class Silent:
    """A display that shows nothing."""

    downloads = None

    def start(self, stage: str) -> None:
        pass

    def update(self, fraction: float, detail: str) -> None:
        pass

    def finish(self, stage: str, seconds: float, note: str, ok: bool) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class Stage:
    """A context that reports a stage's begin and end, with the seconds it took and the text of ``note``."""

    def __init__(self, progress: Progress, name: str) -> None:
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


@dataclasses.dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class PhaseTree:
    """The nested phases of TensorRT's progress monitor as one fraction that never falls.

    A phase's steps count alike; the step that is under way counts as far as the phase inside it has come.
    """

    def __init__(self) -> None:
        self._phases: dict[str, _Phase] = {}
        self.fraction = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase of ``steps`` steps begins inside ``parent``, or on its own."""
        self._phases[name] = _Phase(parent if parent in self._phases else None, max(1, steps))
        self._update()

    def step(self, name: str, index: int) -> None:
        """Step ``index`` of a phase, counted from 0, is complete."""
        if phase := self._phases.get(name):
            phase.done = min(phase.steps, max(phase.done, index + 1))
            self._update()

    def end(self, name: str) -> None:
        """A phase ends, with all phases inside it."""
        phase = self._phases.pop(name, None)
        for child in [child for child, inside in self._phases.items() if inside.parent == name]:
            self.end(child)
        if phase is not None and phase.parent is None and not self._phases:
            self.fraction = 1.0

    def _update(self) -> None:
        tops = [name for name, phase in self._phases.items() if phase.parent is None]
        if tops:
            self.fraction = max(self.fraction, self._part(tops[0]))

    def _part(self, name: str) -> float:
        phase = self._phases[name]
        inside = [self._part(child) for child, other in self._phases.items() if other.parent == name]
        return min(1.0, (phase.done + max(inside, default=0.0)) / phase.steps)
