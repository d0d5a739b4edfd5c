"""From prompts to what the UNet is conditioned on, without transformers."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..engines import Engine
from ..errors import BundleError, one_line
from .batching import run_rows

LONGEST_SHOWN = 200  # characters of a text in a warning
ENCODERS = {"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"}


class TruncationWarning(UserWarning):
    """A prompt was longer than CLIP can take."""


class ClipTokenizer:
    """Text to 77 token ids, begin and end tokens included, padded as the bundle's ``tokenizer.json`` says."""

    def __init__(self, path: Path) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise BundleError(f"{path} is not a tokenizer ({one_line(error)}): export the bundle again") from error

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, list[str]]:
        """Token ids [B, 77], int64, and what was cut off from texts that are too long."""
        encodings = self._tokenizer.encode_batch(list(texts))
        ids = torch.tensor([encoding.ids for encoding in encodings], dtype=torch.int64)
        cut = [[i for part in encoding.overflowing for i in part.ids] for encoding in encodings]
        return ids, [self._decode(rest) for rest in cut if rest]

    def _decode(self, ids: list[int]) -> str:
        """The text of some tokens. CLIP marks the end of a word in the token; transformers shows a space for it."""
        return self._tokenizer.decode(ids, skip_special_tokens=True).replace("</w>", " ").strip()


@dataclasses.dataclass(frozen=True)
class TextEmbeddings:
    """What the UNet is conditioned on.

    Attributes:
        hidden_states: [B, 77, C], both encoders' side by side for SDXL.
        text_embeds: [B, P], the pooled projection of SDXL's second encoder; None for SD1.5.
    """

    hidden_states: Tensor
    text_embeds: Tensor | None

    def map(self, change: Callable[[Tensor], Tensor]) -> TextEmbeddings:
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

    @property
    def encoders(self) -> tuple[str, ...]:
        """The text encoders' names, in the order that their embeddings are joined in."""
        return tuple(ENCODERS[name] for name in self._tokenizers)

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Token ids [B, 77] for each text encoder, by its name. Warns of text that is cut off, and names it."""
        ids: dict[str, Tensor] = {}
        cut_off: list[str] = []
        for name, tokenizer in self._tokenizers.items():
            ids[ENCODERS[name]], cut = tokenizer(texts)
            cut_off = cut_off or cut  # SDXL's two tokenizers cut at the same place: it is said once
        for text in dict.fromkeys(cut_off):
            _warn_of_truncation(text)
        return ids

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


def _warn_of_truncation(cut: str) -> None:
    shown = cut if len(cut) <= LONGEST_SHOWN else f"{cut[:LONGEST_SHOWN]}…"
    message = f"the prompt is longer than the 77 tokens that CLIP takes; cut off: {shown!r}"
    warnings.warn(message, TruncationWarning, stacklevel=6)  # shown at the call of the pipeline
