#!/usr/bin/env python
"""Measure what it would save to compute cross-attention's keys and values once for each prompt.

    python scripts/measure_cross_attention.py /tmp/full/sd15/fp32/unet/model.onnx

They depend on the prompt alone and are the same in every step. A copy of the UNet's graph, on the same weights, takes
them as inputs; the two graphs take turns. What is saved is an upper bound: something would have to compute them once.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

DTYPES = {onnx.TensorProto.FLOAT: np.float32, onnx.TensorProto.FLOAT16: np.float16}


def without_projections(source: Path) -> tuple[Path, dict[str, str]]:
    """A graph beside ``source`` whose projections of the prompt are inputs, and their weights by input."""
    model = onnx.load(source, load_external_data=False)
    graph = model.graph
    projections = [node for node in graph.node if node.op_type == "MatMul" and node.input[0] == "encoder_hidden_states"]
    dtype = next(value.type.tensor_type.elem_type for value in graph.input if value.name == "encoder_hidden_states")
    for node in projections:
        graph.node.remove(node)
        graph.input.append(onnx.helper.make_tensor_value_info(node.output[0], dtype, None))
    graph.input.remove(next(value for value in graph.input if value.name == "encoder_hidden_states"))
    path = source.with_name("measured.onnx")
    onnx.save(model, path)
    return path, {node.output[0]: node.input[1] for node in projections}


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def random_feeds(whole: onnx.GraphProto, batch: int) -> dict[str, np.ndarray]:
    """Unit-variance inputs, and a timestep; dimensions with a name are the batch."""
    rng, feeds = np.random.default_rng(0), {}
    for value in whole.input:
        kind = value.type.tensor_type
        shape = [dim.dim_value or batch for dim in kind.shape.dim]
        feeds[value.name] = rng.standard_normal(shape).astype(DTYPES[kind.elem_type])
    feeds["timestep"] = np.array([999], np.float32)
    return feeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("unet", type=Path, help="a UNet's model.onnx; the copy is written beside it for the run")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    path, weights = without_projections(args.unet)
    model = onnx.load(args.unet, load_external_data=False)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    feeds = random_feeds(model.graph, args.batch)
    text = feeds["encoder_hidden_states"]
    made = {name: np.zeros((*text.shape[:2], shapes[weight][1]), text.dtype) for name, weight in weights.items()}
    try:
        sessions = {"whole": session(args.unet), "given keys and values": session(path)}
    finally:
        path.unlink()
    inputs = {"whole": feeds, "given keys and values": {**feeds, **made}}
    del inputs["given keys and values"]["encoder_hidden_states"]
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    for i in range(args.rounds + 1):
        for name in list(sessions)[:: 1 if i % 2 else -1]:
            began = time.perf_counter()
            sessions[name].run(None, inputs[name])
            if i:  # the first is warm-up
                seconds[name].append(time.perf_counter() - began)
    flops = sum(2 * text.shape[0] * text.shape[1] * np.prod(shapes[weight]) for weight in weights.values())
    print(f"{len(weights)} projections, {flops / 1e9:.2f} GFLOP")
    for name, times in seconds.items():
        print(f"{name}: median {statistics.median(times):.3f} s, least {min(times):.3f} s")
    ratio = statistics.median(a / b for a, b in zip(*seconds.values(), strict=True))
    print(f"whole / given, pair by pair: {ratio:.4f}")


if __name__ == "__main__":
    main()
