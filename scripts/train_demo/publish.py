"""Writes the results of the training into the repository: weights, figures, model cards and loss curves."""

from __future__ import annotations

import json
import math
from pathlib import Path

from .assets import write_assets
from .cards import write_cards
from .evaluate import Row, evaluate, rows
from .judge import PARTS, Scores
from .style_assets import write_style_figures, write_styles

LOSSES = Path(__file__).parents[2] / "docs/demo-losses.png"


def publish(folder: Path, work: Path) -> None:
    """Write all of it; scoring every row takes minutes."""
    write_assets(work, folder)
    write_figures(folder)
    write_cards(folder)
    plot_losses(work, LOSSES)


def publish_styles(folder: Path, work: Path) -> None:
    """Write the style LoRAs, which were trained on what the folder has, their figures and their card."""
    write_styles(work, folder)
    write_style_figures(folder)
    write_cards(folder)


def write_figures(folder: Path) -> None:
    """Score every row: ``figures.json``, shares from 0 to 1."""
    figures = {}
    for row in rows():
        figures[row.name] = as_figures(row, evaluate(row, folder))
        print(f"{row.name}: {figures[row.name]}", flush=True)
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")


def as_figures(row: Row, scores: Scores) -> dict[str, object]:
    shares = {part: round(getattr(scores, part), 4) for part in PARTS}
    return {**shares, "control": row.control} if row.control else shares


def plot_losses(work: Path, file: Path) -> None:
    """One curve a stage, smoothed, both axes logarithmic."""
    import matplotlib
    import torch

    matplotlib.use("Agg")
    from matplotlib import pyplot

    states = sorted(work.glob("*.state.pt"))
    columns = min(4, len(states))
    rows_of_plots = math.ceil(len(states) / columns)
    figure, axes = pyplot.subplots(rows_of_plots, columns, figsize=(3 * columns, 2.2 * rows_of_plots), squeeze=False)
    for axis in axes.flat[len(states) :]:
        axis.set_visible(False)
    for axis, state in zip(axes.flat, states, strict=False):
        losses = torch.tensor(torch.load(state, weights_only=True)["losses"])
        window = max(1, len(losses) // 50)
        smooth = losses.unfold(0, window, 1).mean(1)
        axis.loglog(range(window, len(losses) + 1), smooth, linewidth=1)
        axis.set_title(state.name.removesuffix(".state.pt"), fontsize=9)
        axis.tick_params(labelsize=6, which="both")
    figure.supxlabel("optimizer steps", fontsize=9)
    figure.supylabel("loss", fontsize=9)
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    pyplot.close(figure)
