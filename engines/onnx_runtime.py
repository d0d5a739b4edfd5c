"""Engines of ONNX Runtime, on the CPU or on a CUDA device. The only module that imports onnxruntime."""

from __future__ import annotations

import importlib.util
import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from ..errors import BundleError, DeviceError, EngineError, one_line, warn_user
from .by_shapes import ByShapes, ByThread
from .cores import available_cores
from .cuda.capture import retain
from .cuda.device import find_device, is_out_of_memory, one_capture, out_of_memory
from .cuda.streams import claim_stream
from .engine import check_feeds, check_graph
from .external_data import check_external_data
from .lowering import Dialect, lower, with_resolved_weights
from .mapped_files import release_pages
from .specs import Component
from .stored_models import find_stored_model, open_stored

NUMPY_DTYPES = {torch.float32: np.float32, torch.float16: np.float16, torch.int64: np.int64, torch.uint8: np.uint8}
CUDA_HINT = "pip uninstall onnxruntime && pip install onnxruntime-gpu, or device='cpu'"
# Begins ONNX Runtime's error for a graph that copies between host and device, or that branches.
NOT_RECORDABLE = "cannot use the graph capture feature"
# The ONNX that the CUDA provider has had kernels for since 1.23; tests/assets/operators lists them by version.
CUDA_DIALECT = Dialect(opset=18, lacks=frozenset({"Attention", "Gelu", "GroupNormalization"}))
ALL_KERNELS_SINCE = (1, 27)  # the first version with CUDA kernels for our graphs as they are
READS_HALF_SCALES_SINCE = (1, 28)  # before, its optimization of weights in 8 bits with float16 scales fails
# Operators of our graphs without such a kernel in 1.23, which cannot tell which nodes it runs on the CPU.
SILENT_VERSIONS_LACK = (
    *("Attention", "Cast", "Conv", "Cos", "DequantizeLinear", "Reshape", "Resize", "Shape", "Sin", "Squeeze"),
    *("Transpose", "Unsqueeze"),
)
# Options of a stored model. Smaller weights stay in the graph: the text encoder's mask has an odd size and would
# misalign the others.
STORED_WEIGHTS = {
    "session.optimized_model_external_initializers_file_name": "model.onnx_data",
    "session.optimized_model_external_initializers_min_size_in_bytes": str(1 << 16),
}
STORE_PACKED = "session.save_external_prepacked_constant_initializers"
PACKED, PACKED_OFFSET = re.compile(rb"prepacked_\d"), re.compile(rb"\|(\d+);\d+;\d+")  # in a stored graph
PACKED_ALIGNMENT = 64  # bytes; kernels read packed weights by aligned loads


class CpuNodesWarning(UserWarning):
    """Nodes of a graph run on the CPU although the device is a GPU."""


def ort_version() -> str:
    """The version of the installed ONNX Runtime, of whichever distribution."""
    return ort.__version__


def resolve_device(device: str | torch.device) -> torch.device:
    """``"auto"`` becomes the first CUDA device if both torch and ONNX Runtime can use it, else the CPU.

    Raises:
        RequestError: there is no such kind of device (:func:`hypersd.engines.cuda.device.find_device`).
        DeviceError: torch or ONNX Runtime cannot use it.
    """
    has_cuda = "CUDAExecutionProvider" in ort.get_available_providers()
    if str(device) == "auto":
        return find_device("cuda" if has_cuda and torch.cuda.is_available() else "cpu")
    found = find_device(device)
    if found.type == "cuda" and not has_cuda:
        raise DeviceError(f"the installed onnxruntime {ort.__version__} has no CUDA provider: {CUDA_HINT}")
    return found


class _Binding:
    """Buffers for one set of shapes, and the addresses that ONNX Runtime was given."""

    def __init__(self, session: ort.InferenceSession, device: torch.device) -> None:
        self._session = session
        self.io = session.io_binding()
        self.device = device
        self.outputs: dict[str, Tensor] = {}
        self._addresses: dict[str, int] = {}

    def bind_inputs(self, feeds: Mapping[str, Tensor]) -> None:
        """Pass the addresses that changed since the last run to ONNX Runtime."""
        for name, tensor in feeds.items():
            address = tensor.data_ptr()
            if self._addresses.get(name) != address:
                self.io.bind_input(name, *self._place(tensor), tuple(tensor.shape), address)
                self._addresses[name] = address

    def run(self, options: ort.RunOptions | None, stream: torch.cuda.Stream | None) -> None:
        """Run once; the first run finds the outputs' shapes and makes buffers of those shapes for later runs."""
        if self.outputs:
            return self._session.run_with_iobinding(self.io, options)
        names = [output.name for output in self._session.get_outputs()]
        for name in names:
            self.io.bind_output(name, self.device.type, self.device.index or 0)
        self._session.run_with_iobinding(self.io, options)
        if stream is not None:
            stream.synchronize()  # the copies below do not wait for it
        values = self.io.get_outputs()
        self.outputs = {
            name: torch.from_numpy(value.numpy().copy()).to(self.device)
            for name, value in zip(names, values, strict=True)
        }
        for name, tensor in self.outputs.items():
            self.io.bind_output(name, *self._place(tensor), tuple(tensor.shape), tensor.data_ptr())

    def _place(self, tensor: Tensor) -> tuple[str, int, type]:
        return self.device.type, self.device.index or 0, NUMPY_DTYPES[tensor.dtype]


