"""Scales of LoRAs in peft's configuration: ``adapter_config.json``, or diffusers' entry in a file's header."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import WeightsError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"  # peft's, beside that configuration
HEADER_ENTRY = "lora_adapter_metadata"  # diffusers' entry, in which every key begins with the component's name
_TYPES = ("LORA", "LOHA", "LOKR")
# Initialisations that also change the base's weights, so that the adapter fits no other base.
_CHANGED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


@dataclasses.dataclass(frozen=True)
class PeftSettings:
    """Alpha and rank of an adapter (peft's ``LoraConfig``, ``LoHaConfig``, ``LoKrConfig``).

    Attributes:
        alpha: of every layer that no pattern names.
        rank: of layers whose tensors do not show it.
        alphas: other alphas, by a regular expression for the end of a module's path.
        is_rank_stabilized: whether the scale is ``alpha / sqrt(rank)``.
    """

    alpha: float
    rank: int
    alphas: Mapping[str, float] = dataclasses.field(default_factory=dict)
    is_rank_stabilized: bool = False

    def scale(self, module: str, rank: int | None) -> float:
        """The factor of a layer's change."""
        names = (module, f"text_model.{module}")  # as transformers 4 named the modules of text encoders
        matching = (
            alpha for end, alpha in self.alphas.items() if any(re.match(rf"(.*\.)?({end})$", name) for name in names)
        )
        rank = rank or self.rank
        return next(matching, self.alpha) / (math.sqrt(rank) if self.is_rank_stabilized else rank)


def read_settings(path: Path, header: Mapping[str, str], component: str) -> PeftSettings | None:
    """The settings of a component's layers in the file at ``path``; None if no configuration has any.

    Raises:
        WeightsError: the configuration is damaged, or of an adapter that cannot be fused.
    """
    if path.name == WEIGHTS_NAME and (config := path.with_name(CONFIG_NAME)).is_file():
        return _settings(config, _parse(config, config.read_bytes()))
    if HEADER_ENTRY not in header:
        return None
    prefix, found = f"{component}.", _parse(path, header[HEADER_ENTRY])
    values = {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}
    return _settings(path, values) if values else None


def _parse(where: Path, text: str | bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise WeightsError(f"{where} holds no configuration of a LoRA in JSON: download it again")
    return value


def _settings(where: Path, values: Mapping[str, Any]) -> PeftSettings:
    kind, begun = str(values.get("peft_type") or "LORA"), str(values.get("init_lora_weights") or "")
    if kind not in _TYPES:
        raise WeightsError(f"{where}: adapters of the type {kind[:40]!r} are not supported, only {', '.join(_TYPES)}")
    if begun.startswith(_CHANGED_BASES):
        raise WeightsError(
            f"{where}: {begun[:40]} changed the base's weights too: convert it to a plain LoRA with peft"
        )
    alpha = values.get("lora_alpha", values.get("alpha", 8))  # peft's default
    rank, alphas = values.get("r", 8), values.get("alpha_pattern") or {}
    if not (
        _is_number(alpha)
        and isinstance(rank, int)
        and rank > 0
        and isinstance(alphas, dict)
        and all(map(_is_number, alphas.values()))
        and all(map(_is_pattern, alphas))
    ):
        raise WeightsError(f"{where}: lora_alpha, r and alpha_pattern are not a LoRA's: download it again")
    return PeftSettings(alpha, rank, alphas, bool(values.get("use_rslora")))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True
