"""List the supported checkpoints with base and settings, and the ControlNets with known settings."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from ..export.checkpoints import Checkpoint

ROW_WIDTH = 200  # on any terminal, which breaks longer lines itself: names stay whole, to be copied


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This command has no options of its own."""


def run(args: argparse.Namespace) -> None:
    """Print the tables."""
    from ..export.checkpoints import CHECKPOINTS, DEMO_CHECKPOINTS, HYPER_SD_REPO
    from .console import out

    console = out()
    console.width = ROW_WIDTH
    console.print(f"Checkpoints of {HYPER_SD_REPO}; export one with `hypersd export --ckpt NAME`", markup=False)
    console.print(_table(CHECKPOINTS))
    console.print(
        "Demonstration checkpoints, small, in the clone (tests/assets/demo): nothing is downloaded", markup=False
    )
    console.print(_table(DEMO_CHECKPOINTS))
    console.print(
        "ControlNets with known settings; others of this architecture can be exported too: "
        "`hypersd export --controlnet WHERE`",
        markup=False,
    )
    console.print(_controlnet_table())


def _table(checkpoints: Iterable[Checkpoint]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("checkpoint", "base", "steps", "sampler", "timesteps", "eta", "guidance"):
        table.add_column(heading, no_wrap=True)
    for checkpoint in checkpoints:
        table.add_row(
            checkpoint.name,
            checkpoint.base,
            _steps(checkpoint),
            checkpoint.sampler,
            ", ".join(map(str, checkpoint.timesteps or ())) or "default",
            f"{checkpoint.eta:g}",
            f"{checkpoint.guidance_scale:g}" if checkpoint.is_guided else "none",
        )
    return table


def _controlnet_table() -> Table:
    from rich import box
    from rich.table import Table

    from ..export.controlnet_sources import KNOWN_CONTROLNETS
    from ..families import find_family

    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("ControlNet", "for", "scale", "preprocess"):
        table.add_column(heading, no_wrap=True)
    for known in KNOWN_CONTROLNETS:
        settings = known.settings
        table.add_row(
            known.location, find_family(known.family).title, f"{settings.conditioning_scale:g}", settings.preprocess
        )
    return table


def _steps(checkpoint: Checkpoint) -> str:
    first, last = min(checkpoint.allowed_steps), max(checkpoint.allowed_steps)
    return str(first) if first == last else f"{first} to {last}"
