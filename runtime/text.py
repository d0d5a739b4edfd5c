"""Prompts to embeddings, without transformers."""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..engines import Bundle, Engine
from ..engines.lora_slot import LORA
from ..errors import BundleError, one_line, warn_user
from ..families import find_family
from .adapters import NO_SLOT, PackedSlot
from .batching import run_rows

LONGEST_SHOWN = 200  # characters of a text in a warning
KEPT_TEXTS = 64  # whose embeddings are kept, SDXL's in float32 635 KB each; the least recently used goes first


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
        """Token ids [B, 77], int64, and the text cut off each, ``""`` unless it is too long."""
        encodings = self._tokenizer.encode_batch(list(texts))
        ids = torch.tensor([encoding.ids for encoding in encodings], dtype=torch.int64)
        cut = [[i for part in encoding.overflowing for i in part.ids] for encoding in encodings]
        return ids, [self._decode(rest) if rest else "" for rest in cut]

    def _decode(self, ids: list[int]) -> str:
        """The text of some tokens. CLIP marks the end of a word in the token; transformers shows a space for it."""
        return self._tokenizer.decode(ids, skip_special_tokens=True).replace("</w>", " ").strip()


def load_tokenizers(bundle: Bundle) -> dict[str, ClipTokenizer]:
    """The tokenizers of a bundle's text encoders, by the encoders' components.

    Raises:
        BundleError: one is missing or damaged.
    """
    tokenizers = {}
    for encoder in find_family(bundle.manifest.family).text_encoders:
        file = f"{encoder.tokenizer}/tokenizer.json"
        if file not in bundle.manifest.files:
            raise BundleError(f"{bundle.root} has no {file}: export the bundle again")
        tokenizers[encoder.component] = ClipTokenizer(bundle.path(file))
    return tokenizers


@dataclasses.dataclass(frozen=True)
class TextEmbeddings:
    """The embeddings that condition the UNet.

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

    def named(self) -> dict[str, Tensor]:
        """The tensors under diffusers' names."""
        named = {"prompt_embeds": self.hidden_states}
        return named if self.text_embeds is None else {**named, "pooled_prompt_embeds": self.text_embeds}

    def cat(self, *others: TextEmbeddings) -> TextEmbeddings:
        """These rows, then the others': tensors of their own."""
        every = (self, *others)
        pooled = [each.text_embeds for each in every if each.text_embeds is not None]
        return TextEmbeddings(
            torch.cat([each.hidden_states for each in every]), torch.cat(pooled) if len(pooled) == len(every) else None
        )


@dataclasses.dataclass(frozen=True)
class TokenizedTexts:
    """Tokenized texts; for those of recent calls the embeddings instead.

    Attributes:
        texts: one a row.
        known: embeddings of one row each, by text, for cached texts.
        slot: the LoRAs under which they are encoded.
        input_ids: token ids [1, 77] by text encoder, of each of the other texts.
        cut: the text cut off each of the other texts.
    """

    texts: tuple[str, ...]
    known: Mapping[str, TextEmbeddings]
    slot: PackedSlot
    input_ids: Mapping[str, Mapping[str, Tensor]]
    cut: Mapping[str, str]


class TextConditioner:
    """The bundle's tokenizers and text encoders, and the embeddings of the last texts.

    Each text is encoded by itself, so that its embeddings depend on no other text and on no earlier call.
    """

    def __init__(self, tokenizers: Mapping[str, ClipTokenizer], engines: Mapping[str, Engine]) -> None:
        self._tokenizers = tokenizers
        self._engines = engines
        self._kept: OrderedDict[tuple[Hashable, str], tuple[TextEmbeddings, str]] = (
            OrderedDict()
        )  # with the text cut off
        self._lock = threading.Lock()  # guards the cache; threads may encode side by side

    def tokenize(self, texts: Sequence[str], slot: PackedSlot = NO_SLOT) -> TokenizedTexts:
        """Look up or tokenize some texts. Warns of text that is cut off, and names it.

        Args:
            texts: one a row.
            slot: the LoRAs under which they are encoded.
        """
        known, cut = self._known(texts, slot.text_key)
        new = [text for text in dict.fromkeys(texts) if text not in known]
        input_ids, cut_of_new = self._tokenize(new) if new else ({}, {})
        cut |= cut_of_new
        for rest in dict.fromkeys(cut[text] for text in texts):
            if rest:
                _warn_of_truncation(rest)
        return TokenizedTexts(tuple(texts), known, slot, input_ids, cut_of_new)

    def encode(self, tokenized: TokenizedTexts) -> TextEmbeddings:
        """One row a text, run through the text encoders where they are new.

        A single row is the tensor that is kept itself, so that nothing is copied for it: do not write to it.
        """
        rows = dict(tokenized.known)
        for text, input_ids in tokenized.input_ids.items():
            rows[text] = self._encode(input_ids, tokenized.slot)
            self._keep((tokenized.slot.text_key, text), rows[text], tokenized.cut[text])
        first, *others = (rows[text] for text in tokenized.texts)
        return first.cat(*others) if others else first

    def _tokenize(self, texts: Sequence[str]) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
        """Token ids by text and encoder, and the text cut off by text: SDXL's two tokenizers cut at the same place."""
        ids: dict[str, dict[str, Tensor]] = {text: {} for text in texts}
        cut: dict[str, str] = {}
        for name, tokenizer in self._tokenizers.items():
            rows, rests = tokenizer(texts)
            for text, row in zip(texts, rows.split(1), strict=True):
                ids[text][name] = row
            cut = cut or dict(zip(texts, rests, strict=True))
        return ids, cut

    def _encode(self, input_ids: Mapping[str, Tensor], slot: PackedSlot) -> TextEmbeddings:
        """Run the text encoders on one text."""
        hidden, pooled = [], None
        for name, ids in input_ids.items():
            engine = self._engines[name]
            lora = {LORA: slot.tensors[name]} if name in slot.tensors else {}
            outputs = run_rows(engine, {"input_ids": ids.to(engine.device), **lora})
            hidden.append(outputs["hidden_states"])
            pooled = outputs.get("text_embeds")
        joined = torch.cat(hidden, dim=-1)  # copies, so that the engines' buffers are free again
        return TextEmbeddings(joined, None if pooled is None else pooled.clone())

    def _known(self, texts: Sequence[str], under: Hashable) -> tuple[dict[str, TextEmbeddings], dict[str, str]]:
        with self._lock:
            found = {text: self._kept[under, text] for text in texts if (under, text) in self._kept}
            for text in found:
                self._kept.move_to_end((under, text))
        return {text: kept[0] for text, kept in found.items()}, {text: kept[1] for text, kept in found.items()}

    def _keep(self, key: tuple[Hashable, str], embeddings: TextEmbeddings, cut: str) -> None:
        with self._lock:
            self._kept[key] = embeddings, cut
            self._kept.move_to_end(key)
            if len(self._kept) > KEPT_TEXTS:
                self._kept.popitem(last=False)


def _warn_of_truncation(cut: str) -> None:
    shown = cut if len(cut) <= LONGEST_SHOWN else f"{cut[:LONGEST_SHOWN]}…"
    warn_user(f"the prompt is longer than the 77 tokens that CLIP takes; cut off: {shown!r}", TruncationWarning)
