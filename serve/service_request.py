"""What a request asks to be drawn, and what was drawn: plain values that may go to another process."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from PIL import Image

from ..runtime.request import Request


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawSettings:
    """How to draw, apart from prompt, seed and control images. None leaves it to the bundle.

    Names and meaning are those of :meth:`hypersd.runtime.Pipeline.__call__`, units too.
    """

    num_inference_steps: int | None = None
    eta: float | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    controlnet_conditioning_scale: float | None = None
    control_guidance_start: float | None = None
    control_guidance_end: float | None = None

    def arguments(self) -> dict[str, Any]:
        """The pipeline's arguments."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlSettings:
    """What is made of the control images before they are followed; None leaves it to the ControlNet."""

    preprocess: str | None = None
    resize_mode: str = "crop"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServiceRequest:
    """Images of one prompt, one for each seed.

    Attributes:
        model: the name of a bundle that is served.
        control: control images in RGB, of any size, by the ControlNet's name.
    """

    model: str
    prompt: str
    seeds: tuple[int, ...]
    negative_prompt: str | None = None
    settings: DrawSettings = DrawSettings()
    control: Mapping[str, Image.Image] = dataclasses.field(default_factory=dict)
    control_settings: ControlSettings = ControlSettings()


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratedImage:
    """A finished image.

    Attributes:
        request: what was drawn, everything decided.
        metadata: the same as it is written into image files.
        timings: seconds by stage of the call that drew it, as the pipeline gives them.
        waited: seconds in the queue.
        batch: images of that call, this one included.
    """

    image: Image.Image
    seed: int
    request: Request
    metadata: Mapping[str, Any]
    timings: Mapping[str, float]
    waited: float
    batch: int
