"""Contenders that take part: each generates in a process of its own, in turns, while the others sleep."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...engines.progress import Stage
from ...errors import HyperSDError
from .contender_process import ContenderError, ContenderProcess
from .contenders import Contender, Context
from .figures import make_sample
from .protocol import Settings
from .report import Entry, Sample, Start


class Entrant:
    """A contender's process and its results so far. After a failure it generates no more; ``failure`` says why."""

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        self.name = contender.name
        self.failure: str | None = None
        self.start: Start | None = None
        self._process: ContenderProcess | None = None
        self._facts: dict[str, Any] = {}
        self._memory: dict[str, int] = {}

    @property
    def precision(self) -> str | None:
        """``fp32``, ``fp16`` or ``bf16``; None before it is loaded."""
        return self._facts.get("precision")

    @property
    def device(self) -> str | None:
        """``cpu``, or a CUDA device with its name; None before it is loaded."""
        return self._facts.get("device")

    def begin(self, program: Path, python: str, context: Context, first: Settings) -> None:
        """Start the process, load, and generate the first image, each of which is timed."""
        log = program.with_name(f"{self.name}.log")
        try:
            options = self.contender.options(context)
            self._process = process = ContenderProcess(program, python, self.contender.module, options, log)
        except HyperSDError as error:
            self.fail(str(error))
            return
        self._facts = self._ask("load")
        if (sample := self.generate(first)) is not None:
            self.start = Start(
                process=process.seconds,
                imports=self._facts["imports"],
                load=self._facts["load"],
                first_image=sample.seconds,
            )

    def generate(self, settings: Settings, save: Path | None = None) -> Sample | None:
        """Generate an image and write its pixels to ``save``; None if that failed."""
        answer = self._ask("generate", settings=dataclasses.asdict(settings), save=None if save is None else str(save))
        return make_sample(answer["seconds"], answer["stages"]) if answer else None

    def fail(self, reason: str) -> None:
        """Stop for this reason."""
        self.failure = reason
        self.close()

    def close(self) -> None:
        """End its process, if it has one."""
        if self._process is not None:
            self._process.close()
            self._process = None

    def entry(self) -> Entry:
        """Its entry in the report."""
        facts = self._facts
        return Entry(
            name=self.name,
            summary=self.contender.summary,
            how=facts.get("how"),
            precision=self.precision,
            device=self.device,
            versions=facts.get("versions", {}),
            start=self.start,
            host_memory=self._memory.get("host_memory"),
            device_memory=self._memory.get("device_memory"),
            failure=self.failure,
        )

    def _ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """The process' answer; empty if there is none."""
        if self._process is None:
            return {}
        try:
            answer = self._process.ask(command, **arguments)
        except ContenderError as error:
            self.fail(str(error))
            return {}
        for kind in ("host_memory", "device_memory"):
            if answer.get(kind) is not None:
                self._memory[kind] = max(answer[kind], self._memory.get(kind, 0))
        return answer


@dataclasses.dataclass
class Taken:
    """A contender's images at one number of steps.

    Attributes:
        warmup: seconds of the images that do not count.
        samples: one a round.
        pixels: of the first image, uint8 [H, W, 3]; None if there is none.
    """

    warmup: list[float] = dataclasses.field(default_factory=list)
    samples: list[Sample] = dataclasses.field(default_factory=list)
    pixels: np.ndarray | None = None


def round_order(names: Sequence[str], i: int) -> list[str]:
    """The order of round ``i``: A B C, then C B A, so that a drift of the machine does not favour any."""
    return list(names) if i % 2 == 0 else list(reversed(names))


def take_turns(
    entrants: Sequence[Entrant],
    image: Callable[[int], Settings],
    rounds: int,
    warmup: int,
    folder: Path,
    stage: Stage,
) -> dict[str, Taken]:
    """Generate ``warmup`` images and then ``rounds`` images with each, all the same ones.

    Args:
        entrants: the started ones; one that fails is left out from then on.
        image: the image of a number, from 0 on.
        rounds: images that count.
        warmup: images before them, one or more; the first is kept.
        folder: for that image's pixels, on their way here.
        stage: told which round of how many runs.
    """
    taken = {entrant.name: Taken() for entrant in entrants}
    by_name = {entrant.name: entrant for entrant in entrants}
    for i in range(warmup):
        for entrant in entrants:
            stage.progress.update(i / (warmup + rounds), f"warm-up: {entrant.name}")
            _warm_up(entrant, image(i), taken[entrant.name], folder)
    for i in range(rounds):
        for name in round_order(list(by_name), i):
            stage.progress.update((warmup + i) / (warmup + rounds), f"round {i + 1} of {rounds}: {name}")
            if (sample := by_name[name].generate(image(warmup + i))) is not None:
                taken[name].samples.append(sample)
    return taken


def _warm_up(entrant: Entrant, settings: Settings, taken: Taken, folder: Path) -> None:
    """Generate an image that does not count; the first one's pixels are kept."""
    file = folder / f"{entrant.name}.npy" if taken.pixels is None else None
    sample = entrant.generate(settings, file)
    if sample is None:
        return
    taken.warmup.append(sample.seconds)
    if file is not None:
        taken.pixels = np.load(file)
        file.unlink()
