"""The parts of a whole model in one file, in the original Stable Diffusion's key names.

diffusers' own converters do the renaming. They run on stand-ins that note what is to be done with a stored tensor, so
that names and shapes are known from the header and no more than one tensor is in memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXT_ENCODERS = {
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0."),
    "text_encoder_2": ("conditioner.embedders.1.",),
}


@dataclasses.dataclass(frozen=True)
class Planned:
    """A stored tensor, to be read later, and the steps that make a module's tensor of it.

    Attributes:
        source: its name in the file.
        like: the result on the meta device.
        steps: from the stored tensor to the result.
    """

    source: str
    like: Tensor
    steps: tuple[Callable[[Tensor], Tensor], ...] = ()

    @classmethod
    def stored(cls, source: str, shape: tuple[int, ...]) -> Planned:
        """The stored tensor itself."""
        return cls(source, torch.empty(shape, device="meta"))

    @property
    def shape(self) -> torch.Size:
        return self.like.shape

    @property
    def ndim(self) -> int:
        return self.like.ndim

    @property
    def T(self) -> Planned:  # noqa: N802
        return self._then(lambda tensor: tensor.T)

    def __getitem__(self, index: Any) -> Planned:
        return self._then(lambda tensor: tensor[index])

    def contiguous(self) -> Planned:
        """Itself: tensors become contiguous when they are stored in a module; the same holds for the next two."""
        return self

    clone = detach = contiguous

    def _then(self, step: Callable[[Tensor], Tensor]) -> Planned:
        return Planned(self.source, step(self.like), (*self.steps, step))


Plan = dict[str, Planned]


def prefixes(part: str) -> tuple[str, ...]:
    """The beginnings of a part's key names."""
    return TEXT_ENCODERS.get(part) or ((UNET,) if part == "unet" else (VAE,))


def convert(part: str, stored: Mapping[str, Planned], config: Mapping[str, Any]) -> Plan:
    """The part's tensors under diffusers' and transformers' names.

    Args:
        part: ``unet``, ``vae``, ``text_encoder`` or ``text_encoder_2``.
        stored: the tensors of the file that begin with the part's :func:`prefixes`.
        config: the part's configuration.

    Raises:
        Exception: of any kind, where the converter expects a tensor that is not there.
    """
    from diffusers.loaders import single_file_utils as diffusers

    if part == "unet":
        converted = diffusers.convert_ldm_unet_checkpoint(dict(stored), dict(config))
    elif part == "vae":
        converted = diffusers.convert_ldm_vae_checkpoint(dict(stored), dict(config))
    elif any(name.startswith("conditioner.embedders.1.") for name in stored):
        prefix = "conditioner.embedders.1.model."
        converted = diffusers.convert_open_clip_checkpoint(_NoFallback(), dict(stored), prefix=prefix)
    else:
        converted = diffusers.convert_ldm_clip_checkpoint(dict(stored))
    return {name: planned for name, planned in converted.items() if planned is not None}


class _NoFallback:
    """A model without a width of its own: the converter then takes it from the stored projection."""

    config = None
