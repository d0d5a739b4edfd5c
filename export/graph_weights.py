"""Weights apart from the graph: a graph is traced once for all checkpoints of a base, and takes the weights of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx_ir.tensor_adapters import TorchTensor, to_torch_dtype
from torch import Tensor, nn

PREFIX = "module."  # begins the names of a module's tensors in its graph (:class:`.trace.Positional`)
INLINE_BYTES = 1024  # of a weight that is in the graph's own file


def hide_weights(model: ir.Model, module: nn.Module) -> None:
    """Take the parameters' values out of a graph, so that no optimization can depend on them.

    Names, types and shapes stay. Buffers keep their values, which follow from the configuration.
    """
    for name, _ in module.named_parameters(remove_duplicate=False):
        if (value := model.graph.initializers.get(PREFIX + name)) is not None:
            value.const_value = None


def read_graph(content: bytes, module: nn.Module) -> ir.Model | None:
    """A graph that was traced from a module of the same configuration; None if it does not fit this one.

    Args:
        content: the ONNX file.
        module: the module whose weights it shall take.
    """
    try:
        model = ir.from_proto(onnx.ModelProto.FromString(content))
    except DecodeError:
        return None
    tensors = _tensors(module)
    for name, value in model.graph.initializers.items():
        if name.startswith(PREFIX):
            if name not in tensors or not _fits(value.const_value, tensors[name]):
                return None
        elif isinstance(value.const_value, ir.ExternalTensor):  # in a file that is not read
            return None
    return model


def write_graph(model: ir.Model, module: nn.Module, path: Path) -> list[Path]:
    """Write a graph with a module's weights, large ones in a file beside it. The graph is left without weights.

    Args:
        model: the graph, from :func:`.trace.trace_graph` or :func:`read_graph`.
        module: has the weights.
        path: the ``.onnx`` file to write; its folder must exist.

    Returns:
        The files written, the graph first.
    """
    tensors, initializers = _tensors(module), model.graph.initializers
    weights = {name: TorchTensor(tensors[name], name) for name in initializers if name in tensors}
    large = [weight for weight in weights.values() if weight.nbytes > INLINE_BYTES]
    data = path.with_name(path.name + "_data")
    external = ir.external_data.convert_tensors_to_external(large, path.parent, data.name) if large else []
    for name, tensor in {**weights, **{str(tensor.name): tensor for tensor in external}}.items():
        initializers[name].const_value = tensor
    try:
        ir.save(model, path)
    finally:
        for name in weights:
            initializers[name].const_value = None
    return [path, data] if large else [path]


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by their names in the graph."""
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {PREFIX + name: tensor for name, tensor in named}


def _fits(stored: Any, tensor: Tensor) -> bool:
    return tuple(stored.shape) == tuple(tensor.shape) and to_torch_dtype(stored.dtype) == tensor.dtype
