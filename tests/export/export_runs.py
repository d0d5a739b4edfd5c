"""Exports of tiny checkpoints: their names, their progress, and what they leave in a folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from hypersd.engines.bundle import Bundle

ONE, TWO, UNET = "Hyper-SD15-1step-lora", "Hyper-SD15-2steps-lora", "Hyper-SDXL-1step-Unet"
PARTS = ["text_encoder", "vae_encoder", "vae_decoder", "unet"]  # in the order in which they are made


@dataclasses.dataclass
class Recorder:
    """An export's progress."""

    started: list[str] = dataclasses.field(default_factory=list)
    failed: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    downloads: None = None

    def start(self, stage: str) -> None:
        self.started.append(stage)

    def finish(self, stage: str, seconds: float, note: str, ok: bool) -> None:
        assert self.started[-1] == stage
        assert seconds >= 0
        if not ok:
            self.failed.append(stage)

    def note(self, text: str) -> None:
        if not text.startswith("fuses "):  # which every export with a local LoRA says
            self.notes.append(text)

    @property
    def traced(self) -> list[str]:
        return [stage.split(":")[0] for stage in self.started if stage.endswith("trace to ONNX")]


Run = Callable[..., tuple[Bundle, Recorder]]


def left_in(folder: Path) -> list[str]:
    """The folder's contents besides locks' empty files."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def state(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Place, size and time of every file."""
    stats = {path.relative_to(folder).as_posix(): path.stat() for path in [folder, *folder.rglob("*")]}
    return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}
