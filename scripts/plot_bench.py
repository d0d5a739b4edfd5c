#!/usr/bin/env python
"""Plot a report of `hypersd bench --json` as stacked bars, with a panel for each number of steps.

python scripts/plot_bench.py report.json latency.png
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hypersd.tools.bench.protocol import DECODE, GENERATE, TEXT_ENCODERS
from hypersd.tools.bench.report import Report, Row, StepsTable, decode
from hypersd.tools.bench.table import TimeUnit, comparison_unit, other_seconds, steps_seconds

UNET, OTHER = "UNet steps", "other"
COLORS = {TEXT_ENCODERS: "#e0a030", UNET: "#3b6fb6", DECODE: "#57a773", GENERATE: "#7a5ca8", OTHER: "#b0b0b0"}
BAR, MARGIN, WIDTH = 0.42, 1.25, 9.0  # inches: height of a bar's row, a panel's margin, a panel's width


def plot_report(report: Report, path: Path) -> None:
    """Write the bars as a PNG.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heights = [BAR * len(_bars(comparison, comparison_unit(comparison))) + MARGIN for comparison in report.comparisons]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, comparison in zip(panels, report.comparisons, strict=True):
        _plot_panel(axes, comparison)
    images = report.images
    figure.suptitle(f"{report.checkpoint}, {images.width}x{images.height}, {report.host.processor}", fontsize=10)
    figure.legend(*_legend(panels), loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    figure.savefig(path, dpi=150, format="png")


def _bars(comparison: StepsTable, unit: TimeUnit) -> list[tuple[str, dict[str, float], str]]:
    """Name, seconds by part and label of each bar; the slowest first, as bars grow upwards."""
    rows = [row for row in comparison.rows if row.summary is not None]
    rows.sort(key=lambda row: row.summary.median if row.summary else 0.0, reverse=True)
    bars = [(row.contender, _parts(row), _words(row, unit)) for row in rows]
    return bars


def _parts(row: Row) -> dict[str, float]:
    """The stages' medians, scaled together so that the bar is as long as the median of the whole."""
    assert row.summary is not None
    stages = row.summary.stages
    scale = row.summary.median / sum(stages.values())
    parts = {
        TEXT_ENCODERS: stages.get(TEXT_ENCODERS),
        UNET: steps_seconds(stages),
        DECODE: stages.get(DECODE),
        GENERATE: stages.get(GENERATE),
        OTHER: other_seconds(stages),
    }
    return {name: seconds * scale for name, seconds in parts.items() if seconds is not None}


def _words(row: Row, unit: TimeUnit) -> str:
    assert row.summary is not None
    words = unit.show(row.summary.median)
    if row.sameness is not None and row.sameness.verdict == "other":
        words += ", other image"
    return words


def _plot_panel(axes: Any, comparison: StepsTable) -> None:
    """The bars of one number of steps."""
    unit = comparison_unit(comparison)
    bars, ours = _bars(comparison, unit), comparison.rows[0].contender
    longest = max((sum(parts.values()) for _, parts, _ in bars), default=1.0) * unit.scale
    for y, (_, parts, words) in enumerate(bars):
        left = 0.0
        for part, seconds in parts.items():
            axes.barh(y, seconds * unit.scale, left=left, height=0.7, label=part, color=COLORS[part])
            left += seconds * unit.scale
        axes.text(left + longest * 0.01, y, words, va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), [name for name, _, _ in bars], fontsize=9)
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() == ours else "normal")
    axes.set_xlim(0, longest * 1.35)  # room for the words
    axes.set_xlabel(f"{unit.name} an image, median", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_title(f"{comparison.steps} step{'s' if comparison.steps > 1 else ''}", fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)


def _legend(panels: Any) -> tuple[list[Any], list[str]]:
    """Each part once."""
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


if __name__ == "__main__":
    plot_report(decode(Path(sys.argv[1]).read_bytes()), Path(sys.argv[2]))
