"""A component's ONNX file as compiled models of OpenVINO."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import BundleError, HyperSDError
from ..engine import check_graph
from ..specs import Component
from .library import PRECISIONS, core, in_short
from .model_passes import expand_group_normalizations, take_angles, widen

if TYPE_CHECKING:
    import openvino as ov


def compile_graph(path: Path, component: Component, precision: str, threads: int) -> list[ov.CompiledModel]:
    """Compile a graph for the CPU; in bf16 the model of its angles comes first (:func:`.model_passes.take_angles`).

    Raises:
        BundleError: OpenVINO cannot read the file, or its tensors are not the component's.
    """
    options = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads}
    try:
        models = _read(path, component, precision)
        return [
            core().compile_model(model, "CPU", {**options, "INFERENCE_PRECISION_HINT": PRECISIONS[its_precision]})
            for its_precision, model in models.items()
        ]
    except HyperSDError:
        raise
    except Exception as error:  # OpenVINO's exceptions share no base class but this
        raise BundleError(f"{path} cannot be loaded by OpenVINO: {in_short(error)}") from error


def _read(path: Path, component: Component, precision: str) -> dict[str, ov.Model]:
    """The models to compile by the precision of each, in the order in which they run."""
    model = core().read_model(path)
    check_graph(path, component, (name for port in [*model.inputs, *model.outputs] for name in port.names))
    models = {} if precision == "fp32" or (angles := take_angles(model)) is None else {"fp32": angles}
    models[precision] = model
    for each in models.values():
        widen(each)
        expand_group_normalizations(each)
    return models
