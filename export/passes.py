"""Graph rewrites between tracing and checking, as a list of passes.

A pass sees names, types and shapes of weights, and no values: the graph serves other checkpoints too
(:mod:`.graph_weights`). A format that stores weights in fewer bits is a pass more: it puts its dequantize nodes into
the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from onnx_ir.tensor_adapters import from_torch_dtype

from ..engines.specs import Range, TensorSpec
from .components import ComponentModule
from .graph_weights import PREFIX
from .int8_weights import INT8, SCALE

Pass = Callable[[Any, ComponentModule], None]  # changes an onnx_ir.Model in place

# The rewrite rules of onnxscript that find something in these networks. Some came after its lowest supported version.
RULES = (
    "collapse_slice2_rule",
    "div_by_1_rule",
    "fuse_pad_into_conv_rule",
    "materialize_reshape_shape_rule",
    "mul_by_1_rule",
    "no_op_transpose_rule",
    "remove_optional_bias_from_conv_rule",
    "squeeze_reshape_1d_rule",
    "transpose_transpose_rule",
    "unsqueeze_unsqueeze_rule",
)
ROUNDS = 2  # a folded constant makes rules match, and the other way round


def simplify(model: Any, component: ComponentModule) -> None:
    """Fold constants, apply `RULES`, and keep one of equal constants and nodes.

    The result is that of `torch.onnx.ONNXProgram.optimize`, which tries forty rules more and lists the whole graph at
    each node for one of them: that would be 19 of the 44 seconds that tracing SDXL's UNet takes.
    """
    import onnx_ir as ir
    import onnx_ir.passes.common as common
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter.rules import common as rules

    applied = [getattr(rules, name) for name in RULES if hasattr(rules, name)]
    for _ in range(ROUNDS):
        optimizer.fold_constants(model, onnx_shape_inference=True)
        rewriter.rewrite(model, applied)
    ir.passes.Sequential(
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.NameFixPass(),
    )(model)


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


def dequantize_weights(model: Any, component: ComponentModule) -> None:
    """Compute each weight that the module has in 8 bits from these and their scales (:mod:`.int8_weights`)."""
    import onnx_ir as ir

    graph, buffers = model.graph, dict(component.module.named_buffers())
    for layer in [name.removesuffix(INT8) for name in buffers if name.endswith(INT8)]:
        weight = graph.initializers.pop(f"{PREFIX}{layer}weight")
        factors = [
            ir.Value(
                name=PREFIX + name,
                shape=ir.Shape(buffers[name].shape),
                type=ir.TensorType(from_torch_dtype(buffers[name].dtype)),
            )
            for name in (layer + INT8, layer + SCALE)
        ]
        product = ir.Value(name=weight.name, shape=weight.shape, type=weight.type)
        weight.replace_all_uses_with(product)
        graph.initializers.update({factor.name: factor for factor in factors})
        graph.insert_before(graph[0], ir.node("DequantizeLinear", factors, {"axis": 0}, outputs=[product]))


def compare_floats(model: Any, component: ComponentModule) -> None:
    """Find the largest token id among floats: ONNX Runtime has no CUDA kernel for ``ArgMax`` of integers.

    A float32 holds every id up to 2^24; no vocabulary is as large. CLIP casts its ids to int32 for this.
    """
    import onnx_ir as ir

    for node in model.graph.all_nodes():
        cast = node.inputs[0].producer() if node.op_type == "ArgMax" else None
        if cast is None or cast.op_type != "Cast" or len(cast.outputs[0].uses()) != 1:
            continue
        if cast.attributes["to"].value == ir.DataType.INT32:
            cast.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
            cast.outputs[0].dtype = ir.DataType.FLOAT


PASSES: tuple[Pass, ...] = (simplify, name_dimensions, drop_stack_traces, compare_floats, dequantize_weights)
