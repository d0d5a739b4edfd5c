"""Fixtures of the command line's tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hypersd.cli import main


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """``fails(*argv)``: run a command that must end with one line on stderr and exit code 2; returns that line."""

    def run(*argv: object, code: int = 2) -> str:
        capsys.readouterr()
        assert main([str(word) for word in argv]) == code
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if "loaded in" not in line]
        assert len(lines) == 1, captured.err
        assert lines[0].startswith("hypersd")
        assert captured.out == ""
        return lines[0]

    return run


@pytest.fixture
def export_arguments(tiny_repos: Path) -> list[str]:
    """Arguments that export a tiny SD1.5 checkpoint from local files; the LoRA comes last."""
    base = tiny_repos / "stable-diffusion-v1-5/stable-diffusion-v1-5"
    lora = tiny_repos / "ByteDance/Hyper-SD/Hyper-SD15-1step-lora.safetensors"
    return ["export", "--ckpt", "Hyper-SD15-1step-lora", "--base", str(base), "--lora", str(lora)]
