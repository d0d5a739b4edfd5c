"""The report as stacked bars: a bar a contender, its parts the stages, a panel for each number of steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .drawing import DECODE, DRAW, TEXT_ENCODERS
from .figures import TOTAL
from .report import Comparison, Report, Row
from .table import TimeUnit, comparison_unit, other_seconds, steps_seconds

UNET, OTHER = "UNet steps", "other"
COLORS = {TEXT_ENCODERS: "#e0a030", UNET: "#3b6fb6", DECODE: "#57a773", DRAW: "#7a5ca8", OTHER: "#b0b0b0"}
FLOOR = "floor"
BAR, MARGIN, WIDTH = 0.42, 1.25, 9.0  # inches: a bar's row, what a panel needs besides, a panel's width


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
        _draw_panel(axes, comparison)
    drawing = report.drawing
    figure.suptitle(f"{report.checkpoint}, {drawing.width}x{drawing.height}, {report.machine.processor}", fontsize=10)
    figure.legend(*_legend(panels), loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    figure.savefig(path, dpi=150, format="png")


def _bars(comparison: Comparison, unit: TimeUnit) -> list[tuple[str, dict[str, float], str]]:
    """Name, seconds by part, and what is written at the end of each bar; the slowest first, as bars grow upwards."""
    rows = [row for row in comparison.rows if row.summary is not None]
    rows.sort(key=lambda row: row.summary.median if row.summary else 0.0, reverse=True)
    bars = [(row.contender, _parts(row), _words(row, unit)) for row in rows]
    for precision, floor in comparison.floors.items():
        if total := sum(floor.values()):
            bars.append((f"{FLOOR}, {precision}", {FLOOR: total}, unit.show(total)))
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
        DRAW: stages.get(DRAW),
        OTHER: other_seconds(stages),
    }
    return {name: seconds * scale for name, seconds in parts.items() if seconds is not None}


def _words(row: Row, unit: TimeUnit) -> str:
    assert row.summary is not None
    times = row.summary.floors.get(TOTAL)
    words = unit.show(row.summary.median)
    if times is not None:
        words += f", {times:.1f} x floor"
    if row.sameness is not None and row.sameness.verdict == "other":
        words += ", other image"
    return words


def _draw_panel(axes: Any, comparison: Comparison) -> None:
    """The bars of one number of steps."""
    unit = comparison_unit(comparison)
    bars, ours = _bars(comparison, unit), comparison.rows[0].contender
    longest = max((sum(parts.values()) for _, parts, _ in bars), default=1.0) * unit.scale
    for y, (_, parts, words) in enumerate(bars):
        left = 0.0
        for part, seconds in parts.items():
            style = (
                {"color": COLORS[part]} if part != FLOOR else {"color": "white", "edgecolor": "black", "hatch": "///"}
            )
            axes.barh(y, seconds * unit.scale, left=left, height=0.7, label=part, **style)
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
