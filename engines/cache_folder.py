"""Where this package keeps what it would otherwise have to make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``hypersd`` in the user's folder of caches; the environment variable XDG_CACHE_HOME moves the latter."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hypersd"
