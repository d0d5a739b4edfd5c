"""The parts of a whole model in one file, in the original Stable Diffusion's key names.

diffusers' own converters do the renaming. They run on stand-ins that note what is to be done with a stored tensor, so
that names and shapes are known from the header and no more than one tensor is in memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

# Beginnings of a part's key names; an empty one is that of a file which holds nothing else.
PREFIXES = {
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.", "vae.", ""),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0."),
    "text_encoder_2": ("conditioner.embedders.1.",),
    "controlnet": ("control_model.", ""),
}
# Key names that tell which component a file holds in its own key names.
MARKS = {"vae": ("decoder.conv_in.weight",), "controlnet": ("time_embed.0.weight", "time_embedding.linear_1.weight")}
DIFFUSERS_MARKS = ("decoder.mid_block.resnets.0.conv1.weight", "time_embedding.linear_1.weight")


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


def prefix(part: str, names: Collection[str]) -> str | None:
    """The beginning of a part's key names in a file; None if the file does not hold the part.

    Args:
        part: ``unet``, ``vae``, ``text_encoder``, ``text_encoder_2`` or ``controlnet/NAME``.
        names: all names in the file.
    """
    kind = part.partition("/")[0]
    for beginning in PREFIXES[kind]:
        marks = MARKS.get(kind, ()) if not beginning else (beginning,)
        if any(name.startswith(mark) for mark in marks for name in names):
            return beginning
    return None


def convert(part: str, beginning: str, stored: Mapping[str, Planned], config: Mapping[str, Any]) -> Plan:
    """The part's tensors under diffusers' and transformers' names, which they may have already.

    Args:
        part: as of :func:`prefix`.
        beginning: :func:`prefix` of the file.
        stored: the tensors that begin with it.
        config: the part's configuration.

    Raises:
        Exception: of any kind, where the converter expects a tensor that is not there.
    """
    from diffusers.loaders import single_file_utils as diffusers

    tensors, settings = dict(stored), dict(config)
    if any(f"{beginning}{mark}" in tensors for mark in DIFFUSERS_MARKS):
        return {name.removeprefix(beginning): planned for name, planned in tensors.items()}
    if part == "unet":
        converted = diffusers.convert_ldm_unet_checkpoint(tensors, settings)
    elif part == "vae":
        converted = diffusers.convert_ldm_vae_checkpoint(tensors, settings)
    elif part == "text_encoder":
        converted = diffusers.convert_ldm_clip_checkpoint(tensors)
    elif part == "text_encoder_2":
        converted = diffusers.convert_open_clip_checkpoint(_NoFallback(), tensors, prefix=f"{beginning}model.")
    else:
        converted = diffusers.convert_controlnet_checkpoint(tensors, settings)
    return {name: planned for name, planned in converted.items() if planned is not None}


class _NoFallback:
    """A model without a width of its own: the converter then takes it from the stored projection."""

    config = None
