"""The least arithmetic and reading of a network, counted from its ONNX graph."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import onnx

from hypersd.errors import BundleError, one_line

from .graph_shapes import Shapes, graph_shapes

Shape = tuple[int, ...]
DOMAINS = ("", "ai.onnx")
OPAQUE = frozenset({"Einsum", "If", "Loop", "Scan"})  # they may hide products from this count


@dataclasses.dataclass(frozen=True)
class Work:
    """The least work of one run of a network.

    Attributes:
        flops: multiplications and additions of its products: convolutions, matrix products and attention.
        weight_bytes: bytes of its weights, each read once, without tables of which it looks up rows.
    """

    flops: int
    weight_bytes: int


def graph_work(path: Path, extents: Mapping[str, int]) -> Work:
    """Count the work of one run.

    Args:
        path: the ONNX file; its external data is not read.
        extents: of every dimension of an input that has a name.

    Raises:
        BundleError: the file is no ONNX graph, or has nodes whose work cannot be told.
        RequestError: an extent is missing.
    """
    model = _load(path)
    for node in model.graph.node:
        if node.domain not in DOMAINS or node.op_type in OPAQUE:
            raise BundleError(f"{path}: the work of {node.name or 'a node'}, {node.op_type}, cannot be counted")
    try:
        shapes = graph_shapes(model, extents)
    except onnx.shape_inference.InferenceError as error:
        raise BundleError(f"{path}: shapes cannot be inferred: {one_line(error)}; export the bundle again") from error
    flops = 0
    for node in model.graph.node:
        if (count := PRODUCTS.get(node.op_type)) is not None:
            flops += 2 * count(*_shapes_of(node, shapes, path))
    return Work(flops, _weight_bytes(model.graph))


def _load(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:  # what protobuf raises shares no base
        raise BundleError(f"{path} cannot be read as ONNX: {one_line(error)}; export the bundle again") from error


def _shapes_of(node: onnx.NodeProto, shapes: Shapes, path: Path) -> tuple[list[Shape | None], Shape]:
    """Of a node's inputs, None for those that it does without, and of its first output."""
    names = [*node.input, node.output[0]]
    if unknown := [name for name in names if name and name not in shapes]:
        raise BundleError(f"{path}: the work of {node.name or node.op_type} is not known: nor is {unknown[0]}'s shape")
    return [shapes[name] if name else None for name in node.input], shapes[node.output[0]]


def _weight_bytes(graph: onnx.GraphProto) -> int:
    read = {
        name for node in graph.node for i, name in enumerate(node.input) if not (node.op_type == "Gather" and i == 0)
    }
    return sum(_size(tensor) for tensor in graph.initializer if tensor.name in read)


def _size(tensor: onnx.TensorProto) -> int:
    return math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def _conv(inputs: Sequence[Shape | None], output: Shape) -> int:
    """Every output is a product with one filter: weights are [M, C/group, kH, kW]."""
    return math.prod(output) * math.prod(_given(inputs, 1)[1:])


def _conv_transpose(inputs: Sequence[Shape | None], output: Shape) -> int:
    """Every input goes through one filter: weights are [C, M/group, kH, kW]."""
    return math.prod(_given(inputs, 0)) * math.prod(_given(inputs, 1)[1:])


def _matmul(inputs: Sequence[Shape | None], output: Shape) -> int:
    return math.prod(output) * _given(inputs, 0)[-1]


def _gemm(inputs: Sequence[Shape | None], output: Shape) -> int:
    """A is [M, K], or transposed; the output is [M, N]."""
    return math.prod(_given(inputs, 0)) * output[1]


def _attention(inputs: Sequence[Shape | None], output: Shape) -> int:
    """Queries by keys, and that by values, in [B, heads, L, D] or [B, L, heads x D]; with a past, past keys besides."""
    length = _given(inputs, 1)[-2]
    if len(inputs) > 4 and (past := inputs[4]) is not None:
        length += past[-2]
    return (math.prod(_given(inputs, 0)) + math.prod(output)) * length


def _given(inputs: Sequence[Shape | None], i: int) -> Shape:
    shape = inputs[i]
    assert shape is not None, "an input that ONNX requires"
    return shape


# multiplications of one node
PRODUCTS: dict[str, Callable[[Sequence[Shape | None], Shape], int]] = {
    "Attention": _attention,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _matmul,
}
