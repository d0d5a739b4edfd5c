"""A bundle's text encoders in optimum's pipelines; runs in an environment that need not have this package's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ...families import Family


def adapt_encoders(pipe: Any, family: Family, hidden_states: str) -> None:
    """Let a pipeline read a family's text encoders that compute only the layer in use.

    Args:
        pipe: a pipeline of diffusers' kind; such encoders in it are replaced.
        family: the bundle's.
        hidden_states: the name of the encoders' output of that layer.
    """
    for encoder in family.text_encoders:
        if encoder.hidden_layer is not None:
            setattr(pipe, encoder.component, _TextEncoder(getattr(pipe, encoder.component), hidden_states))


class _Encoded(NamedTuple):
    """A text encoder's outputs as SDXL's pipeline reads them: the pooled projection first, then the hidden states."""

    first: torch.Tensor
    hidden_states: tuple[torch.Tensor | None, ...]


class _TextEncoder:
    """A bundle's text encoder behind the interface of diffusers' pipeline."""

    def __init__(self, encoder: Any, hidden_states: str) -> None:
        self._encoder = encoder
        self._hidden_states = hidden_states

    def __call__(self, input_ids: torch.Tensor, output_hidden_states: bool | None = None) -> _Encoded:
        outputs: Mapping[str, torch.Tensor] = self._encoder(input_ids)
        hidden_states = outputs[self._hidden_states]
        return _Encoded(outputs.get("text_embeds", hidden_states), (hidden_states, None))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)
