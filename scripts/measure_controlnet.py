#!/usr/bin/env python
"""Measure what ControlNet support costs: a plain UNet beside one that takes residuals and is fed zeros, and the rest.

    python scripts/measure_controlnet.py --family sd15 --folder /tmp/controlnet

Full size, float32, random weights, the same in both UNets; on ONNX Runtime's CPU provider, in rounds of A B B A. Graphs
that are in the folder are taken again (SD1.5: 8.5 GB).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import make_tiny_repos
import msgspec
import torch
from diffusers import UNet2DConditionModel

from hypersd.engines.onnx_runtime import OnnxRuntimeEngine
from hypersd.engines.random_inputs import random_input
from hypersd.engines.specs import Component
from hypersd.engines.zeroed_inputs import ZeroedInputs
from hypersd.export.architectures import SD15_UNET, SDXL_UNET
from hypersd.export.components import ComponentModule, unet_component
from hypersd.export.controlnet_components import (
    cond_embedding_component,
    controlled_unet_component,
    controlnet_component,
)
from hypersd.export.controlnet_sources import EMBEDDING_CHANNELS
from hypersd.export.shapes import ShapeOptions, image_shapes
from hypersd.export.trace import trace

CONFIGS = {"sd15": (SD15_UNET, 512), "sdxl": (SDXL_UNET, 1024)}
SCALE = 8  # pixels per latent


def unet(family: str) -> Any:
    torch.manual_seed(0)
    return UNet2DConditionModel(**CONFIGS[family][0]).eval().requires_grad_(False)


def controlnet(family: str) -> Any:
    return make_tiny_repos.controlnet(unet(family), EMBEDDING_CHANNELS).eval().requires_grad_(False)


def networks(family: str, size: int) -> dict[str, Callable[[], ComponentModule]]:
    shapes = image_shapes(ShapeOptions(), size)
    return {
        "plain UNet": lambda: unet_component(unet(family), shapes, False, SCALE),
        "UNet with residuals": lambda: controlled_unet_component(unet(family), shapes, False, SCALE),
        "ControlNet": lambda: controlnet_component(controlnet(family), shapes, False, SCALE),
        "embedding of the image": lambda: cond_embedding_component(controlnet(family), shapes, SCALE),
    }


def export(name: str, make: Callable[[], ComponentModule], folder: Path) -> Component:
    """The network's graph in a folder of its own; written last is what says that it is whole."""
    place = folder / name.replace(" ", "-")
    record = place / "component.json"
    if not record.exists():
        print(f"exporting {name}", flush=True)
        place.mkdir(parents=True, exist_ok=True)
        network = make()
        files = tuple(str(file) for file in trace(network, place / "model.onnx"))
        component = Component(inputs=network.inputs, outputs=network.outputs, files=files, key="0" * 64)
        record.write_bytes(msgspec.json.encode(component))
    return msgspec.json.decode(record.read_bytes(), type=Component)


def feeds_of(component: Component) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: random_input(name, spec, spec.shape_at({}), 1, generator) for name, spec in component.inputs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--family", choices=sorted(CONFIGS), default="sd15")
    parser.add_argument("--size", type=int, help="pixels of a side (default: what the family was trained for)")
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--folder", type=Path, required=True, help="for the graphs")
    args = parser.parse_args()
    size = args.size or CONFIGS[args.family][1]
    folder = args.folder / f"{args.family}-{size}"
    components = {name: export(name, make, folder) for name, make in networks(args.family, size).items()}
    cpu = torch.device("cpu")
    engines: dict[str, Any] = {
        name: OnnxRuntimeEngine(name, Path(component.onnx), component, cpu) for name, component in components.items()
    }
    plain = components["plain UNet"].inputs
    residuals = [name for name in components["UNet with residuals"].inputs if name not in plain]
    engines["UNet with residuals"] = ZeroedInputs(engines["UNet with residuals"], residuals)
    feeds = {name: feeds_of(component) for name, component in components.items()}
    feeds["UNet with residuals"] = feeds["plain UNet"]
    outputs = {name: engines[name].run(feeds[name]) for name in engines}  # warm
    difference = (outputs["plain UNet"]["out_sample"] - outputs["UNet with residuals"]["out_sample"]).abs().max()
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for i in range(args.rounds):
        for name in list(engines) if i % 2 else reversed(engines):
            began = time.perf_counter()
            engines[name].run(feeds[name])
            seconds[name].append(time.perf_counter() - began)
    pairs = zip(seconds["UNet with residuals"], seconds["plain UNet"], strict=True)
    ratios = [ours / theirs for ours, theirs in pairs]
    spec = [components["UNet with residuals"].inputs[name] for name in residuals]
    print(
        json.dumps(
            {
                "family": args.family,
                "size": size,
                "median seconds": {name: round(statistics.median(times), 4) for name, times in seconds.items()},
                "least seconds": {name: round(min(times), 4) for name, times in seconds.items()},
                "with residuals to plain, pair by pair": {
                    "median": round(statistics.median(ratios), 4),
                    "standard error of the mean": round(statistics.stdev(ratios) / len(ratios) ** 0.5, 4),
                },
                "largest difference of the outputs": float(difference),
                "bytes of zeros": sum(4 * torch.Size(one.shape_at({})).numel() for one in spec),
                "python": platform.python_version(),
                "cores": len(os.sched_getaffinity(0)),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
