"""Wheels of other versions, unpacked for a process that imports them without installing them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def unpacked_wheel(distribution: str, version: str) -> Iterator[Path]:
    """Download a wheel without what it requires; gives the folder of its packages, deleted at the end."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        pip = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--only-binary=:all:", "--dest", folder]
        subprocess.run([*pip, f"{distribution}=={version}"], check=True)
        with zipfile.ZipFile(next(root.glob("*.whl"))) as wheel:
            wheel.extractall(root)
        yield root


def run_beside(root: Path, *command: str) -> str:
    """The output of a command whose Python imports from ``root`` first, and whose loader finds libraries there."""
    env = {**os.environ, "LD_LIBRARY_PATH": str(root), "PYTHONPATH": str(root)}
    return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout


def output(*command: str | Path) -> str:
    """A command's output."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
