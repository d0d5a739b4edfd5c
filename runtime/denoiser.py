"""The UNet under one call's conditioning."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..engines.lora_slot import LORA
from ..samplers.step import as_number
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
        inputs: Mapping[str, Tensor],
    ) -> None:
        self.unet = unet
        self.settings = settings
        self.controls = controls
        self.extra_channels = extra_channels
        if extra_channels is not None and settings.is_guided:
            self.extra_channels = torch.cat([extra_channels, extra_channels])
        self.guidance_scale = inputs.get("guidance_scale")
        self.scales = {name: inputs["conditioning_scales"][i, :1] for i, name in enumerate(settings.controlnets)}
        self.lora = inputs.get(LORA)
        self.feeds: dict[str, Tensor] = {"encoder_hidden_states": embeddings.hidden_states}
        if embeddings.text_embeds is not None and "time_ids" in inputs:
            self.feeds["text_embeds"] = embeddings.text_embeds
            self.feeds["time_ids"] = inputs["time_ids"].repeat(len(embeddings.text_embeds), 1)
        self._active = iter(settings.controls)

    def __call__(self, sample: Tensor, t: Tensor) -> Tensor:
        """The UNet's output [B, 4, h, w] at timestep ``t`` [1]; it may be the engine's buffer.

        Call it once for each step, in their order.
        """
        rows = torch.cat([sample, sample]) if self.settings.is_guided else sample.contiguous()
        feeds = {"sample": rows, "timestep": t, **self.feeds}
        own = self.extra_channels, self.lora
        output = self.unet.run(feeds, next(self._active), self.controls, self.scales, *own)
        if self.guidance_scale is None:
            return output
        negative, positive = output.chunk(2)
        difference = positive - negative
        return negative + (difference * as_number(self.guidance_scale)).to(difference.dtype)
