"""Engines of OpenVINO on the CPU."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...errors import EngineError
from ..at_rest import AtRest
from ..by_shapes import ByShapes, ByThread
from ..cores import available_cores
from ..engine import check_feeds
from ..specs import Component, TensorSpec
from .compiled_graph import compile_graph
from .library import in_short, load_library

if TYPE_CHECKING:
    import openvino as ov

REST = 30.0  # seconds: callers who come one after another do not wait for memory to be allocated


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


def _release_activations(engine: weakref.ref[OpenVinoEngine]) -> None:
    """Let an engine release its activations, unless it is gone."""
    if (alive := engine()) is not None:
        alive.release_activations()


def _run(request: ov.InferRequest) -> None:
    request.start_async()  # infer() would also wrap every output
    request.wait()


class OpenVinoEngine:
    """A component's ONNX graph, compiled by OpenVINO for the CPU.

    Safe to call from several threads: the compiled model is shared and runs once at a time; the output buffers belong
    to the calling thread. They are allocated at the first call with given shapes and reused by later ones (see
    :class:`.engine.Engine`), for the last few sets of shapes. Inputs are read and outputs are written where they lie.
    Memory of intermediate results is given back when the engine has not run for :data:`REST` seconds.

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
        self._parts = compile_graph(path, component, precision, threads or available_cores())
        self._bindings: ByShapes[_Binding] = ByThread()
        # Without a reference: an engine that is released must not wait for its rest.
        self._at_rest = AtRest(functools.partial(_release_activations, weakref.ref(self)), REST)

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
            self._at_rest.touch()
        except EngineError:
            raise
        except Exception as error:  # OpenVINO's exceptions share no base class but this
            raise EngineError(f"{self.name}: OpenVINO failed: {in_short(error)}") from error
        return binding.outputs

    def release_activations(self) -> None:
        """Give back the memory of intermediate results: SD1.5's decoder has 0.4 GB at 512x512, SDXL's 1.8 at 1024x1024.

        OpenVINO keeps runs out while it does this; the next one allocates the memory again, a few percent of its time.
        """
        with contextlib.suppress(RuntimeError):  # it runs: the end of its run begins another wait
            for part in self._parts:
                part.release_memory()

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
