"""How far a TensorRT build is, from the phases that its progress monitor reports."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class PhaseTree:
    """Nested phases as one fraction that never falls.

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