class OnnxRuntimeEngine:
    """A component's ONNX graph in an ONNX Runtime session.

    Safe to call from several threads: the session is shared, the output buffers belong to the calling thread, on a
    CUDA device to its current stream. They are allocated at the first call with given shapes and reused by later ones
    (see :class:`.engine.Engine`), for the last few sets of shapes.

    On a CUDA device all runs are enqueued on ``stream``, one at a time, and the host does not wait for them. One
    pipeline's engines run one after another and may share a stream; two pipelines may not, lest one records the other's
    work in its graph. Intermediate results lie in the session's arena, which never shrinks and is not freed before the
    session: a recorded graph relies on that, so do not turn on arena shrinkage.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        component: Component,
        device: torch.device,
        threads: int | None = None,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        _check_places(path, component)
        self.name = name
        self.inputs = component.inputs
        self.outputs = component.outputs
        self.device = device
        self._stream = stream or claim_stream(device) if device.type == "cuda" else None
        threads = threads or available_cores()
        if self._stream is None:
            self._session, self.capturable = _make_cpu_session(path, component, threads), False
        else:
            self._session, self.capturable = _make_cuda_session(path, device, threads, self._stream)
        self._options = _cuda_run_options() if device.type == "cuda" else None
        ends = [*self._session.get_inputs(), *self._session.get_outputs()]
        check_graph(path, component, (end.name for end in ends))
        self._of_thread: ByShapes[_Binding] = ByThread()  # on the CPU
        self._of_stream: dict[int, ByShapes[_Binding]] = {}  # on CUDA; torch has few streams
        self._lock = nullcontext() if self._stream is None else threading.Lock()

    def run(self, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Run the graph once; see :class:`.engine.Engine` for how long the returned buffers hold.

        Raises:
            EngineError: the inputs are not those of the graph, or ONNX Runtime failed.
        """
        check_feeds(self.name, self.inputs, feeds, self.device)
        with self._lock:
            return self._run(self._bindings(), feeds)

    def _bindings(self) -> ByShapes[_Binding]:
        """The buffers by shapes, the calling thread's or the current stream's."""
        if self._stream is None:
            return self._of_thread
        return self._of_stream.setdefault(torch.cuda.current_stream(self.device).cuda_stream, ByShapes())

    def _run(self, bindings: ByShapes[_Binding], feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        shapes = tuple(feeds[name].shape for name in self.inputs)
        binding = bindings.get(shapes, lambda: _Binding(self._session, self.device))
        binding.bind_inputs(feeds)
        retain(self, binding)
        try:
            with _beside_current(self._stream):
                binding.run(self._options, self._stream)
        except torch.OutOfMemoryError:  # of the buffers: the caller's words say more
            raise
        except Exception as error:  # onnxruntime's exceptions share no base class but this
            if self._stream is not None and is_out_of_memory(error):
                raise out_of_memory(f"{self.name}'s intermediate results did not fit", self.device) from error
            raise EngineError(f"{self.name}: ONNX Runtime failed: {one_line(error)}") from error
        return binding.outputs


@contextmanager
def _beside_current(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Order the work enqueued on ``stream`` inside after the current stream's earlier work and before its later work.

    A fork and a join by events: the host does not wait, and a graph records both.
    """
    if stream is None:
        yield
        return
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    try:
        yield
    finally:
        current.wait_stream(stream)


def _cuda_run_options() -> ort.RunOptions:
    options = ort.RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    # Never a graph of ONNX Runtime's own: a launch inside our recording would end the process.
    options.add_run_config_entry("gpu_graph_id", "-1")
    return options


def _session_options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors are raised; a log would repeat them
    # Every session has threads of its own: spinning threads take the cores from the next session and from torch.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if _release() < READS_HALF_SCALES_SINCE:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options


def _make_cpu_session(path: Path, component: Component, threads: int) -> ort.InferenceSession:
    """A session on the CPU, of the stored model if models are stored (:mod:`.stored_models`)."""
    # The number of threads is not part of it: neither the graph nor the packed weights depend on it.
    runtime = f"{ort.__version__} {ort.get_build_info()} {STORED_WEIGHTS}"
    stored = find_stored_model(path, component, runtime, "model.onnx")
    session = stored and open_stored(
        stored,
        lambda graph: _store_model(path, graph, threads),
        lambda graph: _open_stored_model(graph, threads),
    )
    if session is None:
        session = _open_session(path, _session_options(threads), ["CPUExecutionProvider"])
        release_pages(path.parent)  # most weights are packed; others are read again
    return session


def _store_model(path: Path, stored: Path, threads: int) -> None:
    """Write a graph optimised for this processor, its weights, and the weights in the layout that kernels use.

    ONNX Runtime writes the packed weights one after another and does not check their alignment when it maps them: a
    run on weights that are not aligned crashes the process. Such a model is stored again without them. Without packed
    weights every process packs them again at each load, into private memory.
    """
    _write_optimized(path, stored, threads, packed="1")
    if not _packed_are_aligned(stored.read_bytes()):
        for file in stored.parent.iterdir():
            file.unlink()
        _write_optimized(path, stored, threads, packed="0")


def _write_optimized(path: Path, stored: Path, threads: int, packed: str) -> None:
    options = _session_options(threads)
    options.optimized_model_filepath = str(stored)
    for key, value in {**STORED_WEIGHTS, STORE_PACKED: packed}.items():
        options.add_session_config_entry(key, value)
    _open_session(path, options, ["CPUExecutionProvider"])


def _packed_are_aligned(graph: bytes) -> bool:
    """Whether all packed weights of a stored graph are aligned; False if their offsets are not legible."""
    offsets = [int(offset) for offset in PACKED_OFFSET.findall(graph)]
    is_legible = len(offsets) >= len(PACKED.findall(graph))  # a packed weight has one part or more
    return is_legible and all(offset % PACKED_ALIGNMENT == 0 for offset in offsets)


def _open_stored_model(stored: Path, threads: int) -> ort.InferenceSession:
    options = _session_options(threads)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # it is optimised
    return _open_session(stored, options, ["CPUExecutionProvider"])


def _make_cuda_session(
    path: Path, device: torch.device, threads: int, stream: torch.cuda.Stream
) -> tuple[ort.InferenceSession, bool]:
    """A session, and whether its runs can be recorded in a CUDA graph.

    Before 1.27 some of our operators have no CUDA kernel: a graph that ONNX Runtime rejects for them is lowered.
    """
    try:
        return _open_cuda_session(path, _session_options(threads), device, stream, recordable=True), True
    except BundleError as error:
        if NOT_RECORDABLE not in str(error):
            raise
    options = _session_options(threads)
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    content = _lowered(path, options)
    if content is not None:
        try:
            return _open_cuda_session(path, options, device, stream, recordable=True, content=content), True
        except BundleError as error:
            if NOT_RECORDABLE not in str(error):
                raise
    session = _open_cuda_session(path, options, device, stream, recordable=False, content=content)
    _warn_of_cpu_nodes(path, session, is_lowered=content is not None)
    return session, False


def _lowered(path: Path, options: ort.SessionOptions) -> bytes | None:
    """The graph in operators that have had CUDA kernels for long; ``options`` learn where its weights lie.

    None if this version has kernels for all, if the operators cannot say it, or without ``onnx``.
    """
    if _has_all_kernels():
        return None
    try:
        content, folder = with_resolved_weights(lower(path, CUDA_DIALECT), path)
    except EngineError:
        return None
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return content


def _has_all_kernels() -> bool:
    return _release() >= ALL_KERNELS_SINCE


def _release() -> tuple[int, ...]:
    return tuple(int(part) for part in ort.__version__.split(".")[:2])


def _warn_of_cpu_nodes(path: Path, session: ort.InferenceSession, *, is_lowered: bool) -> None:
    """Warn of nodes that a session does not run on the GPU, with the way out."""
    newer = f"onnxruntime-gpu {'.'.join(map(str, ALL_KERNELS_SINCE))} or newer"
    if _has_all_kernels():
        remedy = "export it again"
    else:
        can_lower = is_lowered or importlib.util.find_spec("onnx") is not None
        remedy = f"install {newer}" if can_lower else f"pip install onnx, with which hypersd rewrites them, or {newer}"
    if nodes := _nodes_on_cpu(path, session, is_lowered=is_lowered):
        named = ", ".join(f"{count} {operator}" for operator, count in nodes.most_common())
        warn_user(
            f"{path}: ONNX Runtime {ort.__version__} runs nodes on the CPU, which is slow ({named}): {remedy}",
            CpuNodesWarning,
        )


def _nodes_on_cpu(path: Path, session: ort.InferenceSession, *, is_lowered: bool) -> Counter[str]:
    """The number of nodes that a session does not run on the GPU, by operator."""
    if hasattr(session, "get_provider_graph_assignment_info"):
        parts = session.get_provider_graph_assignment_info()
        return Counter(
            node.op_type for part in parts if part.ep_name == "CPUExecutionProvider" for node in part.get_nodes()
        )
    # Before 1.24: the operators that are known to lack a kernel, counted in the file. A node's operator is there as the
    # field's tag, the length and the name. A lowered graph has none of them.
    graph = b"" if is_lowered else path.read_bytes()
    return +Counter({name: graph.count(b'"' + bytes([len(name)]) + name.encode()) for name in SILENT_VERSIONS_LACK})


def _open_cuda_session(
    path: Path,
    options: ort.SessionOptions,
    device: torch.device,
    stream: torch.cuda.Stream,
    *,
    recordable: bool,
    content: bytes | None = None,
) -> ort.InferenceSession:
    """A session that runs on ``stream``, of ``content`` instead of the file's graph if there is any.

    With ``recordable`` ONNX Runtime's own graphs are enabled, although none is made (see ``_cuda_run_options``): it
    then rejects graphs that copy between host and device, and releases no host memory by a callback on the stream. A
    callback would be recorded, and free the same memory again at every launch (microsoft/onnxruntime#15002, #32081).

    No graph is captured meanwhile: the CUDA provider's constructor waits for the whole device.
    """
    cuda = {"device_id": str(device.index or 0), "user_compute_stream": str(stream.cuda_stream)}
    if recordable:
        cuda["enable_cuda_graph"] = "1"
    try:
        with one_capture:
            session = _open_session(path, options, [("CUDAExecutionProvider", cuda), "CPUExecutionProvider"], content)
    except BundleError as error:
        if is_out_of_memory(error):
            raise out_of_memory(f"the weights of {path} did not fit", device) from error
        raise
    if "CUDAExecutionProvider" not in session.get_providers():
        raise DeviceError(f"ONNX Runtime could not start its CUDA provider, its libraries are missing: {CUDA_HINT}")
    return session


def make_plain_session(path: Path) -> ort.InferenceSession:
    """A CPU session that runs a graph without optimisation; the weights stay in the file's mapping.

    A float16 weight is cast to float32 where the CPU provider has no float16 kernel: by default all casts run first,
    and a second copy of the model is in memory. Ordered by priority each runs before its use, and without an arena its
    memory is free again after it (SDXL's UNet at 1024x1024: 1.7 GB instead of 8.5 GB).

    Raises:
        BundleError: ONNX Runtime cannot load the file.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.log_severity_level = 4
    return _open_session(path, options, ["CPUExecutionProvider"])


class PlainEngine:
    """A component's graph without optimisation, on the CPU and in little memory: the reference for other engines."""

    capturable = False

    def __init__(self, path: Path, component: Component) -> None:
        _check_places(path, component)
        self.inputs = component.inputs
        self.outputs = component.outputs
        self.device = torch.device("cpu")
        self._session = make_plain_session(path)

    def run(self, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Run the graph once; the outputs are the caller's."""
        names = list(self.outputs)
        try:
            outputs = self._session.run(names, {name: tensor.numpy() for name, tensor in feeds.items()})
        except Exception as error:  # onnxruntime's exceptions share no base class but this
            raise EngineError(f"ONNX Runtime failed: {one_line(error)}") from error
        return {name: torch.from_numpy(np.asarray(output)) for name, output in zip(names, outputs, strict=True)}


def _check_places(path: Path, component: Component) -> None:
    """Check the places of weights where ONNX Runtime does not: before 1.24 it reads whichever file a graph names."""
    if _release() < (1, 24):
        check_external_data(path, component)


def _open_session(
    path: Path, options: ort.SessionOptions, providers: list, content: bytes | None = None
) -> ort.InferenceSession:
    try:
        # Without enable_fallback=0 a session that fails is made again without its options, our stream among them.
        return ort.InferenceSession(content or str(path), options, providers=providers, enable_fallback=0)
    except Exception as error:  # onnxruntime's exceptions share no base class but this
        raise BundleError(f"{path} cannot be loaded by ONNX Runtime: {one_line(error)}") from error
