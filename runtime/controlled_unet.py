"""The UNet, and the ControlNets that add to it (Zhang et al., https://arxiv.org/abs/2302.05543)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..engines import Engine, Manifest
from ..engines.component_names import RESIDUAL_INPUT, cond_embedding, controlnet, residual_input
from ..engines.zeroed_inputs import ZeroedInputs
from .batching import run_rows

PLAIN_UNET = "unet without residuals"  # beside the bundle's components


def with_plain_unet(engines: Mapping[str, Engine]) -> dict[str, Engine]:
    """The engines and, if the UNet takes residuals, the same UNet without them: what runs where no ControlNet does.

    It is fed zeros, which are made once for every shape: the UNet's cost is its own and that of the additions.
    """
    unet = engines["unet"]
    residuals = [name for name in unet.inputs if RESIDUAL_INPUT.fullmatch(name)]
    return {**engines, PLAIN_UNET: ZeroedInputs(unet, residuals)} if residuals else dict(engines)


class ControlledUnet:
    """The UNet and the bundle's ControlNets.

    Args:
        manifest: names the ControlNets.
        engines: the networks, and the UNet without residuals (:func:`with_plain_unet`).
    """

    def __init__(self, manifest: Manifest, engines: Mapping[str, Engine]) -> None:
        self._unet = engines["unet"]
        self._plain_unet = engines.get(PLAIN_UNET, self._unet)
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
    ) -> Tensor:
        """The UNet's output [B, 4, h, w]; it may be the engine's buffer.

        Args:
            feeds: the UNet's own inputs.
            active: the ControlNets whose residuals are added, all at once.
            embeddings: what :meth:`embed` returned, by name.
            scales: [1] float32 each, by name.
        """
        if not active:
            return run_rows(self._plain_unet, feeds)["out_sample"]
        total: dict[str, Tensor] = {}
        for name in active:
            own = {"cond_embedding": embeddings[name], "conditioning_scale": scales[name]}
            made = run_rows(self._controlnets[name], {**feeds, **own})
            total = {key: total[key] + residual for key, residual in made.items()} if total else dict(made)
        residuals = {residual_input(key): residual for key, residual in total.items()}
        return run_rows(self._unet, {**feeds, **residuals})["out_sample"]
