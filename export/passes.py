"""Graph rewrites between tracing and checking, as a list of passes.

A pass sees names, types and shapes of weights, and no values: the graph serves other checkpoints too
(:mod:`.graph_weights`). A format that stores weights in fewer bits is a pass more: it puts its quantize and dequantize
nodes into the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..engines.specs import Range, TensorSpec
from .components import ComponentModule

Pass = Callable[[Any, ComponentModule], None]  # changes an onnx_ir.Model in place


def name_dimensions(model: Any, component: ComponentModule) -> None:
    """Give the graph's inputs and outputs the manifest's shapes, with the names of the dimensions that vary."""
    _name(model.graph.inputs, component.inputs)
    _name(model.graph.outputs, component.outputs)


def _name(values: Sequence[Any], specs: dict[str, TensorSpec]) -> None:
    import onnx_ir as ir

    for value in values:
        value.shape = ir.Shape([dim.name if isinstance(dim, Range) else dim for dim in specs[value.name].shape])


def drop_stack_traces(model: Any, component: ComponentModule) -> None:
    """Remove every node's Python stack trace: they are most of the file, and contain paths of this machine."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()


PASSES: tuple[Pass, ...] = (name_dimensions, drop_stack_traces)
