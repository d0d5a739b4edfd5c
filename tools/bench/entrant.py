"""A contender that takes part: its process, and what came of it so far."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ...errors import HyperSDError
from .contenders import Contender, Context
from .drawing import Settings
from .figures import make_sample
from .process import WorkerError, WorkerProcess
from .report import Entry, Sample, Start


class Entrant:
    """Draws in a process of its own. Once something fails it draws no more, and ``failure`` says why in one line."""

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        self.name = contender.name
        self.failure: str | None = None
        self.start: Start | None = None
        self._process: WorkerProcess | None = None
        self._facts: dict[str, Any] = {}
        self._memory: dict[str, int] = {}

    @property
    def precision(self) -> str | None:
        """What its networks compute in: ``fp32``, ``fp16`` or ``bf16``; None before it is loaded."""
        return self._facts.get("precision")

    @property
    def device(self) -> str | None:
        """``cpu``, or a CUDA device with its name; None before it is loaded."""
        return self._facts.get("device")

    def begin(self, program: Path, python: str, context: Context, first: Settings) -> None:
        """Start the process, load, and draw the first image, each of which is timed."""
        log = program.with_name(f"{self.name}.log")
        try:
            options = self.contender.options(context)
            self._process = process = WorkerProcess(program, python, self.contender.module, options, log)
        except HyperSDError as error:
            self.fail(str(error))
            return
        self._facts = self._ask("load")
        drawn = self.draw(first)
        if drawn is not None:
            self.start = Start(
                process=process.seconds,
                imports=self._facts["imports"],
                load=self._facts["load"],
                first_image=drawn.seconds,
            )

    def draw(self, settings: Settings, save: Path | None = None) -> Sample | None:
        """Draw an image, and write its pixels where they are wanted; None if that failed."""
        answer = self._ask("draw", settings=dataclasses.asdict(settings), save=None if save is None else str(save))
        return make_sample(answer["seconds"], answer["stages"]) if answer else None

    def fail(self, reason: str) -> None:
        """It cannot go on."""
        self.failure = reason
        self.close()

    def close(self) -> None:
        """End its process, if it has one."""
        if self._process is not None:
            self._process.close()
            self._process = None

    def entry(self) -> Entry:
        """What the report says of it."""
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
        """The process' answer; an empty one if there is none."""
        if self._process is None:
            return {}
        try:
            answer = self._process.ask(command, **arguments)
        except WorkerError as error:
            self.fail(str(error))
            return {}
        for kind in ("host_memory", "device_memory"):
            if answer.get(kind) is not None:
                self._memory[kind] = max(answer[kind], self._memory.get(kind, 0))
        return answer
