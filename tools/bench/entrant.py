"""Contenders of a run: each generates in a process of its own while the others sleep."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...engines import Manifest
from ...engines.precision import PRECISIONS
from ...errors import HyperSDError
from ...samplers.noise import make_generators, randn
from .contender import Contender, Context
from .contender_process import ContenderError, ContenderProcess
from .figures import make_sample
from .protocol import Settings
from .report import Entry, Sample, Start


class Entrant:
    """A contender's process and its results so far. After a failure it generates nothing; ``failure`` is the reason."""

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        self.name = contender.name
        self.failure: str | None = None
        self.start: Start | None = None
        self._process: ContenderProcess | None = None
        self._context: Context | None = None
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
        """Start the process, load, and generate the first image; each is timed."""
        log = program.with_name(f"{self.name}.log")
        self._context = context
        try:
            options = self.contender.options(context)
            if self.contender.preparation is not None:
                prepare(ContenderProcess(program, python, self.contender.preparation, options, log))
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
        if self.contender.takes_noise and self._context is not None:
            settings = write_noise(self._context.bundle.manifest, settings, self._context.folder / "noise.npy")
        answer = self._ask("generate", settings=dataclasses.asdict(settings), save=None if save is None else str(save))
        return make_sample(answer["seconds"], answer["stages"]) if answer else None

    def warm_up(self, settings: Settings, taken: Taken, folder: Path) -> None:
        """Generate an image that does not count; the first one's pixels are kept, on their way in ``folder``."""
        file = folder / f"{self.name}.npy" if taken.pixels is None else None
        if (sample := self.generate(settings, file)) is None:
            return
        taken.warmup.append(sample.seconds)
        if file is not None:
            taken.pixels = np.load(file)
            file.unlink()

    def fail(self, reason: str) -> None:
        """End the process for this reason."""
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
            resting_memory=self._memory.get("resting_memory"),
            mapped_memory=self._memory.get("mapped_memory"),
            device_memory=self._memory.get("device_memory"),
            failure=self.failure,
        )

    def _ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """The process' answer; empty after a failure."""
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
        for kind in ("resting_memory", "mapped_memory"):
            if answer.get(kind) is not None:
                self._memory[kind] = answer[kind]
        return answer


def prepare(process: ContenderProcess) -> None:
    """Let a process make a contender's files, and end it.

    Raises:
        ContenderError: it failed.
    """
    try:
        process.ask("prepare")
    finally:
        process.close()


def write_noise(manifest: Manifest, settings: Settings, file: Path) -> Settings:
    """Write the noise of the seed, drawn as the bundle's pipeline draws it; return the settings with the file."""
    scale, steps = manifest.vae.spatial, settings.num_inference_steps or len(settings.timesteps or ())
    shape = (1, manifest.vae.latent_channels, settings.height // scale, settings.width // scale)
    (generator,) = make_generators([settings.seed])
    dtype = PRECISIONS[manifest.precision].dtype
    draws = [randn(shape, generator=generator, device="cpu", dtype=dtype).float() for _ in range(1 + steps)]
    np.save(file, torch.stack(draws).numpy())
    return dataclasses.replace(settings, noise=str(file))


@dataclasses.dataclass
class Taken:
    """A contender's images at one number of steps.

    Attributes:
        warmup: seconds of the images that do not count.
        samples: one a round.
        pixels: the first image, uint8 [H, W, 3]; None after a failure.
    """

    warmup: list[float] = dataclasses.field(default_factory=list)
    samples: list[Sample] = dataclasses.field(default_factory=list)
    pixels: np.ndarray | None = None
