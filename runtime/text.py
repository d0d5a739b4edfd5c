"""From prompts to what the UNet is conditioned on, without transformers."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..engines import Engine
from ..errors import BundleError
from .batching import run_rows

ENCODERS = {"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"}


class TruncationWarning(UserWarning):
    """A prompt was longer than CLIP can take."""


class ClipTokenizer:
    """Text to 77 token ids, begin and end tokens included, padded as the bundle's ``tokenizer.json`` says."""

    def __init__(self, path: Path) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise BundleError(f"{path} is not a tokenizer ({error}): export the bundle again") from error

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Token ids [B, 77], int64. Warns of text that is cut off, and names it."""
        encodings = self._tokenizer.encode_batch(list(texts))
        for encoding in encodings:
            if encoding.overflowing:
                ids = [i for part in encoding.overflowing for i in part.ids]
                self._warn(self._tokenizer.decode(ids, skip_special_tokens=True), len(encoding.ids))
        return torch.tensor([encoding.ids for encoding in encodings], dtype=torch.int64)

    @staticmethod
    def _warn(cut: str, limit: int) -> None:
        shown = cut if len(cut) <= 200 else f"{cut[:200]}…"
        warnings.warn(
            f"the prompt is longer than the {limit} tokens that CLIP takes; cut off: {shown!r}",
            TruncationWarning,
            stacklevel=6,
        )


@dataclasses.dataclass(frozen=True)
class TextEmbeddings:
    """What the UNet is conditioned on.

    Attributes:
        hidden_states: [B, 77, C], both encoders' side by side for SDXL.
        text_embeds: [B, P], the pooled projection of SDXL's second encoder; None for SD1.5.
    """

    hidden_states: Tensor
    text_embeds: Tensor | None

    def map(self, change) -> TextEmbeddings:
        """Both tensors changed in the same way."""
        return TextEmbeddings(
            change(self.hidden_states), None if self.text_embeds is None else change(self.text_embeds)
        )

    def cat(self, other: TextEmbeddings) -> TextEmbeddings:
        """These rows, then the other's."""
        pooled = None
        if self.text_embeds is not None and other.text_embeds is not None:
            pooled = torch.cat([self.text_embeds, other.text_embeds])
        return TextEmbeddings(torch.cat([self.hidden_states, other.hidden_states]), pooled)


class TextConditioner:
    """The bundle's tokenizers and text encoders."""

    def __init__(self, tokenizers: Mapping[str, ClipTokenizer], engines: Mapping[str, Engine]) -> None:
        self._tokenizers = tokenizers
        self._engines = engines

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Token ids [B, 77] for each text encoder, by its name."""
        with warnings.catch_warnings():
            # SDXL's two tokenizers cut at the same place: say it once
            warnings.simplefilter("once", TruncationWarning) if len(self._tokenizers) > 1 else None
            return {ENCODERS[name]: tokenizer(texts) for name, tokenizer in self._tokenizers.items()}

    def encode(self, input_ids: Mapping[str, Tensor]) -> TextEmbeddings:
        """Run the text encoders. The tensors are the caller's to keep."""
        hidden, pooled = [], None
        for name, ids in input_ids.items():
            engine = self._engines[name]
            outputs = run_rows(engine, {"input_ids": ids.to(engine.device)})
            hidden.append(outputs["hidden_states"])
            pooled = outputs.get("text_embeds")
        joined = torch.cat(hidden, dim=-1)  # copies, so that the engines' buffers are free again
        return TextEmbeddings(joined, None if pooled is None else pooled.clone())
