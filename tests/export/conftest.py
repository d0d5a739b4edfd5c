"""Shared by the tests of export: the Hub's place holder, and bases to be changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from .fake_hub import BASES, FakeHub


@pytest.fixture
def hub(tiny_repos: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    hub = FakeHub(tiny_repos)
    monkeypatch.setattr("hypersd.export.repositories.fetch_optional", hub.fetch_optional)
    monkeypatch.setattr("hypersd.export.repositories.fetch", hub.fetch)
    return hub


@pytest.fixture
def copy_base(tiny_repos: Path, tmp_path: Path) -> Callable[[str], Path]:
    """``copy_base(family)``: the tiny base, to be changed."""
    return lambda family: Path(shutil.copytree(tiny_repos / BASES[family], tmp_path / "base"))
