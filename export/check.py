"""Is an exported file the network that it was traced from?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engines.compare import TOLERANCES, differences
from ..engines.onnx_runtime import make_plain_session
from ..errors import BundleError, ExportError, one_line
from .networks import Network

CHECK_SEED = 1  # not the inputs that were traced
LARGE_CONSTANT = 4096


@dataclasses.dataclass(frozen=True)
class Case:
    """Inputs, and what the torch module makes of them."""

    extents: dict[str, int]
    inputs: dict[str, Tensor]
    expected: list[Tensor]


def reference_cases(network: Network) -> list[Case]:
    """Run the torch module at both ends of every range (once if nothing varies).

    They are run before the graph is, so that module and graph need not be in memory together.
    """
    cases = []
    for seed, extents in enumerate(_ends(network), start=CHECK_SEED):
        inputs = dict(zip(network.inputs, network.random_inputs(extents, seed), strict=True))
        with torch.no_grad():
            outputs = network.module(*inputs.values())
        expected = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        cases.append(Case(extents, inputs, expected))
    return cases


def _ends(network: Network) -> Iterator[dict[str, int]]:
    yield {name: extent.min for name, extent in network.ranges.items()}
    if network.ranges:
        yield {name: extent.max for name, extent in network.ranges.items()}


def check_graph(path: Path, weight_bytes: int) -> None:
    """Run ONNX's own checker, and see that every node's types agree and no weight kept a wider type.

    Args:
        path: the ONNX file.
        weight_bytes: 2 for a float16 graph, 4 for a float32 one.

    Raises:
        ExportError: what is wrong with the file.
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
    """See that every node of an ``onnx.ModelProto`` gets the types and shapes that it takes.

    Raises:
        ExportError: what is wrong with the file ``path``.
    """
    import onnx

    try:
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    except Exception as error:  # onnx raises several unrelated classes
        raise ExportError(f"{path} is not valid ONNX: {one_line(error)}") from error


def check_outputs(path: Path, cases: list[Case]) -> float:
    """Run the file on ONNX Runtime's CPU provider and compare it with the torch module.

    Returns:
        The largest error over all cases and outputs, as a part of the reference's largest value.

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
            worst = max(worst, _compare(f"{path}: {name} at {case.extents or 'its shape'}", array, expected))
    return worst


def _compare(what: str, array: Any, expected: Tensor) -> float:
    largest_allowed, rms_allowed = TOLERANCES[str(expected.dtype).removeprefix("torch.")]
    reference = expected.float().numpy()
    if not np.isfinite(reference).all():
        raise ExportError(f"{what} is not finite in torch: try --precision fp32")
    actual = np.asarray(array, np.float32)
    if actual.shape != reference.shape:
        raise ExportError(f"{what} has the shape {actual.shape}, torch gave {reference.shape}")
    if not np.isfinite(actual).all():
        raise ExportError(f"{what} is not finite: try --precision fp32")
    largest, rms = differences(actual, reference)
    if largest > largest_allowed or rms > rms_allowed:
        raise ExportError(
            f"{what} differs from torch by {largest:.1e} at most and {rms:.1e} in the mean, "
            f"allowed are {largest_allowed:.0e} and {rms_allowed:.0e}"
        )
    return largest
