"""What a bundle is, and the engines that run its networks."""

from __future__ import annotations

from .bundle import Bundle
from .engine import Engine
from .load import load_engines
from .manifest import Manifest

__all__ = ["Bundle", "Engine", "Manifest", "load_engines"]
