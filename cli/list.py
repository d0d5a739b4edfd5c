"""Every checkpoint that hypersd knows, with its base and settings."""

from __future__ import annotations

import argparse

ROW_WIDTH = 200  # whatever the terminal's, which breaks longer lines: names stay whole, to be copied


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None but the common ones."""


def run(args: argparse.Namespace) -> None:
    """Print the table."""
    from rich import box
    from rich.table import Table

    from ..export.checkpoints import CHECKPOINTS, HYPER_SD_REPO, Checkpoint
    from .console import out

    def steps(checkpoint: Checkpoint) -> str:
        first, last = min(checkpoint.allowed_steps), max(checkpoint.allowed_steps)
        return str(first) if first == last else f"{first} to {last}"

    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("checkpoint", "base", "steps", "sampler", "timesteps", "eta", "guidance"):
        table.add_column(heading, no_wrap=True)
    for checkpoint in CHECKPOINTS:
        table.add_row(
            checkpoint.name,
            checkpoint.base,
            steps(checkpoint),
            checkpoint.sampler,
            ", ".join(map(str, checkpoint.timesteps or ())) or "its own",
            f"{checkpoint.eta:g}",
            f"{checkpoint.guidance_scale:g}" if checkpoint.is_guided else "none",
        )
    console = out()
    console.width = ROW_WIDTH
    console.print(f"Checkpoints of {HYPER_SD_REPO}; export one with `hypersd export --ckpt NAME`", markup=False)
    console.print(table)
