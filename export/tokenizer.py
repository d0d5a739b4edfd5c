"""A CLIP tokenizer as one ``tokenizer.json``, which the runtime reads with the `tokenizers` library alone."""

from __future__ import annotations

from pathlib import Path

from ..errors import WeightsError, one_line
from .networks import TOKENS


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
