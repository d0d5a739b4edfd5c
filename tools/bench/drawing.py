"""What a contender is asked for and what it gives: shared with worker processes of any environment, so no imports."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

TOKENS = "tokens"
TEXT_ENCODERS = "text encoders"
DRAW = "draw"  # what a CUDA graph does in one go: text encoders, steps and decoder
DECODE = "decode"
CONVERSION = "conversion"  # to 8 bits, to the host, to PIL
OTHER = "other"  # what is left of the whole


def step_name(i: int) -> str:
    """The stage of step ``i``, from 1 on: the UNet and the scheduler's arithmetic."""
    return f"step {i}"


def is_step(stage: str) -> bool:
    """Whether a stage is one of the steps."""
    return stage.startswith("step ")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """One image, everything decided; names and meaning are diffusers'.

    Attributes:
        num_inference_steps: None with ``timesteps``, and the other way round.
        timesteps: custom ones.
    """

    prompt: str
    seed: int
    num_inference_steps: int | None
    timesteps: Sequence[int] | None
    eta: float
    guidance_scale: float
    height: int
    width: int

    @property
    def schedule(self) -> dict[str, Any]:
        """Whichever of diffusers' two arguments says how many steps there are."""
        if self.timesteps is not None:
            return {"timesteps": list(self.timesteps)}
        return {"num_inference_steps": self.num_inference_steps}


@dataclasses.dataclass(frozen=True)
class Drawn:
    """An image and what it took.

    Attributes:
        pixels: uint8 [H, W, 3], a numpy array.
        seconds: from the call to the finished image.
        stages: seconds by stage, without what is left over.
    """

    pixels: Any
    seconds: float
    stages: Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """What a contender says of itself once it is loaded.

    Attributes:
        precision: what its networks compute in: ``fp32``, ``fp16`` or ``bf16``.
        device: ``cpu``, or a CUDA device with its name.
        how: what runs, in a few words.
        packages: the distributions whose versions matter.
    """

    precision: str
    device: str
    how: str
    packages: tuple[str, ...]


class Drawer(Protocol):
    """A contender in its own process. What it takes to find its files belongs into ``__init__`` and is not timed."""

    def load(self) -> Facts:
        """Make everything ready to draw."""
        ...

    def draw(self, settings: Settings) -> Drawn:
        """Draw one image."""
        ...
