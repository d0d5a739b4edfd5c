#!/usr/bin/env python
"""Measure LoRAs at run time: loading a file, the first image with it, moving a slider, and going back.

    python scripts/measure_adapters.py bundles/NAME --rank 32 --backend openvino

The LoRA is random and covers every layer that has a place in the bundle's slot, in float16 and kohya's layout. Images
take turns with plain ones. In the place of a bundle ``sd15`` and ``sdxl`` are the places of the published UNets, for
which the file and the slot are measured without engines, in float16:

    python scripts/measure_adapters.py sdxl --rank 32 --slot 32
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from hypersd import Pipeline
from hypersd.engines import Bundle
from hypersd.engines.lora_slot import LORA, LoraSlot
from hypersd.engines.specs import TensorSpec
from hypersd.export.architectures import PUBLISHED
from hypersd.export.lora_slot import SlotOptions, make_slot
from hypersd.export.models import layer_shapes
from hypersd.runtime.adapters import Adapters, choose_adapters

PREFIX = {"unet": "lora_unet_", "text_encoder": "lora_te1_text_model_", "text_encoder_2": "lora_te2_text_model_"}
PROMPT = "a red star on a blue background"


def write_lora(path: Path, slot: LoraSlot, rank: int) -> None:
    """A random LoRA over every place."""
    tensors, generator = {}, torch.Generator().manual_seed(0)
    for component, layers in slot.layers.items():
        for place, layer in layers.items():
            if layer.has_place:
                key = PREFIX[component] + place.replace(".", "_")
                outputs, inputs, *kernel = layer.weight
                down, up = (rank, inputs, *kernel), (outputs, rank, *kernel)
                tensors[f"{key}.lora_down.weight"] = torch.randn(down, generator=generator).half() * 0.02
                tensors[f"{key}.lora_up.weight"] = torch.randn(up, generator=generator).half() * 0.02
                tensors[f"{key}.alpha"] = torch.tensor(float(rank))
    save_file(tensors, path)


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def published_places(family: str, rank: int) -> Any:
    """As much of a manifest as a slot needs, for a published UNet."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**PUBLISHED[family].unet)
    slot = make_slot(SlotOptions(rank=rank), {"unet": layer_shapes(unet)})
    spec = TensorSpec(dtype="float16", shape=(slot.size("unet"),))
    return SimpleNamespace(lora_slot=slot, family=family, components={"unet": SimpleNamespace(inputs={LORA: spec})})


def measure_slot(manifest: Any, file: Path) -> None:
    """File to slot, a slider that moves, and an earlier setting."""
    slot = manifest.lora_slot
    adapters = Adapters(manifest, {name: torch.device("cpu") for name in slot.components})
    load = seconds(lambda: adapters.load(file, "style"))

    def pack(strength: float) -> Any:
        return adapters.pack(adapters.resolve(choose_adapters(manifest, {"style": strength})))

    first = seconds(lambda: pack(1.0))
    moved = statistics.median(seconds(lambda i=i: pack(0.5 + i / 100)) for i in range(9))
    again = seconds(lambda: pack(0.58))
    size = sum(tensor.nbytes for tensor in pack(1.0).tensors.values())
    print(f"slot of rank {slot.rank}: {size / 1e6:.1f} MB; file of {file.stat().st_size / 1e6:.1f} MB")
    print(f"file read and checked {load:.3f} s, packed {first:.3f} s, slider {moved:.4f} s, back {again:.6f} s")


def measure_images(pipe: Pipeline, file: Path, rounds: int) -> None:
    """Plain images and images with the LoRA, by turns."""
    pipe(PROMPT, seed=0)
    plain, styled = [], []
    first = seconds(lambda: (pipe.load_lora_weights(file, "style"), pipe(PROMPT, seed=0, adapters={"style": 1.0})))
    for i in range(rounds):
        plain.append(seconds(lambda: pipe(PROMPT, seed=0)))
        styled.append(seconds(lambda i=i: pipe(PROMPT, seed=0, adapters={"style": 0.5 + i / 100})))
    print(f"plain image {statistics.median(plain):.3f} s, image at another strength {statistics.median(styled):.3f} s")
    print(f"file loaded and first image {first:.3f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundle", help="a bundle with a slot, or sd15 or sdxl")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slot", type=int, default=32, help="rank of the slot for sd15 and sdxl")
    args = parser.parse_args()
    bundle = None if args.bundle in PUBLISHED else Bundle.load(args.bundle)
    manifest = published_places(args.bundle, args.slot) if bundle is None else bundle.manifest
    assert manifest.lora_slot is not None, "export with --lora-slot"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "style.safetensors"
        write_lora(file, manifest.lora_slot, args.rank)
        measure_slot(manifest, file)
        if bundle is not None:
            measure_images(Pipeline.load(bundle, backend=args.backend, device="cpu"), file, args.rounds)


if __name__ == "__main__":
    main()
