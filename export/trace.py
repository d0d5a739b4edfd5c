"""Traces a torch module to an ONNX file."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from ..engines.specs import Range, TensorSpec
from .components import ComponentModule
from .graph_weights import hide_weights, write_graph
from .passes import PASSES

OPSET = 23  # the first that keeps Attention whole; GroupNormalization is typed as its input since 21
TRACE_SEED = 0


def trace(component: ComponentModule, path: Path) -> list[Path]:
    """Export a component, its weights beside the graph as external data.

    Args:
        component: the module and its specs.
        path: the ``.onnx`` file to write; its folder must exist.

    Returns:
        The files written, the graph first.
    """
    return write_graph(trace_graph(component), component.module, path)


def trace_graph(component: ComponentModule) -> Any:
    """Trace a component with torch's dynamo exporter.

    Returns:
        The graph as an ``onnx_ir.Model`` without weights. It follows from the module's configuration alone: nothing
        that shapes it has seen a weight.
    """
    extents = {name: _trace_extent(extent, i) for i, (name, extent) in enumerate(component.ranges.items())}
    example = component.random_inputs(extents, TRACE_SEED)
    dims = tuple(_dynamic_dims(spec) for spec in component.inputs.values())
    with _quiet(), torch.no_grad():
        # The ONNX exporter's own capture fails for varying sizes and then takes three times as long (strict mode).
        captured = torch.export.export(Positional(component.module), tuple(example), dynamic_shapes=(dims,))
        program = torch.onnx.export(
            captured,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(component.inputs),
            output_names=list(component.outputs),
            optimize=False,
            verbose=False,
        )
        assert program is not None  # None only comes back from the exporter that writes the file itself
        hide_weights(program.model, component.module)
        for rewrite in PASSES:
            rewrite(program.model, component)
    return program.model


class Positional(nn.Module):
    """A module that takes its inputs as one variadic argument, for which the exporter's rule on shapes is simplest."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Any:
        return self.module(*inputs)


def _trace_extent(extent: Range, index: int) -> int:
    """An extent that the tracer cannot take for a constant or for another dimension.

    1 would be taken for a constant, and two equal extents for one dimension. With an odd one,
    diffusers' UNet asks for the sizes to upsample to instead of doubling, which is right for every size.
    """
    wanted = max(3 + 2 * index, extent.min | 1)
    while wanted + 2 <= extent.max and wanted % 4 != (1 if index % 2 else 3):
        wanted += 2
    return min(wanted, extent.max)


def _dynamic_dims(spec: TensorSpec) -> dict[int, Any] | None:
    dims = {axis: Dim.AUTO for axis, dim in enumerate(spec.shape) if isinstance(dim, Range)}
    return dims or None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter, whose output is about itself (torchvision, deprecations) and not about the model."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
