"""Bundles, the engines that run their components, and the builder of TensorRT plans."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["BuildOptions", "Bundle", "Engine", "Manifest", "build_engines"]

if TYPE_CHECKING:
    from .bundle import Bundle
    from .engine import Engine
    from .manifest import Manifest
    from .tensorrt.build_options import BuildOptions
    from .tensorrt.target_builder import build_engines

_HOMES = {
    "BuildOptions": "tensorrt.build_options",
    "Bundle": "bundle",
    "Engine": "engine",
    "Manifest": "manifest",
    "build_engines": "tensorrt.target_builder",
}


def __getattr__(name: str) -> Any:
    """Load the public names on first use (PEP 562): a build process needs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
