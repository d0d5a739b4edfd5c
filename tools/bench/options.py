"""What to measure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What to measure; what is None is the bundle's.

    Attributes:
        contenders: their names; empty for all that can run here.
        steps: numbers of steps; empty for the bundle's.
        height: in pixels.
        width: in pixels.
        eta: 0..1, stochasticity.
        rounds: images that count, of each contender.
        warmup: images before them that do not count; None for one, and three on a GPU.
        device: ``"auto"``, ``"cpu"`` or a CUDA device.
        pythons: interpreters of contenders that live in another environment, by the contender's name.
    """

    contenders: Sequence[str] = ()
    steps: Sequence[int] = ()
    height: int | None = None
    width: int | None = None
    eta: float | None = None
    rounds: int = 5
    warmup: int | None = None
    prompt: str = "a photo of a cat"
    seed: int = 0
    device: str = "auto"
    pythons: Mapping[str, str] = dataclasses.field(default_factory=dict)
