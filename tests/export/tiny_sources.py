"""The sources of tiny checkpoints, their parts loaded and compared, and the one line of an error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from hypersd import families
from hypersd.errors import HyperSDError
from hypersd.export.checkpoints import Checkpoint, find_checkpoint
from hypersd.export.component_exports import component_exports
from hypersd.export.layout import Part
from hypersd.export.models import check_sources, load_text_encoder, load_unet, load_vae
from hypersd.export.shapes import ShapeOptions, image_shapes
from hypersd.export.sources import SourceOptions, Sources, find_sources

from .fake_hub import BASES

SD15, SDXL = find_checkpoint("Hyper-SD15-4steps-lora"), find_checkpoint("Hyper-SDXL-4steps-lora")
DEMO15, DEMOXL = find_checkpoint("Hyper-Demo15-4steps-lora"), find_checkpoint("Hyper-DemoXL-1step-Unet")
ENTRIES = {"sd15": SD15, "sdxl": SDXL}
FAMILIES = pytest.mark.parametrize("family", BASES)
ENCODER_CLASSES = {encoder.component: encoder.class_name for encoder in families.SDXL.text_encoders}


def find(family: str, tiny_repos: Path, precision: str = "fp32", **changes: str | None) -> Sources:
    """The sources of a checkpoint whose LoRA and base are local."""
    entry = ENTRIES[family]
    local = {
        "base": str(tiny_repos / BASES[family]),
        "checkpoint_file": str(tiny_repos / "ByteDance/Hyper-SD" / entry.filename),
    }
    return find_sources(entry, SourceOptions(**{**local, **changes}), precision)


def load(part: Part, family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    if part.name == "unet":
        return load_unet(part, dtype)
    return load_vae(part, dtype) if part.name == "vae" else load_text_encoder(part, ENCODER_CLASSES[part.name], dtype)


def load_all(family: str, base: Path, tiny_repos: Path) -> None:
    """Go through what an export does before it traces anything."""
    sources = find(family, tiny_repos, base=str(base))
    check_sources(sources, family)
    for part in sources.parts.values():
        load(part, family)


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    """The two modules have the same class, the same weights under the same names, none on the meta device."""
    assert type(ours) is type(theirs)
    expected, found = theirs.state_dict(), ours.state_dict()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def one_line(error: pytest.ExceptionInfo[HyperSDError], *words: str) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert error.value.exit_code == 2
    for word in words:
        assert word in message
    return message


def precisions(checkpoint: Checkpoint, sources: Sources) -> set[str]:
    """The types of an fp16 bundle's components."""
    records = {name: tuple(f.record() for f in files) for name, files in sources.weights.items()}
    exports = component_exports(checkpoint, sources, records, image_shapes(ShapeOptions(), 64), "fp16")
    return {export.precision.name for export in exports}
