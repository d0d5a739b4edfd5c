"""Graphs for parsers and runtimes that are older than the graphs: newer operators written in terms of older ones.

Tests hold every component against the recorded lists of what each version takes (``tests/assets/operators``).
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BundleError, DeviceError, EngineError, one_line

if TYPE_CHECKING:
    import onnx

DEQUANTIZE = "DequantizeLinear"
# Operators of our graphs, expanded or not, and the opset since which they mean the same: later ones take more types, or
# have attributes more, whose defaults are what the operator did before.
UNCHANGED_SINCE = dict.fromkeys(
    (
        *("Cast", "CastLike", "Constant", "ConstantOfShape", "Conv", "Cos", "Equal", "Identity", "ReduceMax"),
        *("Reshape", "Resize", "Round", "Shape", "Sin", "Squeeze", "Transpose", "Unsqueeze"),
    ),
    18,
) | {DEQUANTIZE: 19}  # before, its scales are float32


@dataclasses.dataclass(frozen=True)
class Dialect:
    """The ONNX that one version of a parser or runtime takes.

    Attributes:
        opset: its newest opset, 18 or later.
        lacks: operators that it does not take, of those that ONNX defines as functions of others.
    """

    opset: int
    lacks: frozenset[str] = frozenset()


def lower(path: Path, dialect: Dialect) -> bytes:
    """The graph in a dialect: what it lacks is expanded as ONNX itself defines it, and the opset is not above its own.

    The weights are neither read nor copied: load the result under the path of the file that it was made from. It
    requires the package ``onnx``.

    Raises:
        BundleError: the file cannot be read as an ONNX file.
        EngineError: an operator means something else in that opset, or ``onnx`` is not installed.
    """
    model = read_graph(path)
    import onnx.inliner

    functions = [("", operator) for operator in sorted(dialect.lacks)]
    model = onnx.inliner.inline_selected_functions(model, functions, inline_schema_functions=True)
    opset = next(entry for entry in model.opset_import if not entry.domain)
    if opset.version > dialect.opset:
        if dialect.opset < UNCHANGED_SINCE[DEQUANTIZE]:
            _multiply_scales(model.graph, path)
        for node in model.graph.node:
            _restate(node, opset.version, dialect.opset, path)
        opset.version = dialect.opset
    return model.SerializeToString()


def read_graph(path: Path) -> onnx.ModelProto:
    """The model of an ONNX file, without the weights that lie beside it.

    Raises:
        BundleError: it cannot be read as an ONNX file.
        DeviceError: ``onnx`` is not installed.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ModuleNotFoundError as error:
        raise DeviceError(f"{path} has to be rewritten for what is installed here: pip install onnx") from error
    try:
        return onnx.load(str(path), load_external_data=False)
    except (OSError, DecodeError) as error:
        raise BundleError(f"{path} cannot be read as an ONNX file ({one_line(error)}): export it again") from error


def with_resolved_weights(content: bytes, path: Path) -> tuple[bytes, Path]:
    """A graph whose external data are named without links, and the folder that its names are relative to.

    ONNX Runtime reads no weights by a link out of the folder that it is given (the Hub's cache consists of links).

    Args:
        content: the graph.
        path: the file that it was made from.
    """
    import onnx

    model = onnx.load_from_string(content)
    entries = [entry for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"]
    files = {entry.value: (path.parent / entry.value).resolve() for entry in entries}
    folder = Path(os.path.commonpath([path.parent.resolve(), *(file.parent for file in files.values())]))
    for entry in entries:
        entry.value = files[entry.value].relative_to(folder).as_posix()
    return model.SerializeToString(), folder


def _multiply_scales(graph: onnx.GraphProto, path: Path) -> None:
    """Write 8-bit weights times the scale of each row as a product, in place of ``DequantizeLinear``.

    Raises:
        EngineError: it dequantizes something else than a matrix by its rows.
    """
    from onnx import helper

    tensors = {tensor.name: tensor for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        if node.op_type != DEQUANTIZE:
            nodes.append(node)
            continue
        weight, scale, *zero_point = (tensors.get(name) for name in node.input)
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        if zero_point or weight is None or scale is None or (len(weight.dims), attributes) != (2, {"axis": 0}):
            raise EngineError(f"{path}: {DEQUANTIZE} is of a matrix and its rows' scales alone in opsets before 19")
        product = node.output[0]
        factor, axes, column = (f"{product}/{part}" for part in ("weight", "axes", "scale"))
        nodes += [
            helper.make_node("Cast", [weight.name], [factor], to=scale.data_type),
            helper.make_node("Constant", [], [axes], value_ints=[1]),
            helper.make_node("Unsqueeze", [scale.name, axes], [column]),
            helper.make_node("Mul", [factor, column], [product]),
        ]
    del graph.node[:]
    graph.node.extend(nodes)


def _restate(node: onnx.NodeProto, newer: int, older: int, path: Path) -> None:
    """Write a node as its operator is in an older opset: without the attributes that are newer, if they are defaults.

    No operator of ours has a graph in an attribute.
    """
    import onnx

    if node.domain:
        return
    schema = onnx.defs.get_schema(node.op_type, newer)
    if not onnx.defs.has(node.op_type, max_inclusive_version=older):
        raise EngineError(f"{path}: {node.op_type} does not exist in opset {older}, and is not expanded")
    old = onnx.defs.get_schema(node.op_type, older)
    if old.since_version == schema.since_version:
        return
    newer_attributes = [attribute for attribute in node.attribute if attribute.name not in old.attributes]
    is_unchanged = older >= UNCHANGED_SINCE.get(node.op_type, newer)
    if not is_unchanged or not all(_is_default(a, schema) for a in newer_attributes):
        raise EngineError(f"{path}: {node.op_type} of opset {newer} cannot be written in opset {older}")
    for attribute in newer_attributes:
        node.attribute.remove(attribute)


def _is_default(attribute: onnx.AttributeProto, schema: Any) -> bool:
    import onnx

    default = schema.attributes[attribute.name].default_value
    return onnx.helper.get_attribute_value(attribute) == onnx.helper.get_attribute_value(default)
