"""Shapes of all values of an ONNX graph, from the shapes of its inputs alone: no weight is read."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from hypersd.errors import RequestError

INTEGERS = (onnx.TensorProto.INT32, onnx.TensorProto.INT64)
Shapes = dict[str, tuple[int, ...]]


def graph_shapes(model: onnx.ModelProto, extents: Mapping[str, int]) -> Shapes:
    """The shapes of inputs, initializers and nodes' outputs, by name; a value whose shape does not follow is left out.

    Shapes that nodes compute from other shapes, as a Reshape takes them in a graph whose sizes vary, are computed.

    Args:
        model: the graph, with or without its weights.
        extents: of every dimension of an input that has a name.

    Raises:
        RequestError: an extent is missing.
    """
    fixed = _with_fixed_inputs(model, extents)
    numbers = {tensor.name: numpy_helper.to_array(tensor) for tensor in fixed.graph.initializer if _is_number(tensor)}
    shapes = _infer(fixed)
    while _compute_numbers(fixed.graph, shapes, numbers):
        shapes = _infer(fixed)
    return shapes


def _with_fixed_inputs(model: onnx.ModelProto, extents: Mapping[str, int]) -> onnx.ModelProto:
    """A copy whose inputs have fixed shapes, and no shapes of values, which may be expressions."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    del fixed.graph.value_info[:]
    for value in fixed.graph.output:
        value.type.tensor_type.ClearField("shape")
    for value in fixed.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_value"):
                continue
            if dim.dim_param not in extents:
                known = ", ".join(extents) or "none"
                raise RequestError(f"input {value.name}: extent of {dim.dim_param!r} is missing, got those of {known}")
            dim.dim_value = extents[dim.dim_param]
    for node in fixed.graph.node:
        if node.op_type == "GroupNormalization":  # which onnx does not infer, and which keeps its input's shape
            node.op_type = "Identity"
            del node.input[1:], node.attribute[:]
    return fixed


def _is_number(tensor: onnx.TensorProto) -> bool:
    """Whether it may take part in computing a shape: whole numbers in the graph's own file."""
    return tensor.data_type in INTEGERS and tensor.data_location != onnx.TensorProto.EXTERNAL


def _infer(model: onnx.ModelProto) -> Shapes:
    """The shapes that onnx infers."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        tensor = value.type.tensor_type
        if tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor.shape.dim):
            shapes[value.name] = tuple(dim.dim_value for dim in tensor.shape.dim)
    return shapes


def _compute_numbers(graph: onnx.GraphProto, shapes: Shapes, numbers: dict[str, np.ndarray]) -> bool:
    """Replace nodes that compute with known shapes and numbers by what they make; whether there were any."""
    left = []
    for node in graph.node:
        if node.op_type == "Shape" and node.input[0] in shapes:
            feeds = {node.input[0]: np.broadcast_to(np.float32(0), shapes[node.input[0]])}  # takes no memory
        elif node.input and all(name in numbers for name in node.input):
            feeds = {name: numbers[name] for name in node.input}
        else:
            left.append(node)
            continue
        made = dict(zip(node.output, map(np.asarray, ReferenceEvaluator(node).run(None, feeds)), strict=True))
        numbers |= made
        graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in made.items())
    changed = len(left) < len(graph.node)
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in left] if changed else []
    if changed:
        del graph.node[:]
        graph.node.extend(kept)
    return changed
