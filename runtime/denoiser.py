"""The UNet under one call's conditioning."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..engines.lora_slot import LORA
from ..samplers import Plan
from .controlled_unet import ControlledUnet
from .request import GenerationSettings
from .text import TextEmbeddings


class Denoiser:
    """The UNet under one call's conditioning, with classifier-free guidance if the call asks for it.

    ``feeds`` are inputs of the UNet and of the ControlNets that stay the same from step to step; a callback may
    replace them.
    """

    def __init__(
        self,
        unet: ControlledUnet,
        embeddings: TextEmbeddings,
        controls: Mapping[str, Tensor],
        extra_channels: Tensor | None,
        settings: GenerationSettings,
        plan: Plan,
        inputs: Mapping[str, Tensor],
    ) -> None:
        self.unet = unet
        self.settings = settings
        self.controls = controls
        self.extra_channels = extra_channels
        if extra_channels is not None and settings.is_guided:
            self.extra_channels = torch.cat([extra_channels, extra_channels])
        self.steps = {step.t: i for i, step in enumerate(plan)}
        self.timesteps = inputs["timesteps"]
        self.scales = {name: inputs["conditioning_scales"][i, :1] for i, name in enumerate(settings.controlnets)}
        self.lora = inputs.get(LORA)
        self.feeds: dict[str, Tensor] = {"encoder_hidden_states": embeddings.hidden_states}
        if embeddings.text_embeds is not None and "time_ids" in inputs:
            self.feeds["text_embeds"] = embeddings.text_embeds
            self.feeds["time_ids"] = inputs["time_ids"]

    def __call__(self, sample: Tensor, t: int) -> Tensor:
        """The UNet's output [B, 4, h, w] at timestep ``t``; it may be the engine's buffer."""
        rows = torch.cat([sample, sample]) if self.settings.is_guided else sample.contiguous()
        step = self.steps[t]
        feeds = {"sample": rows, "timestep": self.timesteps[step, :1], **self.feeds}
        active, own = self.settings.controls[step], (self.extra_channels, self.lora)
        output = self.unet.run(feeds, active, self.controls, self.scales, *own)
        if not self.settings.is_guided:
            return output
        negative, positive = output.chunk(2)
        return negative + self.settings.guidance_scale * (positive - negative)
