"""Exports a Hyper-SD checkpoint to a bundle: checkpoint table, sources, LoRA fusing, tracing, checks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["CHECKPOINTS", "DEMO_CHECKPOINTS", "ExportOptions", "ShapeOptions", "SourceOptions", "export_bundle"]

if TYPE_CHECKING:
    from .checkpoints import CHECKPOINTS, DEMO_CHECKPOINTS
    from .exporter import ExportOptions, export_bundle
    from .shapes import ShapeOptions
    from .sources import SourceOptions


def __getattr__(name: str) -> Any:
    """Import on first use: the checkpoint tables need neither torch nor diffusers."""
    if name in ("CHECKPOINTS", "DEMO_CHECKPOINTS"):
        from . import checkpoints

        return getattr(checkpoints, name)
    if name in __all__:
        from . import exporter

        return getattr(exporter, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
