"""Contenders draw in turns; one draws at a time and the others sleep."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ...engines.progress import Stage
from .drawing import Settings
from .entrant import Entrant
from .figures import round_order
from .report import Sample


@dataclasses.dataclass
class Taken:
    """What a contender drew at one number of steps.

    Attributes:
        warmup: seconds of the images that do not count.
        samples: one a round.
        pixels: of the first image, uint8 [H, W, 3]; None if it drew none.
    """

    warmup: list[float] = dataclasses.field(default_factory=list)
    samples: list[Sample] = dataclasses.field(default_factory=list)
    pixels: np.ndarray | None = None


def take_turns(
    entrants: Sequence[Entrant],
    image: Callable[[int], Settings],
    rounds: int,
    warmup: int,
    folder: Path,
    stage: Stage,
) -> dict[str, Taken]:
    """Draw ``warmup`` images and then ``rounds`` images with each, all the same ones.

    Args:
        entrants: those that have started; one that fails is left out from then on.
        image: the image of a number, from 0 on.
        rounds: images that count.
        warmup: images before them, one or more; the first is kept.
        folder: for that image's pixels, on their way here.
        stage: told which round of how many runs.
    """
    taken = {entrant.name: Taken() for entrant in entrants}
    by_name = {entrant.name: entrant for entrant in entrants}
    for i in range(warmup):
        for entrant in entrants:
            stage.progress.update(i / (warmup + rounds), f"warm-up: {entrant.name}")
            _warm_up(entrant, image(i), taken[entrant.name], folder)
    for i in range(rounds):
        for name in round_order(list(by_name), i):
            stage.progress.update((warmup + i) / (warmup + rounds), f"round {i + 1} of {rounds}: {name}")
            if (sample := by_name[name].draw(image(warmup + i))) is not None:
                taken[name].samples.append(sample)
    return taken


def _warm_up(entrant: Entrant, settings: Settings, taken: Taken, folder: Path) -> None:
    """An image that does not count; the first one's pixels are kept."""
    file = folder / f"{entrant.name}.npy" if taken.pixels is None else None
    sample = entrant.draw(settings, file)
    if sample is None:
        return
    taken.warmup.append(sample.seconds)
    if file is not None:
        taken.pixels = np.load(file)
        file.unlink()
