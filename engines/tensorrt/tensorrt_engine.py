"""A TensorRT plan that is loaded and ready to run."""

from __future__ import annotations

import functools
import mmap
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import BundleError, DeviceError, EngineError
from ..by_shapes import ByShapes
from ..cuda.capture import retain
from ..cuda.device import free_memory, out_of_memory
from ..engine import TORCH_DTYPES, check_feeds
from ..external_data import check_external_data
from ..image_shapes import extents_of
from ..specs import Component, TensorSpec
from .activation_memory import ActivationMemory
from .api import DTYPE_NAMES, TensorRTApi

KEPT_ERRORS = 10
ALIGNMENT = 256  # bytes, of every address that TensorRT is given
REBUILD = "build it again with `hypersd build`"


class _Lane:
    """An execution context and output buffers, for one stream and one set of shapes.

    Every set of shapes has a context of its own, because the first run after a change of shapes cannot be recorded in a
    CUDA graph. Only addresses that changed are passed to the context. Its activation memory belongs to the stream, and
    other engines share it.
    """

    def __init__(
        self, context: Any, stream: Any, block: Tensor, feeds: Mapping[str, Tensor], owners: tuple[object, ...]
    ) -> None:
        self.context = context  # deleted first: its memory and its owners must outlive it
        self.stream = stream
        self.block = block
        self.outputs: dict[str, Tensor] = {}
        self.has_run = False
        self._owners = owners
        self._addresses: dict[str, int] = {}
        if block.numel():
            context.set_device_memory(block.data_ptr(), block.numel())
        for name, tensor in feeds.items():
            if not context.set_input_shape(name, tuple(tensor.shape)):
                raise EngineError(f"input {name!r}: TensorRT does not take the shape {list(tensor.shape)}")

    def allocate(self, specs: Mapping[str, TensorSpec], device: torch.device) -> None:
        """Allocate the outputs' buffers, of the shapes that follow from the inputs."""
        for name, spec in specs.items():
            shape = tuple(self.context.get_tensor_shape(name))
            self.outputs[name] = torch.empty(shape, dtype=TORCH_DTYPES[spec.dtype], device=device)

    def set_addresses(self, tensors: Mapping[str, Tensor]) -> None:
        """Pass the addresses that changed since the last run to the context."""
        for name, tensor in tensors.items():
            address = tensor.data_ptr()
            if self._addresses.get(name) != address:
                if not self.context.set_tensor_address(name, address):
                    raise EngineError(f"tensor {name!r}: TensorRT does not take its address")
                self._addresses[name] = address

    def finish(self) -> None:
        """Wait for the stream's runs. A wait for the whole device would spoil another thread's capture."""
        self.stream.synchronize()


