"""A component's ONNX file as compiled models of OpenVINO."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import BundleError, HyperSDError
from ..engine import check_graph
from ..mapped_files import release_pages
from ..specs import Component
from ..stored_models import find_stored_model, open_stored
from .library import PRECISIONS, core, in_short, load_library
from .model_passes import expand_group_normalizations, holds_float32, take_angles, widen

if TYPE_CHECKING:
    import openvino as ov

ANGLES, STORED = "angles.xml", "model.xml"
# Inputs that share a scale where OpenVINO rounds activations to 8 bits, to multiply them with int8 weights: a step of
# SD1.5 at 512x512 takes 1.91 s (Zen 4), with OpenVINO's own 32 1.97 s, without rounding 2.14 s, in bfloat16 2.08 s.
GROUP_SIZE = 128


def compile_graph(path: Path, component: Component, precision: str, threads: int) -> list[ov.CompiledModel]:
    """Compile a graph for the CPU; in bf16 the model of its angles comes first (:func:`.model_passes.take_angles`).

    Raises:
        BundleError: OpenVINO cannot read the file, or its tensors are not the component's.
    """
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP_SIZE,
    }
    folder = path.parent
    try:
        models = _read(path, component, precision)
        if (stored := _stored(path, component, precision, models)) is not None:
            folder, models = stored
        return [
            core().compile_model(model, "CPU", {**options, "INFERENCE_PRECISION_HINT": PRECISIONS[its_precision]})
            for its_precision, model in models.items()
        ]
    except HyperSDError:
        raise
    except Exception as error:  # OpenVINO's exceptions share no base class but this
        raise BundleError(f"{path} cannot be loaded by OpenVINO: {in_short(error)}") from error
    finally:
        release_pages(folder)  # packed weights lie elsewhere


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


def _stored(
    path: Path, component: Component, precision: str, models: dict[str, ov.Model]
) -> tuple[Path, dict[str, ov.Model]] | None:
    """The folder of the stored models, and these; None if none are stored (:mod:`..stored_models`).

    Float32 weights for bfloat16 are stored as float16: half to read, and half of the memory. Float16 weights are
    compiled from the bundle's own file: a stored one would be the same again.
    """
    stored = None if precision == "fp32" else find_stored_model(path, component, load_library().__version__, STORED)
    if stored is None or not holds_float32(models[precision]):
        return None
    read = open_stored(stored, functools.partial(_store, models), _load_stored)
    return (stored.folder, read) if read else None


def _store(models: dict[str, ov.Model], graph: Path) -> None:
    """Write the network with float16 weights, and the angles' model beside it as it is: it is exact."""
    for precision, model in models.items():
        is_network = precision != "fp32"
        load_library().save_model(model, graph if is_network else graph.with_name(ANGLES), compress_to_fp16=is_network)


def _load_stored(graph: Path) -> dict[str, ov.Model]:
    angles = graph.with_name(ANGLES)
    try:
        models = {"fp32": core().read_model(angles)} if angles.exists() else {}
        return {**models, "bf16": core().read_model(graph)}
    except Exception as error:  # OpenVINO's exceptions share no base class but this
        raise BundleError(f"{graph} cannot be loaded by OpenVINO: {in_short(error)}") from error
