"""ONNX graphs put together from existing graphs and from arithmetic that is recorded as it runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import Tensor

from ..engines.specs import TensorSpec
from ..export.trace import OPSET


class Recorder:
    """A growing graph: nodes in their order of creation, and their weights."""

    def __init__(self, root: Path) -> None:
        """``root``: the folder of the graph's file, or a parent of it."""
        self.root = root
        self.inputs: list[ir.Value] = []
        self._nodes: list[ir.Node] = []
        self._initializers: dict[str, ir.Value] = {}

    def input(self, name: str, spec: TensorSpec) -> ir.Value:
        """Add an input."""
        value = ir.Value(name=name, type=_type(spec.dtype), shape=ir.Shape(spec.shape_at({})))
        self.inputs.append(value)
        return value

    def constant(self, array: np.ndarray) -> ir.Value:
        """Add a small array, stored in the graph itself."""
        return self._initializer(f"constant_{len(self._initializers)}", ir.Tensor(array))

    def node(self, operator: str, *inputs: ir.Value, dtype: ir.DataType | None = None, **attributes: Any) -> ir.Value:
        """Add a node with one output, of the first input's type unless ``dtype`` is given; return the output."""
        name = f"{operator.lower()}_{len(self._nodes)}"
        output = ir.Value(name=name, type=ir.TensorType(dtype or _dtype(inputs[0])))
        attributed = ir.convenience.convert_attributes(attributes)
        self._nodes.append(ir.Node("", operator, inputs, attributed, outputs=[output], name=name))
        return output

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """The value in another type; itself if it has that type."""
        return value if _dtype(value) == dtype else self.node("Cast", value, dtype=dtype, to=dtype.value)

    def inline(self, component: str, call: str, graph: ir.Graph, feeds: Mapping[str, ir.Value]) -> list[ir.Value]:
        """Copy a component's nodes onto other inputs; return the copy's outputs.

        Args:
            component: the component's name; all its copies share the initializers.
            call: the copy's name, a prefix of its nodes' names.
            graph: the component, loaded from the file ``root/component/...``.
            feeds: the values of its inputs, by name.
        """
        values: dict[ir.Value | None, ir.Value | None] = {None: None}
        values |= {value: feeds[str(value.name)] for value in graph.inputs}
        for value in graph.initializers.values():
            values[value] = self._shared(component, value)
        for node in graph:
            for value in node.outputs:
                values[value] = ir.Value(name=f"{call}/{value.name}", type=value.type)  # shapes may differ here
            inputs, outputs = [values[value] for value in node.inputs], [values[value] for value in node.outputs]
            attributes = list(node.attributes.values())
            self._nodes.append(
                ir.Node(node.domain, node.op_type, inputs, attributes, outputs=outputs, name=f"{call}/{node.name}")  # type: ignore[arg-type]
            )
        return [values[value] for value in graph.outputs]  # type: ignore[misc]

    def model(self, outputs: Mapping[str, tuple[ir.Value, TensorSpec]], producer: str) -> ir.Model:
        """The finished graph; ``outputs`` gives its outputs their names, types and shapes."""
        for name, (value, spec) in outputs.items():
            value.name, value.type, value.shape = name, _type(spec.dtype), ir.Shape(spec.shape_at({}))
        graph = ir.Graph(
            self.inputs,
            [value for value, _ in outputs.values()],
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports={"": OPSET},
            name=producer,
        )
        return ir.Model(graph, ir_version=10, producer_name=producer)

    def _shared(self, component: str, value: ir.Value) -> ir.Value:
        """A component's weight in this graph: a reference to the component's own file, not a copy."""
        name, tensor = f"{component}/{value.name}", value.const_value
        if name in self._initializers:
            return self._initializers[name]
        if isinstance(tensor, ir.ExternalTensor):
            location = (Path(tensor.base_dir) / tensor.location).relative_to(self.root).as_posix()
            tensor = ir.ExternalTensor(
                location, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=name, base_dir=self.root
            )
        assert tensor is not None
        return self._initializer(name, tensor)

    def _initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        shape = ir.Shape(tensor.shape.numpy())
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
        self._initializers[name] = value
        return value


class Recorded:
    """A value of the graph with a torch tensor's operators: computations with it become nodes.

    It supports the operators that the samplers' steps use. As in torch a 0-dim float32 tensor is a plain number: the
    operation is done in float32 and rounded once, to the type of the image.
    """

    def __init__(self, recorder: Recorder, value: ir.Value) -> None:
        self.recorder = recorder
        self.value = value

    def __add__(self, other: Recorded) -> Recorded:
        return self._new(self.recorder.node("Add", self.value, other.value))

    def __sub__(self, other: Recorded) -> Recorded:
        return self._new(self.recorder.node("Sub", self.value, other.value))

    def __rmul__(self, number: Tensor) -> Recorded:
        return self._with_number("Mul", number)

    def __truediv__(self, number: Tensor) -> Recorded:
        return self._with_number("Div", number)

    def clamp(self, least: float, most: float) -> Recorded:
        """Limit the values to a range."""
        bounds = [self._constant(bound) for bound in (least, most)]
        return self._new(self.recorder.node("Clip", self.value, *bounds))

    def _with_number(self, operator: str, number: Tensor) -> Recorded:
        wide = self.recorder.cast(self.value, ir.DataType.FLOAT)
        result = self.recorder.node(operator, wide, self.recorder.constant(np.float32(number.item()).reshape(())))
        return self._new(self.recorder.cast(result, _dtype(self.value)))

    def _constant(self, number: float) -> ir.Value:
        return self.recorder.constant(np.array(number, _dtype(self.value).numpy()))

    def _new(self, value: ir.Value) -> Recorded:
        return Recorded(self.recorder, value)


def _type(dtype: str) -> ir.TensorType:
    return ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype)))


def _dtype(value: ir.Value) -> ir.DataType:
    assert value.dtype is not None  # the exporter's graphs and our own nodes give every value a type
    return value.dtype
