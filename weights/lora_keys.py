"""Key layouts of LoRA files: the keys that belong to each layer of a model.

Hyper-SD publishes kohya's layout: ``lora_unet_mid_block_resnets_0_conv1.lora_down.weight`` and so on.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..errors import WeightsError

PARTS = ("lora_down.weight", "lora_up.weight", "alpha")  # of each layer
COVERED_BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")
LISTED_KEYS = 30


def kohya_keys(modules: Iterable[str], prefix: str) -> dict[str, str]:
    """The layers that Hyper-SD's LoRAs cover, each with the beginning of its keys.

    Args:
        modules: paths of the UNet's linear and convolution layers (``mid_block.resnets.0.conv1``).
        prefix: beginning of every key (``lora_unet_``).
    """
    return {name: prefix + name.replace(".", "_") for name in modules if name.startswith(COVERED_BLOCKS)}


def match_kohya(path: Path, present: Iterable[str], modules: Iterable[str], prefix: str) -> dict[str, str]:
    """As :func:`kohya_keys`, for a file whose keys are exactly those.

    Args:
        path: the file, for messages.
        present: its keys.
        modules: paths of the UNet's linear and convolution layers.
        prefix: beginning of every key.

    Raises:
        WeightsError: the file has another layout, or keys are left over or missing, which are listed.
    """
    present = set(present)
    keys = kohya_keys(modules, prefix)
    expected = {f"{key}.{part}" for key in keys.values() for part in PARTS}
    if not any(key.startswith(prefix) for key in present):
        first = min(present, default="none")
        raise WeightsError(f"{path} is no LoRA with kohya keys ({prefix}….lora_down.weight), it has {first}")
    if present != expected:
        raise WeightsError(f"{path} does not fit the base's UNet: {describe_keys(present, expected)}")
    return keys


def describe_keys(present: set[str], expected: set[str]) -> str:
    """Left-over and missing keys, sorted, as one line that stays readable when a whole file is wrong."""
    parts = []
    for what, keys in ("left over", present - expected), ("missing", expected - present):
        if keys:
            listed = ", ".join(sorted(keys)[:LISTED_KEYS]) + (", …" if len(keys) > LISTED_KEYS else "")
            parts.append(f"{len(keys)} {what}: {listed}")
    return "; ".join(parts)
