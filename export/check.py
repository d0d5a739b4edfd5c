"""Checks that an exported file computes what the module computes that it was traced from."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engines.compare import differences, excess
from ..engines.onnx_runtime import make_plain_session
from ..engines.precision import Precision
from ..engines.random_inputs import ends_of_ranges
from ..errors import BundleError, ExportError, one_line
from .components import ComponentModule

CHECK_SEED = 1  # not the inputs that were traced
LARGE_CONSTANT = 4096


@dataclasses.dataclass(frozen=True)
class Case:
    """Inputs, and the torch module's outputs."""

    extents: dict[str, int]
    inputs: dict[str, Tensor]
    expected: list[Tensor]


def reference_cases(component: ComponentModule) -> list[Case]:
    """Run the torch module at both ends of every range (:func:`..engines.random_inputs.ends_of_ranges`).

    The module runs before the graph does, so that both need not be in memory together.
    """
    cases = []
    for seed, ends in enumerate(ends_of_ranges(component.ranges), start=CHECK_SEED):
        extents = {name: getattr(component.ranges[name], end) for name, end in ends.items()}
        inputs = dict(zip(component.inputs, component.random_inputs(extents, seed), strict=True))
        with torch.no_grad():
            outputs = component.module(*inputs.values())
        expected = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        cases.append(Case(extents, inputs, expected))
    return cases


def check_graph(path: Path, weight_bytes: int) -> None:
    """Run ONNX's own checker; check that every node's types agree and that no weight kept a wider type.

    Args:
        path: the ONNX file.
        weight_bytes: 2 for a float16 graph, 4 for a float32 one.

    Raises:
        ExportError: the file fails a check.
    """
    import onnx

    try:
        onnx.checker.check_model(str(path))
    except Exception as error:  # onnx raises several unrelated classes
        raise ExportError(f"{path} is not valid ONNX: {one_line(error)}") from error
    model = onnx.load(str(path), load_external_data=False)
    check_types(model, path)
    wider = {onnx.TensorProto.DOUBLE: "float64"} | ({onnx.TensorProto.FLOAT: "float32"} if weight_bytes == 2 else {})
    for kind, name in wider.items():
        wide = [
            tensor.name
            for tensor in model.graph.initializer
            if tensor.data_type == kind and np.prod(tensor.dims) > LARGE_CONSTANT
        ]
        if wide:
            graph = f"float{8 * weight_bytes}"
            raise ExportError(f"{path}: weights stayed {name} in a {graph} graph: {', '.join(sorted(wide)[:10])}")


def check_types(model: Any, path: Path) -> None:
    """Check that every node of an ``onnx.ModelProto`` receives the types and shapes that it takes.

    Raises:
        ExportError: a node does not; the message names ``path``.
    """
    import onnx

    try:
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    except Exception as error:  # onnx raises several unrelated classes
        raise ExportError(f"{path} is not valid ONNX: {one_line(error)}") from error


def check_outputs(path: Path, cases: list[Case], precision: Precision) -> float:
    """Run the file on ONNX Runtime's CPU provider and compare it with the torch module.

    Args:
        path: the ONNX file.
        cases: inputs, and the module's outputs.
        precision: of the component; its tolerance decides.

    Returns:
        The largest error over all cases and outputs, as a fraction of the reference's largest value.

    Raises:
        ExportError: an output differs, or ONNX Runtime cannot run the file.
    """
    try:
        session = make_plain_session(path)
    except BundleError as error:
        raise ExportError(str(error)) from error
    worst = 0.0
    for case in cases:
        feeds = {name: tensor.numpy() for name, tensor in case.inputs.items()}
        try:
            actual = session.run(None, feeds)
        except Exception as error:  # onnxruntime's exceptions share no base class but this
            raise ExportError(f"{path} does not run at {case.extents}: {one_line(error)}") from error
        names = [output.name for output in session.get_outputs()]
        for name, array, expected in zip(names, actual, case.expected, strict=True):
            worst = max(worst, _compare(f"{path}: {name} at {case.extents or 'its shape'}", array, expected, precision))
    return worst


def _compare(what: str, array: Any, expected: Tensor, precision: Precision) -> float:
    reference = expected.float().numpy()
    if not np.isfinite(reference).all():
        raise ExportError(f"{what} is not finite in torch: try --precision fp32")
    actual = np.asarray(array, np.float32)
    if actual.shape != reference.shape:
        raise ExportError(f"{what} has the shape {actual.shape}, torch gave {reference.shape}")
    if not np.isfinite(actual).all():
        raise ExportError(f"{what} is not finite: try --precision fp32")
    largest, rms = differences(actual, reference)
    if words := excess(largest, rms, precision.tolerance):
        raise ExportError(f"{what} differs from torch {words}")
    return largest
