"""The interface of all engines, named tensors in and named tensors out; wrappers and checks for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..errors import BundleError, EngineError
from .specs import Component, TensorSpec

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "int64": torch.int64, "uint8": torch.uint8}


class Engine(Protocol):
    """A component that is ready to run.

    ``run`` takes one contiguous tensor per input, on ``device``, in the dtypes and shapes of ``inputs``. The returned
    tensors are the engine's own buffers, which later runs overwrite. Copy them to keep them longer:

    - On the CPU buffers belong to the thread, and are valid until it runs the engine again at the same shapes.
    - On a CUDA device they belong to the current stream, and are valid until the engine runs again on it, in any
      thread. Give every thread a stream of its own, or let the threads take turns. ``run`` is ordered after earlier
      work of the current stream, and before its later work.
    """

    @property
    def inputs(self) -> Mapping[str, TensorSpec]: ...

    @property
    def outputs(self) -> Mapping[str, TensorSpec]: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph may record its run.

        If so, the third and later runs on a stream at given shapes only enqueue: they allocate nothing and the host
        does not wait. While a graph is recorded, ``run`` passes the owners of its memory to
        :func:`.cuda.capture.retain`. The caller replays the graph on one stream, in order with the engine's other runs.
        """
        ...

    def run(self, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Run the component once."""
        ...


class EngineWrapper:
    """Base class of wrappers: it shows the wrapped engine's properties, and a subclass defines ``run``."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        return self.engine.inputs

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        return self.engine.outputs

    @property
    def device(self) -> torch.device:
        return self.engine.device

    @property
    def capturable(self) -> bool:
        return self.engine.capturable


def varying_extents(specs: Mapping[str, TensorSpec], feeds: Mapping[str, Tensor]) -> dict[str, int]:
    """The extents of all varying dimensions, by name, in the tensors of some of an engine's inputs."""
    return {
        name: extent
        for key, tensor in feeds.items()
        if key in specs
        for name, extent in specs[key].extents(tensor.shape).items()
    }


def check_feeds(name: str, specs: Mapping[str, TensorSpec], feeds: Mapping[str, Tensor], device: torch.device) -> None:
    """Reject tensors that the engine ``name`` does not accept; the error has the expected and the received type.

    Raises:
        EngineError: an input is missing or unknown, on another device, or has another dtype or a shape outside the
            range.
    """
    if feeds.keys() != specs.keys():
        raise EngineError(f"{name}: expected the inputs {sorted(specs)}, received {sorted(feeds)}")
    for key, spec in specs.items():
        tensor = feeds[key]
        if tensor.dtype != TORCH_DTYPES[spec.dtype] or not spec.accepts(tuple(tensor.shape)):
            received = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
            raise EngineError(f"{name}: input {key!r} expected {spec}, received {received}")
        if tensor.device != device:
            raise EngineError(f"{name}: input {key!r} expected on {device}, received on {tensor.device}")
        if not tensor.is_contiguous():
            raise EngineError(f"{name}: input {key!r} is not contiguous: call .contiguous() on it")


def check_graph(path: Path, component: Component, graph: Iterable[str]) -> None:
    """Check that a graph's inputs and outputs have the manifest's names.

    Raises:
        BundleError: they have not: the bundle was assembled by hand.
    """
    names, manifest = set(graph), component.inputs.keys() | component.outputs.keys()
    if names != manifest:
        raise BundleError(f"{path} has the tensors {sorted(names)}, the manifest says {sorted(manifest)}")


class NullEngine:
    """An engine that computes nothing: it checks its inputs, returns zeros and counts its runs.

    It shows the cost of the loop around the components, and tests run on it.

    An output dimension that varies has the extent of the input dimension of the same name, or its usual one.
    """

    def __init__(self, name: str, component: Component) -> None:
        self.name = name
        self.inputs = component.inputs
        self.outputs = component.outputs
        self.device = torch.device("cpu")
        self.capturable = False
        self.runs = 0

    def run(self, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Zeros of the outputs' dtypes and shapes."""
        check_feeds(self.name, self.inputs, feeds, self.device)
        self.runs += 1
        extents = varying_extents(self.inputs, feeds)
        return {
            key: torch.zeros(spec.shape_at(extents), dtype=TORCH_DTYPES[spec.dtype])
            for key, spec in self.outputs.items()
        }
