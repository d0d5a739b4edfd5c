"""Values that pass between the bench and a contender's process. It imports nothing: any environment can load it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

TOKENS = "tokens"
TEXT_ENCODERS = "text encoders"
GENERATE = "generate"  # a CUDA graph of the whole image: text encoders, steps and decoder
DECODE = "decode"
CONVERSION = "conversion"  # to 8 bits, to the host, to PIL
OTHER = "other"  # the rest of the whole


def step_name(i: int) -> str:
    """The stage of step ``i``, from 1 on: the UNet and the scheduler's arithmetic."""
    return f"step {i}"


def is_step(stage: str) -> bool:
    """Whether a stage is one of the steps."""
    return stage.startswith("step ")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """One image with every decision made; names and meaning are diffusers'.

    Attributes:
        num_inference_steps: None with ``timesteps``, and the other way round.
        timesteps: custom ones.
        noise: a file with the seed's noise, for a contender that draws other numbers: float32 [draws, 1, C, h, w], the
            latents and then a draw for each step, in numpy's format.
    """

    prompt: str
    seed: int
    num_inference_steps: int | None
    timesteps: Sequence[int] | None
    eta: float
    guidance_scale: float
    height: int
    width: int
    noise: str | None = None

    @property
    def schedule(self) -> dict[str, Any]:
        """Diffusers' argument for the steps: their number or custom timesteps."""
        if self.timesteps is not None:
            return {"timesteps": list(self.timesteps)}
        return {"num_inference_steps": self.num_inference_steps}


@dataclasses.dataclass(frozen=True)
class TimedImage:
    """An image and its timings.

    Attributes:
        pixels: uint8 [H, W, 3], a numpy array.
        seconds: from the call to the finished image.
        stages: seconds by stage, without the rest.
    """

    pixels: Any
    seconds: float
    stages: Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """Facts about a contender that are known once it is loaded.

    Attributes:
        precision: of the components' computations: ``fp32``, ``fp16`` or ``bf16``; ``int8`` of an int8 bundle on ONNX
            Runtime or TensorRT.
        device: ``cpu``, or a CUDA device with its name.
        how: the backend, in a few words.
        packages: the distributions whose versions are reported.
    """

    precision: str
    device: str
    how: str
    packages: tuple[str, ...]


class Runner(Protocol):
    """A contender in its own process. ``__init__`` finds its files and is not timed."""

    def load(self) -> Facts:
        """Prepare everything for generation."""
        ...

    def generate(self, settings: Settings) -> TimedImage:
        """Generate one image."""
        ...


def resolve_device(device: str) -> Any:
    """The ``torch.device`` of a name; ``"auto"`` is the first CUDA device if there is one, else the CPU.

    Raises:
        UserError: this machine has no such device.
    """
    import torch

    from ...engines.cuda.device import find_device

    if device != "auto":
        return find_device(device)
    return find_device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: Any) -> str:
    """``cpu``, or a CUDA device with its name."""
    import torch

    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
