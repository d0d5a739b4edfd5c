#!/usr/bin/env python
"""Measure what a LoRA slot costs a full-size UNet with random weights, in several forms of the graph.

    python scripts/measure_slot_forms.py /tmp/slots --family sd15 --rank 16 --backends onnxruntime openvino

Each form takes turns with the plain UNet; the table is in benchmarks/README.md. ``tensorrt-rtx`` builds each form in
float16, without a GPU.

- ``sliced``: two slices of one flat input for every layer. This is the form of ``hypersd export --lora-slot``.
- ``split``: the same, cut by one Split.
- ``inputs``: two inputs for every layer, and no cutting.
- ``grouped``: ``sliced``, with one product for the downs of layers that have the same input (q, k and v).
- ``addmm``: ``sliced``, with the layer's output added inside the second product (Gemm).
- ``merged``: ``sliced``, with the product of the factors added to the weight.
- ``stacked``: all downs as rows of one matrix and all ups as columns of another, cut by one Split each.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

FORMS = ("plain", "sliced", "split", "inputs", "grouped", "addmm", "merged", "stacked")
SIDES = {"sd15": 512, "sdxl": 1024}


def layers_of(unet: nn.Module) -> list[nn.Module]:
    """Linear layers and convolutions of size 1 in the attention blocks."""
    return [m for name, m in unet.named_modules() if ".attentions." in name and isinstance(m, nn.Linear | nn.Conv2d)]


class Slotted(nn.Module):
    """A UNet whose layers add products of the factors in its last inputs."""

    def __init__(self, module: nn.Module, unet: nn.Module, rank: int, form: str) -> None:
        super().__init__()
        self.module = module
        self.rank, self.form = rank, form
        self.layers = layers_of(unet)
        self.sizes = [rank * size for layer in self.layers for size in layer.weight.shape[1::-1]]
        self.factors: list[Tensor] = []
        self.shared: tuple[Tensor, Tensor] | None = None
        for i, layer in enumerate(self.layers):
            if form == "merged":
                layer.forward = self._merged(layer, i)
            else:
                layer.register_forward_hook(self._hook(i))
        self.same_input = {}

    def forward(self, *inputs: Tensor) -> Tensor:
        count = len(self.sizes) if self.form == "inputs" else 1
        inputs, slots = inputs[:-count], inputs[-count:]
        if self.form == "inputs":
            self.factors = list(slots)
        elif self.form == "stacked":
            ins, outs = self.sizes[::2], self.sizes[1::2]
            down, up = slots[0].split([sum(ins), sum(outs)])
            downs = down.view(-1, self.rank).split([n // self.rank for n in ins])
            ups = up.view(self.rank, -1).split([n // self.rank for n in outs], dim=1)
            self.factors = [factor for pair in zip(downs, ups, strict=True) for factor in pair]
        elif self.form == "split":
            self.factors = list(slots[0].split(self.sizes))
        else:
            ends = np.cumsum(self.sizes)
            self.factors = [slots[0][end - size : end] for size, end in zip(self.sizes, ends, strict=True)]
        self.by_input = {}
        return self.module(*inputs)

    def _hook(self, i: int) -> Callable[..., Tensor]:
        def add(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            (x,), rank = args, self.rank
            if isinstance(layer, nn.Conv2d):
                if self.form == "stacked":
                    down, up = self.factors[2 * i].T, self.factors[2 * i + 1].T
                else:
                    down, up = self.factors[2 * i].view(rank, -1), self.factors[2 * i + 1].view(-1, rank)
                return output + (up @ (down @ x.flatten(2))).view(output.shape)
            up = self.factors[2 * i + 1].view(rank, -1)
            if self.form == "addmm":
                low = x.flatten(0, 1) @ self.factors[2 * i].view(-1, rank)
                return torch.addmm(output.flatten(0, 1), low, up).view(output.shape)
            return output + self._low(x, i) @ up

        return add

    def _low(self, x: Tensor, i: int) -> Tensor:
        if self.form != "grouped":
            return x @ self.factors[2 * i].view(-1, self.rank)
        if id(x) not in self.by_input:  # q, k and v come one after another
            group = self.groups[i]
            down = torch.cat([self.factors[2 * j].view(-1, self.rank) for j in group], dim=1)
            lows = (x @ down).chunk(len(group), dim=-1)
            self.by_input[id(x)] = (x, dict(zip(group, lows, strict=True)))
        x, lows = self.by_input[id(x)]
        if i in lows:
            return lows[i]
        return x @ self.factors[2 * i].view(-1, self.rank)

    @property
    def groups(self) -> dict[int, list[int]]:
        names = [m for m in self.module.unet.named_modules() if any(m[1] is layer for layer in self.layers)]
        order = {name: i for i, (name, _) in enumerate(names)}
        found = {}
        for name, i in order.items():
            attention, _, leaf = name.rpartition(".")
            mates = ("to_q", "to_k", "to_v") if ".attn1" in attention else ("to_k", "to_v")
            found[i] = [order[f"{attention}.{mate}"] for mate in mates] if leaf in mates else [i]
        return found

    def _merged(self, layer: nn.Module, i: int) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            rank = self.rank
            down, up = self.factors[2 * i].view(rank, -1), self.factors[2 * i + 1].view(-1, rank)
            weight = layer.weight + (up @ down).view(layer.weight.shape)
            if isinstance(layer, nn.Conv2d):
                return functional.conv2d(x, weight, layer.bias)
            return functional.linear(x, weight, layer.bias)

        return forward


def write(folder: Path, family: str, form: str, rank: int, dtype: torch.dtype) -> Path:
    """Trace one form."""
    from diffusers import UNet2DConditionModel

    from hypersd.engines.specs import ImageShapes, Range, TensorSpec
    from hypersd.export.architectures import PUBLISHED
    from hypersd.export.components import unet_component
    from hypersd.export.trace import trace

    path = folder / f"{family}-{form}-{rank}-{str(dtype)[6:]}" / "model.onnx"
    if (path.parent / "done").exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    unet = UNet2DConditionModel(**PUBLISHED[family].unet).eval()
    torch.set_default_dtype(torch.float32)
    side = SIDES[family]
    extents = [Range(name=n, min=v, opt=v, max=v) for n, v in (("batch", 1), ("height", side), ("width", side))]
    component = unet_component(
        unet, ImageShapes(**dict(zip(("batch", "height", "width"), extents, strict=True))), False, 8
    )
    if form != "plain":
        slotted = Slotted(component.module, unet, rank, form)
        sizes = slotted.sizes if form == "inputs" else [sum(slotted.sizes)]
        specs = {f"lora_{i}": TensorSpec(dtype=str(dtype)[6:], shape=(size,)) for i, size in enumerate(sizes)}
        component = dataclasses.replace(component, module=slotted, inputs=component.inputs | specs)
    with torch.no_grad():
        trace(component, path)
    (path.parent / "done").touch()
    return path


def feeds_of(path: Path) -> dict[str, np.ndarray]:
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    rng, feeds = np.random.default_rng(0), {}
    for value in graph.input:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        kind = np.float16 if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16 else np.float32
        scale = 0.02 if value.name.startswith("lora") else 1
        feeds[value.name] = (scale * rng.standard_normal(shape)).astype(kind)
    feeds["timestep"] = np.array([999], np.float32)
    return feeds


def nodes_of(path: Path) -> int:
    import onnx

    return len(onnx.load(path, load_external_data=False).graph.node)


def serve(path: Path, backend: str) -> None:
    """Load one form, and time a step for each line of standard input; answers are lines of JSON."""
    from hypersd.engines.cores import available_cores

    feeds, began = feeds_of(path), time.perf_counter()
    if backend == "onnxruntime":
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 4
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        run: Any = lambda: session.run(None, feeds)  # noqa: E731
    else:
        import openvino as ov

        from hypersd.engines.openvino.model_passes import take_angles

        model = ov.Core().read_model(path)
        take_angles(model)
        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": available_cores()}
        compiled = ov.Core().compile_model(model, "CPU", {**options, "INFERENCE_PRECISION_HINT": "bf16"})
        request = compiled.create_infer_request()
        for port in compiled.inputs:
            name = port.any_name
            shape = list(port.get_partial_shape().to_shape())
            request.set_tensor(port, ov.Tensor(feeds.get(name, np.zeros(shape, np.float32))))
        run = request.infer
    run()
    print(json.dumps({"load": time.perf_counter() - began}), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        run()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({"seconds": time.perf_counter() - began, "peak": peak}), flush=True)


def compare(paths: dict[str, Path], backend: str, rounds: int) -> None:
    """Time a form beside the plain UNet, in processes that take turns."""
    workers = {}
    for form, path in paths.items():
        command = [sys.executable, __file__, "--serve", str(path), backend]
        workers[form] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        load = json.loads(workers[form].stdout.readline())["load"]
        print(f"  {form}: {nodes_of(path)} nodes, loaded in {load:.1f} s", flush=True)
    seconds: dict[str, list[float]] = {form: [] for form in paths}
    peaks = {}
    for _ in range(rounds):
        for form, worker in workers.items():
            print(file=worker.stdin, flush=True)
            answer = json.loads(worker.stdout.readline())
            seconds[form].append(answer["seconds"])
            peaks[form] = answer["peak"]
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    plain = statistics.median(seconds["plain"])
    for form, values in seconds.items():
        median = statistics.median(values)
        print(f"  {backend} {form}: {median:.3f} s ({median / plain - 1:+.1%}), {peaks[form]:.2f} GiB", flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        return serve(Path(sys.argv[2]), sys.argv[3])
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", choices=SIDES, default="sd15")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--forms", nargs="+", choices=FORMS[1:], default=FORMS[1:])
    parser.add_argument("--backends", nargs="*", default=["onnxruntime", "openvino"])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    for form in ("plain", *args.forms):
        began = time.perf_counter()
        write(args.folder, args.family, form, args.rank if form != "plain" else 0, torch.float32)
        print(f"{form}: written in {time.perf_counter() - began:.0f} s", flush=True)
    for backend in args.backends:
        for form in args.forms:
            names = {"plain": 0, form: args.rank}
            paths = {n: write(args.folder, args.family, n, rank, torch.float32) for n, rank in names.items()}
            compare(paths, backend, args.rounds)


if __name__ == "__main__":
    main()
