"""The report of `hypersd bench`, as in its JSON file. All times are in seconds, all sizes in bytes."""

from __future__ import annotations

import dataclasses
from typing import Literal

import msgspec

from .host import Host

REPORT_VERSION = 2
Verdict = Literal["same", "close", "other"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """Seconds of one image and of its stages, ``other`` included."""

    seconds: float
    stages: dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sameness:
    """Difference between a contender's first image and hypersd's.

    Attributes:
        psnr: in dB; None for equal images.
        largest: the largest error, in parts of full scale.
        verdict: ``same`` within the threshold of the precision, ``close`` in bfloat16, ``other`` beyond it.
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
    """

    median: float
    p95: float
    minimum: float
    ratio: float | None
    stages: dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A contender at one number of steps.

    Attributes:
        warmup: seconds of the images that do not count.
        samples: one per round, in order; fewer after a failure.
        sameness: None for hypersd itself, and for a contender without an image.
        summary: None without samples.
    """

    contender: str
    warmup: list[float]
    samples: list[Sample]
    sameness: Sameness | None
    summary: Summary | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepsTable:
    """All contenders at one number of steps."""

    steps: int
    rows: list[Row]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """Seconds from the start of a process to its first finished image.

    The search for a contender's files and the check of their hashes are not included. The operating system may have
    cached the files.
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
        how: the backend, in a few words.
        precision: as in :class:`.protocol.Facts`.
        host_memory: the largest resident size of its process, from its start to its last image; resident pages of
            mapped weight files are included.
        resting_memory: the resident size after its last image, likewise; None in reports of earlier versions.
        mapped_memory: the part of it that are pages of mapped files, which the system takes back when it needs memory.
        device_memory: memory that it took of its CUDA device.
        failure: the reason why it stopped.
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
    resting_memory: int | None = None
    mapped_memory: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageFacts:
    """The images: image i has seed ``seed`` + i, and from the second on a prompt with its number."""

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
class Report:
    """One run of `hypersd bench`; ``notes`` are facts that a reader of the figures needs."""

    report_version: Literal[2] = REPORT_VERSION
    date: str
    command: str
    hypersd: str
    bundle: str
    checkpoint: str
    precision: str
    images: ImageFacts
    host: Host
    contenders: list[Entry]
    comparisons: list[StepsTable]
    notes: list[str]

    @property
    def baseline(self) -> Entry:
        """The contender that all others are compared with."""
        return self.contenders[0]

    def entry(self, name: str) -> Entry:
        """A contender by its name."""
        return next(entry for entry in self.contenders if entry.name == name)


def encode(report: Report) -> bytes:
    """The report as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n"


def decode(text: bytes) -> Report:
    """Read such a JSON.

    Raises:
        msgspec.DecodeError: the text is not a report of this version.
    """
    return msgspec.json.decode(text, type=Report)
