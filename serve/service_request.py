"""Requests to the service and their results: plain values that may go to another process."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from PIL import Image

from ..runtime.params import Params
from ..runtime.request import Request


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServiceRequest:
    """A request for images of one prompt.

    Attributes:
        model: the name of a served bundle.
        params: of all images: ``seed`` is a sequence of one seed for each image, ``num_images_per_prompt`` its length,
            ``control_image`` maps the ControlNets' names to RGB images of any size, or is None; ``image`` and
            ``mask_image`` are images of any size, or None.
        preprocess: how control images are preprocessed; None for each ControlNet's own way.
    """

    model: str
    params: Params
    preprocess: str | None = None

    @property
    def seeds(self) -> tuple[int, ...]:
        """One seed for each image."""
        seed = self.params.seed
        return (seed,) if isinstance(seed, int) else tuple(seed or ())


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratedImage:
    """A finished image.

    Attributes:
        request: the decided params of this image.
        metadata: the same as it is written into image files.
        timings: seconds by stage of the call that generated it, as the pipeline gives them.
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
