"""Any number of images through an engine that takes a certain number at a time."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..engines import Engine
from ..engines.lora_slot import LORA
from ..engines.specs import dim_range

SHARED = re.compile(rf"timestep|conditioning_scale|{LORA}(_text_encoder.*)?")  # inputs that have no row per image


def run_rows(engine: Engine, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Run an engine on any number of rows, in as few runs as its batch range allows.

    The tensors returned are the engine's buffers if one run was enough (see :class:`hypersd.engines.Engine`).
    """
    batch = dim_range(next(iter(engine.outputs.values())).shape[0])
    rows = next(len(tensor) for name, tensor in feeds.items() if not SHARED.fullmatch(name))
    if batch.min <= rows <= batch.max:
        return engine.run(feeds)
    parts = [
        _run_part(engine, feeds, start, min(batch.max, rows - start), batch.min) for start in range(0, rows, batch.max)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in engine.outputs}


def _run_part(engine: Engine, feeds: Mapping[str, Tensor], start: int, rows: int, least: int) -> dict[str, Tensor]:
    """Copies of the outputs of ``rows`` rows; rows are repeated where the engine takes no fewer than ``least``."""
    padding = max(0, least - rows)

    def cut(tensor: Tensor) -> Tensor:
        part = tensor[start : start + rows]
        return torch.cat([part, part[-1:].expand(padding, *part.shape[1:])]) if padding else part

    outputs = engine.run({name: value if SHARED.fullmatch(name) else cut(value) for name, value in feeds.items()})
    return {name: output[:rows].clone() for name, output in outputs.items()}
