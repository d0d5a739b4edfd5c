"""Engines of OpenVINO on the CPU. The only module that imports openvino."""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import BundleError, DeviceError, EngineError, HyperSDError, RequestError, one_line
from .by_shapes import ByShapes, ByThread
from .cores import available_cores
from .engine import check_feeds, check_graph
from .specs import Component, TensorSpec

if TYPE_CHECKING:
    import openvino as ov

PRECISIONS = {"fp32": "f32", "bf16": "bf16"}  # hypersd's names to OpenVINO's
PERIODIC = ("Sin", "Cos")
# Places in OpenVINO's own source, which its messages contain.
PLACES = re.compile(r"(Exception from|Check '.*?' failed at) \S+\s*|Caught exception: |std::exception: ")
ANGLES = "hypersd_angles_"  # begins the names of inputs that are added to a model


def load_library() -> Any:
    """The module ``openvino``, which comes with an extra.

    Raises:
        DeviceError: it is not installed, or cannot be loaded.
    """
    try:
        import openvino
    except ImportError as error:
        hint = "pip install -e '.[openvino]' in hypersd's clone"
        raise DeviceError(f"OpenVINO cannot be imported ({one_line(error)}): {hint}") from error
    return openvino


def is_installed() -> bool:
    """Whether OpenVINO is installed."""
    return importlib.util.find_spec("openvino") is not None


@functools.cache
def _core() -> ov.Core:
    """OpenVINO's core, one per process: it holds the plugin and its threads."""
    return load_library().Core()


def openvino_version() -> str:
    """The installed version's year and release, such as ``"2026.4"``."""
    return ".".join(load_library().__version__.split(".")[:2])


def has_native_bf16() -> bool:
    """Whether this processor multiplies in bfloat16; elsewhere OpenVINO emulates it slowly, or computes in float32."""
    return "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def resolve_precision(precision: str | None) -> str:
    """The precision to compute in; None becomes ``"bf16"`` where the processor multiplies in it, else ``"fp32"``.

    Raises:
        RequestError: the precision is not known.
        DeviceError: OpenVINO is missing, or the processor does not multiply in bfloat16.
    """
    if precision is not None and precision not in PRECISIONS:
        raise RequestError(f"precision {precision!r} is not known: expected one of {', '.join(PRECISIONS)}")
    is_native = has_native_bf16()
    if precision == "bf16" and not is_native:
        raise DeviceError("precision 'bf16': this processor does not multiply in bfloat16: expected fp32")
    return precision or ("bf16" if is_native else "fp32")


def check_device(device: str | torch.device) -> None:
    """Reject all devices except the CPU.

    Raises:
        RequestError: it is another.
    """
    if str(device) != "auto" and str(device).partition(":")[0] != "cpu":
        raise RequestError(f"device {str(device)!r}: OpenVINO runs on the CPU here; expected auto or cpu")


class _Binding:
    """Buffers for one set of shapes, and the requests that use them, which run one after another."""

    def __init__(self, parts: Sequence[ov.CompiledModel]) -> None:
        self.outputs: dict[str, Tensor] = {}
        self._make_tensor = load_library().Tensor
        self._requests = [part.create_infer_request() for part in parts]
        self._inputs = [{name for port in part.inputs for name in port.names} for part in parts]
        self._addresses: dict[str, int] = {}

    def bind_inputs(self, feeds: Mapping[str, Tensor]) -> None:
        """Pass the addresses that changed since the last run to OpenVINO."""
        for name, tensor in feeds.items():
            address = tensor.data_ptr()
            if self._addresses.get(name) != address:
                shared = self._make_tensor(tensor.numpy(), shared_memory=True)
                for request, inputs in zip(self._requests, self._inputs, strict=True):
                    if name in inputs:
                        request.set_tensor(name, shared)
                self._addresses[name] = address

    def run(self, names: Iterable[str]) -> None:
        """Run the angles, if they were split off, and then the network.

        The first run finds the shapes of the outputs ``names`` and makes buffers of those shapes for later runs.
        """
        *before, network = self._requests
        for request in before:
            _run(request)
            for port in request.model_outputs:
                network.set_tensor(port.any_name, request.get_tensor(port))
        _run(network)
        if not self.outputs:
            self.outputs = {name: torch.from_numpy(network.get_tensor(name).data.copy()) for name in names}
            for name, tensor in self.outputs.items():
                network.set_tensor(name, self._make_tensor(tensor.numpy(), shared_memory=True))


def _run(request: ov.InferRequest) -> None:
    request.start_async()  # infer() would also wrap every output
    request.wait()


