"""Hand-made graphs for the tests of engines, and inputs for any graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

from hypersd.engines.engine import TORCH_DTYPES
from hypersd.engines.specs import Component, Range, TensorSpec, dim_range

ROWS, COLUMNS = (Range(name=name, min=1, opt=2, max=8) for name in ("rows", "columns"))


def write_graph(path: Path, nodes: Sequence[Any], inputs: dict[str, Any], outputs: dict[str, Any]) -> Component:
    """Write a graph; ``inputs`` and ``outputs`` are shapes, floats all."""

    def describe(name: str, shape: tuple[Any, ...]) -> onnx.ValueInfoProto:
        named = [dim.name if isinstance(dim, Range) else dim for dim in shape]
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, named)

    graph = helper.make_graph(
        nodes, "g", [describe(*item) for item in inputs.items()], [describe(*item) for item in outputs.items()]
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return component(inputs, outputs)


def write_add(path: Path) -> Component:
    """out [rows, columns] = a [rows, columns] + the transpose of b [columns, rows], all sizes 1 to 8."""
    nodes = [helper.make_node("Transpose", ["b"], ["t"]), helper.make_node("Add", ["a", "t"], ["out"])]
    return write_graph(path, nodes, {"a": (ROWS, COLUMNS), "b": (COLUMNS, ROWS)}, {"out": (ROWS, COLUMNS)})


def write_attention(folder: Path) -> Path:
    """A file with one Attention node."""
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2, 4, 8]) for name in "qkv"]
    result = helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, 2, 4, 8])
    graph = helper.make_graph([helper.make_node("Attention", [*"qkv"], ["out"])], "g", inputs, [result])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def component(inputs: dict[str, Any], outputs: dict[str, Any]) -> Component:
    def specs(shapes: dict[str, Any]) -> dict[str, TensorSpec]:
        return {name: TensorSpec(dtype="float32", shape=shape) for name, shape in shapes.items()}

    return Component(inputs=specs(inputs), outputs=specs(outputs), files=("net.onnx",), key="0" * 64)


def random_feeds(specs: Mapping[str, TensorSpec], seed: int) -> dict[str, Tensor]:
    """Inputs at the usual extents."""
    generator = torch.Generator().manual_seed(seed)
    feeds = {}
    for name, spec in specs.items():
        shape = [dim_range(dim).opt for dim in spec.shape]
        if spec.dtype == "int64":
            feeds[name] = torch.randint(0, 500, shape, generator=generator)
        else:
            feeds[name] = torch.randn(shape, generator=generator).to(TORCH_DTYPES[spec.dtype])
    return feeds
