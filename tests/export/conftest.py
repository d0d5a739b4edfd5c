"""Shared by the tests of export: the Hub's place holder, bases to be changed, and exports without tracing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hypersd.engines.bundle import Bundle

from .export_runs import ONE, Recorder, Run
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


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str], object]], None]:
    """Tracing, replaced by files of a few bytes, and no checks; loading and fusing run.

    ``cheap(action)``: ``action(name)`` runs in the middle of each trace.
    """
    import torch

    action: list[Callable[[str], object]] = [lambda name: None]

    def trace(component: Any, path: Path) -> list[Path]:
        data = path.with_name("model.onnx_data")
        path.write_bytes(b"graph of " + path.parent.name.encode())
        action[0](path.parent.name)
        data.write_bytes(torch.cat([p.flatten()[:4].float() for p in component.module.parameters()]).numpy().tobytes())
        return [path, data]

    monkeypatch.setattr("hypersd.export.exporter.trace", trace)
    monkeypatch.setattr("hypersd.export.exporter.reference_cases", lambda component: [])
    monkeypatch.setattr("hypersd.export.exporter.check_graph", lambda *_: None)
    monkeypatch.setattr("hypersd.export.exporter.check_outputs", lambda *_: 0.0)
    return lambda new: action.__setitem__(0, new)


@pytest.fixture
def run(source_options: Callable[..., Any], tmp_path: Path) -> Run:
    """``run(name, out=..., base=..., precision=...)``: an fp32 export below tmp_path, and what it told."""
    from hypersd.export import ExportOptions, export_bundle

    def export(name: str = ONE, out: str = "out", lora: str | None = None, **options: Any) -> tuple[Bundle, Recorder]:
        changes = {key: options.pop(key) for key in ("base", "vae", "variant") if key in options}
        sources = source_options(name, **changes, **({"checkpoint_file": lora} if lora else {}))
        recorder = Recorder()
        settings = ExportOptions(**{"precision": "fp32", "sources": sources, **options})
        return export_bundle(name, tmp_path / out, settings, recorder), recorder

    return export
