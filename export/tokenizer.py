"""CLIP tokenizers: their conversion to one ``tokenizer.json``, and one that needs no published vocabulary."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from ..errors import WeightsError, one_line
from .components import TOKENS


def write_tokenizer(source: Path, target: Path) -> None:
    """Convert a tokenizer folder in transformers' layout.

    Truncation to 77 tokens and padding with the tokenizer's own padding token are part of the file: SDXL's two
    tokenizers differ in that token.
    """
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(source), local_files_only=True)
    except Exception as error:  # tokenizers raises Exception itself
        raise WeightsError(f"{source} cannot be loaded as a CLIP tokenizer: {one_line(error)}") from error
    backend = tokenizer.backend_tokenizer
    backend.enable_truncation(TOKENS)
    backend.enable_padding(length=TOKENS, pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)
    target.mkdir(parents=True, exist_ok=True)
    backend.save(str(target / "tokenizer.json"))


def byte_alphabet() -> list[str]:
    """The 256 printable stand-ins for bytes of GPT-2's byte-level BPE, in CLIP's vocabulary order ("!" is 0)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [256 + i for i in range(256 - len(printable))]
    return [chr(c) for c in printable + others]


def write_byte_tokenizer(folder: Path, words: Iterable[str] = (), pad_token: str = "<|endoftext|>") -> None:
    """A CLIP tokenizer with a small vocabulary: every byte, these whole words, the two special tokens."""
    vocab, merges = _vocabulary(words)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{merge}\n" for merge in merges), encoding="utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special["pad_token"] = pad_token
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    config = {"model_max_length": TOKENS, "tokenizer_class": "CLIPTokenizer", "add_prefix_space": False, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _vocabulary(words: Iterable[str]) -> tuple[list[str], list[str]]:
    """Tokens in the order of their ids, and the merges that make words of bytes."""
    alphabet = byte_alphabet()
    vocab, merges = alphabet + [c + "</w>" for c in alphabet], []
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            if (merge := f"{pieces[0]} {pieces[1]}") not in merges:
                merges.append(merge)
                vocab.append(pieces[0] + pieces[1])
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    return [*vocab, "<|startoftext|>", "<|endoftext|>"], merges
