"""The report as tables for a terminal."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .host import Host
from .protocol import DECODE, GENERATE, TEXT_ENCODERS, is_step
from .report import Entry, Report, Row, StepsTable, Summary

NONE = "-"
MILLISECONDS_BELOW = 2.0  # the longest median, in seconds, up to which a table is in milliseconds


def print_report(report: Report, console: Console) -> None:
    """Print all tables and the notes below them."""
    for comparison in report.comparisons:
        console.print(_title(report, comparison), markup=False, soft_wrap=True, style="bold")
        console.print(_latency_table(report, comparison, console.width))
    for line in _lines(report):
        console.print(line, markup=False, soft_wrap=True)


@dataclasses.dataclass(frozen=True)
class TimeUnit:
    """A unit for seconds."""

    name: str
    scale: float
    digits: int

    def show(self, seconds: float | None) -> str:
        return NONE if seconds is None else f"{seconds * self.scale:,.{self.digits}f}"


def time_unit(seconds: Sequence[float]) -> TimeUnit:
    """Milliseconds for short times, else seconds."""
    longest = max(seconds, default=0.0)
    if longest >= MILLISECONDS_BELOW:
        return TimeUnit("s", 1.0, 2)
    return TimeUnit("ms", 1000.0, 1 if longest < 0.1 else 0)


def comparison_unit(comparison: StepsTable) -> TimeUnit:
    """The unit for all medians at one number of steps."""
    return time_unit([row.summary.median for row in comparison.rows if row.summary is not None])


@dataclasses.dataclass(frozen=True)
class _Column:
    """``show`` makes the cell of a contender with samples; ``from_width`` is the narrowest terminal that has room."""

    heading: str
    show: Callable[[Entry, Row, Summary, TimeUnit], str]
    from_width: int = 0


def steps_seconds(stages: Mapping[str, float]) -> float | None:
    """All steps together; None if they were not timed separately."""
    steps = [seconds for stage, seconds in stages.items() if is_step(stage)]
    return sum(steps) if steps else None


def other_seconds(stages: Mapping[str, float]) -> float:
    """Everything but text encoders, steps and decoder."""
    named = (TEXT_ENCODERS, DECODE, GENERATE)
    return sum(seconds for stage, seconds in stages.items() if stage not in named and not is_step(stage))


def _start(entry: Entry) -> str:
    return NONE if entry.start is None else f"{entry.start.seconds:.1f} s"


def _gigabytes(size: int | None) -> str:
    return NONE if size is None else f"{size / 1e9:.2f}"


def _sameness(row: Row) -> str:
    if row.sameness is None:
        return ""
    found = row.sameness
    return f"{found.verdict}, equal" if found.psnr is None else f"{found.verdict}, {found.psnr:.0f} dB"


COLUMNS = (
    _Column("median", lambda entry, row, summary, unit: unit.show(summary.median)),
    _Column("p95", lambda entry, row, summary, unit: unit.show(summary.p95), 112),
    _Column("min", lambda entry, row, summary, unit: unit.show(summary.minimum), 112),
    _Column("ratio", lambda entry, row, summary, unit: NONE if summary.ratio is None else f"{summary.ratio:.2f}"),
    _Column("text", lambda entry, row, summary, unit: unit.show(summary.stages.get(TEXT_ENCODERS)), 112),
    _Column("unet", lambda entry, row, summary, unit: unit.show(steps_seconds(summary.stages))),
    _Column("decode", lambda entry, row, summary, unit: unit.show(summary.stages.get(DECODE))),
    _Column("other", lambda entry, row, summary, unit: unit.show(other_seconds(summary.stages)), 112),
    _Column("peak", lambda entry, row, summary, unit: _gigabytes(entry.host_memory), 112),
    _Column("rest", lambda entry, row, summary, unit: _gigabytes(entry.resting_memory), 112),
    _Column("start", lambda entry, row, summary, unit: _start(entry), 112),
    _Column("image", lambda entry, row, summary, unit: _sameness(row)),
)


def _title(report: Report, comparison: StepsTable) -> str:
    images, steps = report.images, f"{comparison.steps} step{'s' if comparison.steps > 1 else ''}"
    size, unit = f"{images.width}x{images.height}", comparison_unit(comparison)
    made = f"{report.checkpoint}, {steps}, {size}, {images.rounds} rounds; times in {unit.name}"
    return f"{made}, on {_machine(report.host)}"


def _machine(host: Host) -> str:
    """A processor and its instruction sets."""
    sets = f", {' '.join(host.extensions)}" if host.extensions else ""
    return f"{host.cores} core{'s' if host.cores > 1 else ''} of {host.processor}{sets}"


def _empty_table(first: str) -> Table:
    """A table with narrow margins: the widest has 12 columns."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    return table


def _latency_table(report: Report, comparison: StepsTable, width: int) -> Table:
    """A row for each contender, the fastest first and failures last."""
    unit, table = comparison_unit(comparison), _empty_table("contender")
    columns = [column for column in COLUMNS if width >= column.from_width]
    for column in columns:
        table.add_column(column.heading, justify="left" if column.heading == "image" else "right", no_wrap=True)
    for row in sorted(comparison.rows, key=lambda row: row.summary.median if row.summary else float("inf")):
        entry, name = (
            report.entry(row.contender),
            Text(row.contender, "bold" if row.contender == report.baseline.name else ""),
        )
        if row.summary is None:
            table.add_row(name, "failed")
        else:
            summary = row.summary
            table.add_row(name, *(Text(column.show(entry, row, summary, unit)) for column in columns))
    return table


def _lines(report: Report) -> list[str]:
    """A line for each contender, and explanations of the columns."""
    lines, ours = [], report.baseline.name
    for entry in report.contenders:
        if entry.failure is not None:
            lines.append(f"{entry.name} failed: {entry.failure}")
        else:
            memory = "" if entry.mapped_memory is None else f"; {_gigabytes(entry.mapped_memory)} GB mapped at rest"
            memory += "" if entry.device_memory is None else f"; {_gigabytes(entry.device_memory)} GB of device memory"
            lines.append(f"{entry.name}: {entry.how}, {entry.precision} on {entry.device}{memory}")
    lines += [
        f"ratio: the median, over rounds, of its seconds divided by {ours}'s; image: compared with {ours}'s first one",
        "start: from the start of a process to its first image, imports and loading included",
        "peak: the largest resident size in GB (VmHWM), loading included; rest: that after the last image (VmRSS)",
        "peak and rest include resident pages of mapped weight files, which the system takes back when it needs memory",
        "every image has a prompt of its own: no cache of text embeddings helps",
    ]
    return [*lines, *report.notes]
