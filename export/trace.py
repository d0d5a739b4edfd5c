"""From a torch module to an ONNX file."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from ..engines.manifest import Range, TensorSpec
from .networks import Network

OPSET = 23  # the first that keeps Attention whole; GroupNormalization is typed as its input since 21
TRACE_SEED = 0


def trace(network: Network, path: Path) -> list[Path]:
    """Export a network with torch's dynamo exporter, weights beside the graph as external data.

    Args:
        network: what to export.
        path: the ``.onnx`` file to write; its folder must exist.

    Returns:
        The files written, the graph first.
    """
    import onnx_ir as ir

    extents = {name: _trace_extent(extent, i) for i, (name, extent) in enumerate(network.ranges.items())}
    example = network.random_inputs(extents, TRACE_SEED)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            Positional(network.module),
            tuple(example),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(network.inputs),
            output_names=list(network.outputs),
            dynamic_shapes=(tuple(_dynamic_dims(spec) for spec in network.inputs.values()),),
            optimize=False,
            verbose=False,
        )
        assert program is not None  # None only comes back from the exporter that writes the file itself
        weights = list(program.model.graph.initializers.values())
        program.optimize()
    model = program.model
    _name_dims(model.graph.inputs, network.inputs)
    _name_dims(model.graph.outputs, network.outputs)
    _drop_traces(model)
    data = path.with_name(path.name + "_data")
    ir.save(model, path, external_data=data.name, size_threshold_bytes=1024)
    _drop_weights([*weights, *model.graph.initializers.values()])
    return [path, data] if data.exists() else [path]


class Positional(nn.Module):
    """A module whose inputs are all of one variadic argument: the exporter has a rule for those and one for others."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Any:
        return self.module(*inputs)


def _trace_extent(extent: Range, index: int) -> int:
    """An extent that the tracer can't mistake for a constant or for another dimension.

    1 would be taken for a constant, and two equal extents for one dimension. An odd one makes diffusers' UNet ask for
    the sizes of what it upsamples instead of doubling them, which is right for every size.
    """
    wanted = max(3 + 2 * index, extent.min | 1)
    while wanted + 2 <= extent.max and wanted % 4 != (1 if index % 2 else 3):
        wanted += 2
    return min(wanted, extent.max)


def _dynamic_dims(spec: TensorSpec) -> dict[int, Any] | None:
    dims = {axis: Dim.AUTO for axis, dim in enumerate(spec.shape) if isinstance(dim, Range)}
    return dims or None


def _name_dims(values: Sequence[Any], specs: dict[str, TensorSpec]) -> None:
    """Give the graph's ends the manifest's shapes, with the names of what varies."""
    import onnx_ir as ir

    for value in values:
        spec = specs[value.name]
        value.shape = ir.Shape([dim.name if isinstance(dim, Range) else dim for dim in spec.shape])


def _drop_traces(model) -> None:
    """Leave out the Python stack traces of every node: they are most of the file, and tell of this machine's paths."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()


def _drop_weights(initializers: list[Any]) -> None:
    """Let go of the module's weights: onnxscript's rewriter keeps the last graph that it saw alive."""
    for value in initializers:
        value.const_value = None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter, which prints and warns about itself (torchvision, deprecations) and not about the model."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
