"""One call on its way to the engines: its request with the tensors and generators that belong to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from ..samplers import Plan
from ..samplers.noise import Generators
from .adapters import PackedSlot
from .clock import Clock
from .request import GenerationSettings, Request
from .text import TokenizedTexts


@dataclasses.dataclass(frozen=True)
class Call:
    """One call, checked and tokenized.

    Attributes:
        request: every decision.
        plan: the steps that run.
        settings: the operations that make the images.
        tokenized: the prompts, after the negative ones if they are encoded.
        images: images on the host, one or as many as prompts of each, by the name of the image function's input:
            control images [N, 3, H, W] in 0..1, an init image and a mask (:mod:`.starts`).
        generator: the source of the noise.
        latents: the caller's own noise; None for the generator's.
        slot: the LoRAs.
        clock: times the stages.
    """

    request: Request
    plan: Plan
    settings: GenerationSettings
    tokenized: TokenizedTexts
    images: Mapping[str, Tensor]
    generator: Generators
    latents: Tensor | None
    slot: PackedSlot
    clock: Clock
