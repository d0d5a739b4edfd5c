"""Peak memory of an export stays near one copy of the component: nothing keeps a second one alive."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import torch

from hypersd.engines.specs import ImageShapes, Range
from hypersd.export.checkpoints import find_checkpoint
from hypersd.export.components import unet_component
from hypersd.export.models import check_sources, load_unet
from hypersd.export.sources import SourceOptions, find_sources
from hypersd.export.trace import trace
from hypersd.weights.lora_file import Fusion
from hypersd.weights.safetensors_file import SafetensorsFile


def test_no_weight_outlives_tracing(source_options: Callable[[str], SourceOptions], tmp_path: Path) -> None:
    """The module is gone before its graph is run (onnxscript's rewriter kept the last graph, and so all weights)."""
    checkpoint = find_checkpoint("Hyper-SD15-1step-lora")
    sources = find_sources(checkpoint, source_options(checkpoint.name), "fp32")
    one = {
        name: Range(name=name, min=extent, opt=extent, max=extent)
        for name, extent in (("batch", 1), ("height", 64), ("width", 64))
    }
    loras = check_sources(sources, "sd15").loras
    unet = load_unet(sources.parts["unet"], torch.float16, Fusion("unet", tuple(loras.values())))
    component = unet_component(unet, ImageShapes(**one), guided=False, latent_scale=8)
    weights = [weakref.ref(parameter) for parameter in unet.parameters()]
    trace(component, tmp_path / "model.onnx")
    assert all(weight() is not None for weight in weights), "the test's own references count"
    del unet, component, loras
    gc.collect()
    assert not [weight for weight in weights if weight() is not None]


def test_released_memory_is_the_systems_again() -> None:
    """The memory of a deleted component is free for the check of its graph, in blocks below glibc's threshold too."""
    code = """
import numpy as np
from hypersd.export.libraries import release_memory
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
before = resident()
keepers, weights = [], []
for _ in range(200):
    weights.append(np.ones(1 << 20, np.uint8))
    keepers.append(np.ones(1 << 10, np.uint8))
del weights
release_memory()
print(resident() - before)
"""
    # glibc moves its threshold up as blocks are freed; this sets it where a long run ends up
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 25), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 50 << 20


def test_pages_read_from_a_file_are_unmapped(tiny_repos: Path, monkeypatch) -> None:
    """A big file is opened again and again, so that its pages do not add up in this process."""
    path = tiny_repos / "stable-diffusion-v1-5/stable-diffusion-v1-5/unet/diffusion_pytorch_model.safetensors"
    opened = []
    open_file = SafetensorsFile._open
    monkeypatch.setattr(SafetensorsFile, "_open", lambda self: (opened.append(1), open_file(self)))
    monkeypatch.setattr("hypersd.weights.safetensors_file.REMAP_BYTES", 1_000_000)
    total = sum(tensor.nbytes for _, tensor in SafetensorsFile(path).tensors())
    assert total > 3_000_000
    assert len(opened) >= 3
