"""Families of models: one file and one value for each."""

from __future__ import annotations

from collections.abc import Collection

from ..errors import BundleError, shown
from .family import Family, TextEncoder
from .sd15 import SD15
from .sdxl import SDXL

__all__ = ["FAMILIES", "SD15", "SDXL", "Family", "TextEncoder", "find_family", "lora_title"]

FAMILIES: dict[str, Family] = {family.name: family for family in (SD15, SDXL)}

# Parts of keys, with underscores for dots, by which LoRAs for families that are not supported are recognised.
UNSUPPORTED_LORAS = {
    "FLUX": ("single_transformer_blocks_", "_single_blocks_", "_double_blocks_"),
    "SD3": ("transformer_transformer_blocks_", "_joint_blocks_"),
}


def find_family(name: str) -> Family:
    """Look a family up by its name.

    Raises:
        BundleError: the name is not known.
    """
    try:
        return FAMILIES[name]
    except KeyError:
        raise BundleError(f"family {shown(name)} is not known: expected {' or '.join(FAMILIES)}") from None


def lora_title(keys: Collection[str]) -> str | None:
    """The title of the family that a LoRA with these keys was made for; None if no key tells."""
    marks = UNSUPPORTED_LORAS | {family.title: family.lora_marks for family in FAMILIES.values()}
    flat = [key.replace(".", "_") for key in keys]
    return next((title for title, some in marks.items() if any(mark in key for key in flat for mark in some)), None)