class OpenVinoEngine:
    """A component's ONNX graph, compiled by OpenVINO for the CPU.

    Safe to call from several threads: the compiled model is shared and runs once at a time; the output buffers belong
    to the calling thread. They are allocated at the first call with given shapes and reused by later ones (see
    :class:`.engine.Engine`), for the last few sets of shapes. Inputs are read and outputs are written where they lie.

    Args:
        name: the component's, for messages.
        path: its ONNX file. The weights stay in the mapping of the file beside it, or are packed in ``precision``.
        component: its inputs and outputs, whose dtypes do not depend on ``precision``.
        precision: ``"fp32"`` or ``"bf16"``, to compute in (:func:`resolve_precision`).
        threads: to compute with; by default as many as there are cores.

    Raises:
        BundleError: OpenVINO cannot read the file, or its tensors are not the component's.
        DeviceError: OpenVINO is not installed.
    """

    capturable = False

    def __init__(self, name: str, path: Path, component: Component, precision: str, threads: int | None = None) -> None:
        self.name = name
        self.inputs = component.inputs
        self.outputs = component.outputs
        self.device = torch.device("cpu")
        self._parts = _compile(path, component, precision, threads or available_cores())
        self._bindings: ByShapes[_Binding] = ByThread()

    def run(self, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Run the graph once; see :class:`.engine.Engine` for how long the returned buffers hold.

        Raises:
            EngineError: the inputs are not those of the graph, or OpenVINO failed.
        """
        check_feeds(self.name, self.inputs, feeds, self.device)
        shapes = tuple(feeds[name].shape for name in self.inputs)
        try:
            binding = self._bindings.get(shapes, lambda: self._bind(feeds))
            binding.bind_inputs(feeds)
            binding.run(self.outputs)
        except EngineError:
            raise
        except Exception as error:  # OpenVINO's exceptions share no base class but this
            raise EngineError(f"{self.name}: OpenVINO failed: {_in_short(error)}") from error
        return binding.outputs

    def _bind(self, feeds: Mapping[str, Tensor]) -> _Binding:
        _check_agreement(self.name, self.inputs, feeds)
        return _Binding(self._parts)


def _check_agreement(name: str, specs: Mapping[str, TensorSpec], feeds: Mapping[str, Tensor]) -> None:
    """Reject inputs that disagree on the extent of a varying dimension.

    OpenVINO rejects them as well, but afterwards also some correct ones (seen in 2026.4).
    """
    known: dict[str, int] = {}
    for key, spec in specs.items():
        for dim, extent in spec.extents(feeds[key].shape).items():
            if known.setdefault(dim, extent) != extent:
                raise EngineError(f"{name}: input {key!r} expected with {dim} {known[dim]}, received {extent}")


def _compile(path: Path, component: Component, precision: str, threads: int) -> list[ov.CompiledModel]:
    """The model compiled for the CPU; in bf16 preceded by the model of its angles (:func:`take_angles`)."""
    core = _core()
    options = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads}
    try:
        model = core.read_model(path)
        check_graph(path, component, (name for port in [*model.inputs, *model.outputs] for name in port.names))
        models = {} if precision == "fp32" or (angles := take_angles(model)) is None else {"fp32": angles}
        models[precision] = model
        return [
            core.compile_model(each, "CPU", {**options, "INFERENCE_PRECISION_HINT": PRECISIONS[its_precision]})
            for its_precision, each in models.items()
        ]
    except HyperSDError:
        raise
    except Exception as error:  # OpenVINO's exceptions share no base class but this
        raise BundleError(f"{path} cannot be loaded by OpenVINO: {_in_short(error)}") from error


def take_angles(model: ov.Model) -> ov.Model | None:
    """Split off the subgraph that computes the arguments of Sin and Cos, as a model of its own; None if there is none.

    A timestep of 999 rounded to bfloat16's 8 bits is 1000, and its angles are off by up to 2: the UNet would compute
    for another timestep. So the angles' model is compiled for float32, and the angles become inputs of the rest.
    """
    ov, sources, parameters = load_library(), _angles_in(model), []
    if not sources:
        return None
    for i, source in enumerate(sources):
        parameter = ov.opset13.parameter(source.get_partial_shape(), source.get_element_type())
        parameter.output(0).get_tensor().set_names({f"{ANGLES}{i}"})
        for reader in source.get_target_inputs():
            reader.replace_source_output(parameter.output(0))
        source.get_tensor().set_names({f"{ANGLES}{i}"})
        parameters.append(parameter)
    model.add_parameters(parameters)
    return ov.Model(sources, list(_parameters_above(sources)), "angles")


def _angles_in(model: ov.Model) -> list[ov.Output]:
    """The arguments of Sin and Cos that are computed from inputs, each once."""
    sources: dict[tuple[str, int], ov.Output] = {}
    for node in model.get_ordered_ops():
        if node.get_type_name() in PERIODIC:
            source = node.input_value(0)
            is_input = source.get_node().get_type_name() == "Parameter"
            if not is_input and any(_parameters_above([source])):
                sources[source.get_node().get_friendly_name(), source.get_index()] = source
    return list(sources.values())


def _parameters_above(outputs: Iterable[ov.Output]) -> Iterator[ov.Node]:
    """The model's inputs that these tensors depend on."""
    to_visit, seen = [output.get_node() for output in outputs], set()
    while to_visit:
        node = to_visit.pop()
        if node.get_friendly_name() not in seen:
            seen.add(node.get_friendly_name())
            to_visit += [value.get_node() for value in node.input_values()]
            if node.get_type_name() == "Parameter":
                yield node


def _in_short(error: Exception) -> str:
    """OpenVINO's message in one line, without the places in its own source."""
    whole = one_line(error)
    return PLACES.sub("", whole).strip() or whole
