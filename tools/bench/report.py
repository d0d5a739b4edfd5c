"""What `hypersd bench` found out, as it is written to JSON. Seconds and bytes throughout."""

from __future__ import annotations

import dataclasses
from typing import Literal

import msgspec

REPORT_VERSION = 1
Verdict = Literal["same", "close", "other"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One image: the whole, and its stages, ``other`` included."""

    seconds: float
    stages: dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sameness:
    """How far a contender's first image is from hypersd's.

    Attributes:
        psnr: in dB; None for equal images.
        largest: the largest error, in parts of full scale.
        verdict: ``same`` within what the precision explains, ``close`` in bfloat16, ``other`` for another image.
    """

    psnr: float | None
    largest: float
    verdict: Verdict


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """A contender's samples at one number of steps.

    Attributes:
        ratio: the median of its seconds divided by hypersd's of the same round.
        stages: the median of every stage.
        floors: how many times its floor a stage takes, and the whole (``total``).
    """

    median: float
    p95: float
    minimum: float
    ratio: float | None
    stages: dict[str, float]
    floors: dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A contender at one number of steps.

    Attributes:
        warmup: seconds of the images that do not count.
        samples: one a round, in the rounds' order; fewer if it failed.
        sameness: None for hypersd itself, and for what drew nothing.
        summary: None without samples.
    """

    contender: str
    warmup: list[float]
    samples: list[Sample]
    sameness: Sameness | None
    summary: Summary | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """All contenders at one number of steps; ``floors`` are the least seconds by precision and stage."""

    steps: int
    floors: dict[str, dict[str, float]]
    rows: list[Row]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """From the start of a process to its first finished image.

    Finding a contender's files and checking their hashes is not in it. The operating system may have kept the files
    in memory.
    """

    process: float
    imports: float
    load: float
    first_image: float

    @property
    def seconds(self) -> float:
        return self.process + self.imports + self.load + self.first_image


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A contender.

    Attributes:
        how: what ran, in its own words.
        precision: what its networks computed in: ``fp32``, ``fp16`` or ``bf16``.
        host_memory: the largest resident size of its process; resident pages of mapped weight files are in it.
        device_memory: what it took of its CUDA device.
        failure: why it could not go on.
    """

    name: str
    summary: str
    how: str | None
    precision: str | None
    device: str | None
    versions: dict[str, str]
    start: Start | None
    host_memory: int | None
    device_memory: int | None
    failure: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawing:
    """What was drawn: image i has seed ``seed`` + i, and from the second on a prompt with its number."""

    prompt: str
    seed: int
    steps: list[int]
    eta: float
    guidance_scale: float
    height: int
    width: int
    rounds: int
    warmup: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """Where it ran; ``cores`` are those that the process may use."""

    processor: str
    extensions: list[str]
    cores: int
    memory: int | None
    system: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasuredRates:
    """What the machine reaches in one precision."""

    flops_per_second: float
    bytes_per_second: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """One run of `hypersd bench`. ``notes`` say what a reader of the figures has to know."""

    report_version: Literal[1] = REPORT_VERSION
    date: str
    command: str
    hypersd: str
    bundle: str
    checkpoint: str
    precision: str
    drawing: Drawing
    machine: Machine
    rates: dict[str, MeasuredRates]
    contenders: list[Entry]
    comparisons: list[Comparison]
    notes: list[str]

    @property
    def baseline(self) -> Entry:
        """What all others are compared with."""
        return self.contenders[0]

    def entry(self, name: str) -> Entry:
        """A contender by its name."""
        return next(entry for entry in self.contenders if entry.name == name)


def encode(report: Report) -> bytes:
    """The report as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n"


def decode(text: bytes) -> Report:
    """The report of such a JSON.

    Raises:
        msgspec.DecodeError: it is none.
    """
    return msgspec.json.decode(text, type=Report)
