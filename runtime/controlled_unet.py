"""The UNet, and the ControlNets that add to it (Zhang et al., https://arxiv.org/abs/2302.05543)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..engines import Engine, Manifest
from ..engines.component_names import RESIDUAL_INPUT, cond_embedding, controlnet, residual_input
from ..engines.lora_slot import LORA
from ..engines.zeroed_inputs import ZeroedInputs
from .batching import run_rows


def without_residuals(unet: Engine) -> Engine | None:
    """The UNet where no ControlNet acts: its residuals are zeros, made once for every shape. None if it takes none."""
    residuals = [name for name in unet.inputs if RESIDUAL_INPUT.fullmatch(name)]
    return ZeroedInputs(unet, residuals) if residuals else None


class ControlledUnet:
    """The UNet and the bundle's ControlNets.

    Args:
        manifest: names the ControlNets.
        engines: the components by name.
        plain_unet: runs where no ControlNet acts (:func:`without_residuals`); None if that is the UNet itself.
    """

    def __init__(self, manifest: Manifest, engines: Mapping[str, Engine], plain_unet: Engine | None) -> None:
        self._unet = engines["unet"]
        self._plain_unet = plain_unet or self._unet
        self._controlnets = {name: engines[controlnet(name)] for name in manifest.controlnets}
        self._embeddings = {name: engines[cond_embedding(name)] for name in manifest.controlnets}

    def embed(self, name: str, condition: Tensor, rows: int, is_guided: bool) -> Tensor:
        """A ControlNet's embedding of its images, once for all steps.

        Args:
            name: the ControlNet's.
            condition: [N, 3, H, W] in 0..1, one for all images or one for each prompt.
            rows: images.
            is_guided: whether the UNet is run on each image twice.

        Returns:
            [B, C, h, w], a row for each of the UNet's; a copy, which a call inside this one's callback leaves alone.
        """
        embedding = run_rows(self._embeddings[name], {"controlnet_cond": condition})["cond_embedding"]
        embedding = embedding.repeat_interleave(rows // len(embedding), dim=0)
        return torch.cat([embedding, embedding]) if is_guided else embedding

    def run(
        self,
        feeds: Mapping[str, Tensor],
        active: Sequence[str],
        embeddings: Mapping[str, Tensor],
        scales: Mapping[str, Tensor],
        extra_channels: Tensor | None = None,
        lora: Tensor | None = None,
    ) -> Tensor:
        """The UNet's output [B, 4, h, w]; it may be the engine's buffer.

        Args:
            feeds: the UNet's own inputs.
            active: the ControlNets whose residuals are added, all at once.
            embeddings: the results of :meth:`embed`, by name.
            scales: [1] float32 each, by name.
            extra_channels: [B, C, h, w], which an inpainting UNet takes after those of the sample, and ControlNets do
                not take.
            lora: the contents of the UNet's LoRA slot, if it has one.
        """
        unet_feeds = dict(feeds) if lora is None else {**feeds, LORA: lora}
        if extra_channels is not None:
            unet_feeds["sample"] = torch.cat([feeds["sample"], extra_channels], dim=1)
        if not active:
            return run_rows(self._plain_unet, unet_feeds)["out_sample"]
        total: dict[str, Tensor] = {}
        for name in active:
            own = {"cond_embedding": embeddings[name], "conditioning_scale": scales[name]}
            made = run_rows(self._controlnets[name], {**feeds, **own})
            total = {key: total[key] + residual for key, residual in made.items()} if total else dict(made)
        residuals = {residual_input(key): residual for key, residual in total.items()}
        return run_rows(self._unet, {**unet_feeds, **residuals})["out_sample"]