class TensorRTEngine:
    """A component's plan, of TensorRT or TensorRT-RTX (:class:`..engine.Engine`).

    ``run`` enqueues on torch's current stream and returns at once; after the first call at some shapes it allocates
    nothing. Contexts and output buffers belong to the stream: threads may share the engine, each on its own stream.

    Args:
        api: TensorRT or TensorRT-RTX.
        name: the component's, for messages.
        plan: the plan's file.
        component: inputs and outputs, narrowed to the shapes of the plan.
        device: a CUDA device.
        memory: shared by the engines that run one after another.
        onnx: the ONNX file that a plan without weights takes them from; None for a plan that has them.
        cached: what earlier loads stored of RTX's compiled kernels (:mod:`.runtime_cache`); the first that it takes is
            used.

    Raises:
        EngineError: the plan cannot be loaded here; the message has TensorRT's reason.
        BundleError: it is not the plan that the manifest describes.
    """

    def __init__(
        self,
        api: TensorRTApi,
        name: str,
        plan: Path,
        component: Component,
        device: torch.device,
        memory: ActivationMemory,
        onnx: Path | None = None,
        cached: Iterable[bytes] = (),
    ) -> None:
        self.api = api
        self.name = name
        self.inputs = component.inputs
        self.outputs = component.outputs
        self.device = device
        self._plan = plan
        self._memory = memory
        self._errors: list[str] = []
        # Not a method: the runtime keeps the logger, and with a method the engine, out of reach of Python's collector.
        self._logger = api.make_logger(functools.partial(_note_error, self._errors))
        with torch.cuda.device(device):
            self._runtime = api.trt.Runtime(self._logger)
            self._engine = self._deserialize()
            check_engine(api, self._engine, plan, component)
            if onnx is not None:
                check_external_data(onnx, component)
                api.refit(self._engine, onnx, self._logger)
            self._cache = api.create_runtime_cache(self._engine, cached)
        memory.require(self._engine.device_memory_size_v2)
        #: whether its runs can be recorded in a CUDA graph, as far as TensorRT knows from the runs so far
        self.capturable = True
        self._lanes: dict[int, ByShapes[_Lane]] = {}  # by stream, of which torch has few
        self._lock = threading.Lock()

    @property
    def activation_memory(self) -> int:
        """Bytes of device memory that a run needs besides weights, inputs and outputs, at the largest shapes."""
        return self._engine.device_memory_size_v2

    def run(self, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Enqueue the network once; see :class:`..engine.Engine` for how long the returned buffers hold.

        Raises:
            EngineError: the inputs are not those of the engine, or TensorRT failed.
        """
        check_feeds(self.name, self.inputs, feeds, self.device)
        # A row of a larger tensor may lie anywhere, and TensorRT reads its inputs in whole lines.
        feeds = {name: t if t.data_ptr() % ALIGNMENT == 0 else t.clone() for name, t in feeds.items()}
        with self._lock, torch.cuda.device(self.device):  # kernels start on the current device, not on the stream's
            stream = torch.cuda.current_stream(self.device)
            try:
                lane = self._lane(stream, feeds)
            except torch.OutOfMemoryError as error:
                raise out_of_memory(f"{self.name}'s outputs did not fit", self.device) from error
            lane.set_addresses(feeds)
            lane.set_addresses(lane.outputs)
            if not lane.context.execute_async_v3(stream.cuda_stream):
                raise EngineError(f"{self.name}: {self.api} failed: {self._last_error()}")
            if not lane.has_run:
                lane.has_run = True
                self.capturable = self.capturable and self.api.is_capturable(lane.context, stream.cuda_stream)
        retain(lane)
        return lane.outputs

    def drop_lanes(self) -> None:
        """Release all contexts and buffers; the next run makes new ones."""
        self._lanes.clear()

    def runtime_cache(self) -> bytes:
        """The kernels compiled for this GPU so far, for the next load; empty for TensorRT, which compiles none."""
        return b"" if self._cache is None else self.api.serialize_runtime_cache(self._cache)

    def _lane(self, stream: torch.cuda.Stream, feeds: Mapping[str, Tensor]) -> _Lane:
        # A stream's lanes push out no other's, whose thread may be recording: the wait for it would spoil that.
        lanes = self._lanes.setdefault(stream.cuda_stream, ByShapes(_Lane.finish))
        return lanes.get(tuple(feeds[name].shape for name in self.inputs), lambda: self._make_lane(stream, feeds))

    def _make_lane(self, stream: torch.cuda.Stream, feeds: Mapping[str, Tensor]) -> _Lane:
        block = self._memory.block(stream.cuda_stream)
        context = self.api.create_context(self._engine, self._cache)
        if context is None:
            free = f"{free_memory(self.device) / 1e9:.2f} GB of device memory are free"
            raise EngineError(f"{self.name}: {self.api} cannot make a context: {self._last_error()} ({free})")
        lane = _Lane(context, stream, block, feeds, (self._cache, self._engine, self._runtime, self._logger))
        lane.allocate(self.outputs, self.device)
        return lane

    def _deserialize(self) -> Any:
        """The engine. The file is mapped, not read, so that its gigabytes are in memory once."""
        free = free_memory(self.device)
        try:
            with self._plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                reason = self.api.invalidity(self._runtime, content)
                engine = None if reason else self._runtime.deserialize_cuda_engine(content)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise BundleError(f"{self._plan} cannot be read ({error}): {REBUILD}") from error
        if engine is not None:
            return engine
        said = reason or self._last_error()
        if "INSUFFICIENT_GPU_MEMORY" in said or "memory" in said.lower():
            raise EngineError(
                f"{self.name}: out of device memory: the engine needs at least "
                f"{self._plan.stat().st_size / 1e9:.2f} GB, {free / 1e9:.2f} GB were free on {self.device} ({said})"
            )
        kind = DeviceError if reason and "MALFORMED_ENGINE" not in reason else EngineError
        raise kind(f"{self.name}: {self.api} cannot load {self._plan} on {_gpu(self.device)}: {said}; {REBUILD}")

    def _last_error(self) -> str:
        return "; ".join(self._errors[-2:]) or "it gave no reason"


def _note_error(errors: list[str], severity: str, text: str) -> None:
    if severity in ("ERROR", "INTERNAL_ERROR"):
        errors.append(" ".join(text.split()))
        del errors[:-KEPT_ERRORS]


def check_engine(api: TensorRTApi, engine: Any, plan: Path, component: Component) -> None:
    """Check that a plan has the manifest's tensors: names, types and shapes.

    Raises:
        BundleError: they are not.
    """
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    expected = {**component.inputs, **component.outputs}
    if sorted(names) != sorted(expected):
        raise BundleError(f"{plan} has the tensors {sorted(names)}, the manifest says {sorted(expected)}: {REBUILD}")
    for name in names:
        is_input = engine.get_tensor_mode(name) == api.trt.TensorIOMode.INPUT
        spec = (component.inputs if is_input else component.outputs).get(name)
        dtype = DTYPE_NAMES.get(engine.get_tensor_dtype(name).name, engine.get_tensor_dtype(name).name)
        shape = tuple(engine.get_tensor_shape(name))
        if spec is None or dtype != spec.dtype or not _fits(engine, name, shape, spec, is_input):
            said = f"{'input' if is_input else 'output'} {name} is {dtype}{list(shape)}"
            raise BundleError(f"{plan}: {said}, the manifest says {spec or 'it is none'}: {REBUILD}")


def _fits(engine: Any, name: str, shape: tuple[int, ...], spec: TensorSpec, is_input: bool) -> bool:
    """Whether a tensor's shape is the manifest's, and an input's profile spans its ranges."""
    if len(shape) != len(spec.shape):
        return False
    if any(extent not in (-1, dim) for extent, dim in zip(shape, spec.shape, strict=True) if isinstance(dim, int)):
        return False
    if not is_input or -1 not in shape:
        return True
    profile = tuple(tuple(extents) for extents in engine.get_tensor_profile_shape(name, 0))
    return profile == extents_of(spec)


def _gpu(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"
