"""The only module that imports TensorRT and TensorRT-RTX, and the only one that knows their differences.

``tensorrt`` (10.3 or newer, and 11) and ``tensorrt_rtx`` (1.7 or newer) have nearly one Python interface. A missing
feature is detected by its class or method; only what a parser takes follows from the release (:data:`DIALECTS`).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from ...errors import DeviceError, EngineError, RequestError, one_line
from ..lowering import Dialect, lower
from ..vocabulary import TENSORRT_BACKENDS, TensorRTBackend

TITLES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
# The manifest's names of TensorRT's types.
DTYPE_NAMES = {"FLOAT": "float32", "HALF": "float16", "INT64": "int64", "UINT8": "uint8"}
OLDEST = {"tensorrt": (10, 3), "tensorrt-rtx": (1, 7)}
# The ONNX that the parser of TensorRT takes up to a release, which takes more. GroupNormalization became another
# operator in opset 21, under its old name: the parser cannot be asked which of the two it knows.
DIALECTS = {
    (10, 9): Dialect(opset=20, lacks=frozenset({"Attention", "GroupNormalization"})),
    (10, 14): Dialect(opset=21, lacks=frozenset({"Attention"})),
}
_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_DISTRIBUTIONS = {
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu13-bindings", "tensorrt-cu12-bindings"),
    "tensorrt-rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu13-bindings"),
}

Log = Callable[[str, str], None]  # severity ("ERROR", "WARNING", ...), text


def installed_version(backend: str) -> str | None:
    """The version of an installed backend, without importing it; None if it is not installed."""
    if importlib.util.find_spec(_MODULES[backend]) is None:
        return None
    for distribution in _DISTRIBUTIONS[backend]:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    try:  # installed without pip, as some NVIDIA images have it
        return load_api(backend).version
    except DeviceError:
        return None


def pip_line(backend: str) -> str:
    """The command that installs a backend, in hypersd's clone: it is on no package index."""
    return f"pip install -e '.[{backend}]'"


@functools.cache
def load_api(backend: str) -> TensorRTApi:
    """Import a backend.

    Raises:
        RequestError: the name is unknown.
        DeviceError: it is not installed, lacks its libraries, or is too old.
    """
    if backend not in TENSORRT_BACKENDS:
        raise RequestError(f"backend {backend!r} is not TensorRT: expected {' or '.join(TENSORRT_BACKENDS)}")
    title = TITLES[backend]
    try:
        module = importlib.import_module(_MODULES[backend])
    except ModuleNotFoundError as error:
        raise DeviceError(f"{title} is not installed: {pip_line(backend)}") from error
    except Exception as error:  # a shared library that is missing or does not fit
        raise DeviceError(
            f"{title} cannot be loaded: {one_line(error)}; install it anew: {pip_line(backend)}"
        ) from error
    version = getattr(module, "__version__", "")
    if _release(version) < OLDEST[backend]:
        oldest = ".".join(map(str, OLDEST[backend]))
        raise DeviceError(
            f"{title} {version or 'without a version'} is too old, expected {oldest}: {pip_line(backend)} -U"
        )
    return TensorRTApi(cast(TensorRTBackend, backend), module)


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())


@dataclasses.dataclass(frozen=True)
class TensorRTApi:
    """TensorRT or TensorRT-RTX.

    Attributes:
        backend: ``"tensorrt"`` or ``"tensorrt-rtx"``.
        trt: its module.
    """

    backend: TensorRTBackend
    trt: Any

    @property
    def version(self) -> str:
        return self.trt.__version__

    @property
    def is_rtx(self) -> bool:
        """Whether plans are compiled for the GPU when they are loaded, so that building one takes no GPU."""
        return self.backend == "tensorrt-rtx"

    def __str__(self) -> str:
        return f"{TITLES[self.backend]} {self.version}"

    # building

    @property
    def compute_capabilities(self) -> tuple[str, ...]:
        """GPUs that a plan can be built for by name, such as ``"8.9"``; none if it is always this machine's."""
        names = getattr(getattr(self.trt, "ComputeCapability", None), "__members__", {})
        digits = [name.removeprefix("SM") for name in names if name.startswith("SM")]
        return tuple(f"{d[:-1]}.{d[-1]}" for d in sorted(digits, key=int))

    def make_logger(self, log: Log) -> Any:
        """A logger that calls ``log`` for each message; TensorRT objects made with it keep both alive."""
        trt = self.trt

        class Logger(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, text: str) -> None:
                log(severity.name, text)

        return Logger()

    def make_progress_monitor(
        self,
        start: Callable[[str, str | None, int], None],
        step: Callable[[str, int], bool],
        end: Callable[[str], None],
    ) -> Any:
        """A progress monitor; a ``step`` that returns False stops the build."""
        trt = self.trt

        class Monitor(trt.IProgressMonitor):
            def __init__(self) -> None:
                trt.IProgressMonitor.__init__(self)

            def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
                start(phase_name, parent_phase, num_steps)

            def step_complete(self, phase_name: str, step_index: int) -> bool:
                return step(phase_name, step_index)

            def phase_finish(self, phase_name: str) -> None:
                end(phase_name)

        return Monitor()

    def create_network(self, builder: Any) -> Any:
        """An empty network, strongly typed: its types are the ONNX file's, not TensorRT's choice."""
        flag = getattr(self.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        return builder.create_network(0 if flag is None else 1 << int(flag))  # 11 has no other kind

    @property
    def dialect(self) -> Dialect | None:
        """The ONNX that the parser takes, if that is less than what export writes."""
        if self.is_rtx:
            return None
        return next((dialect for release, dialect in DIALECTS.items() if _release(self.version) < release), None)

    def parse(self, parser: Any, onnx: Path) -> bool:
        """Parse an ONNX file into the parser's network; False if TensorRT cannot, with its reasons in the parser."""
        if self.dialect is None:
            return parser.parse_from_file(str(onnx))
        return parser.parse(lower(onnx, self.dialect), str(onnx))

    def attentions(self, network: Any) -> Iterator[Any]:
        """The fused attentions (``IAttention``) of a network; versions before 10.14 have none."""
        kind = getattr(self.trt.LayerType, "ATTENTION_INPUT", None)
        for i in range(network.num_layers if kind is not None else 0):
            layer = network.get_layer(i)
            if layer.type == kind:
                layer.__class__ = self.trt.IAttentionInputLayer  # the binding hands out the base class
                yield layer.attention

    def set_compute_capabilities(self, config: Any, capabilities: Sequence[str]) -> None:
        """Build for these GPUs instead of all."""
        config.num_compute_capabilities = len(capabilities)
        for i, capability in enumerate(capabilities):
            name = f"SM{capability.replace('.', '')}"
            config.set_compute_capability(getattr(self.trt.ComputeCapability, name), i)

    def build(self, builder: Any, network: Any, config: Any, path: Path) -> bool:
        """Build a plan into a file; False if TensorRT failed, with its reason in the log.

        Newer versions stream the plan to the file, which takes a tenth less memory at the peak.
        """
        if not hasattr(builder, "build_serialized_network_to_stream"):
            plan = builder.build_serialized_network(network, config)
            if plan is not None:
                path.write_bytes(plan)
            return plan is not None
        with path.open("wb") as file:
            writer = self._stream_writer(file)
            built = builder.build_serialized_network_to_stream(network, config, writer)
        if writer.error is not None:
            raise writer.error
        return bool(built)

    def _stream_writer(self, file: Any) -> Any:
        trt = self.trt

        class Writer(trt.IStreamWriter):
            error: OSError | None = None

            def __init__(self) -> None:
                trt.IStreamWriter.__init__(self)

            def write(self, data: Any) -> int:
                try:
                    return file.write(data)
                except OSError as error:  # an exception must not pass through TensorRT's C++ code
                    self.error = self.error or error
                    return 0

        return Writer()

    # running

    def invalidity(self, runtime: Any, plan: mmap.mmap) -> str | None:
        """TensorRT's reason why a plan cannot run here, such as ``UNSUPPORTED_CC``; None if it can or is unknown."""
        if not hasattr(runtime, "get_engine_validity"):
            return None
        validity, bits = runtime.get_engine_validity(plan[: runtime.engine_header_size])
        if validity != self.trt.EngineValidity.INVALID:
            return None
        diagnostics = self.trt.EngineInvalidityDiagnostics
        names = [name for name, flag in diagnostics.__members__.items() if bits & int(getattr(flag, "value", flag))]
        return ", ".join(names) or None

    def why_invalid(self, plan: Path) -> str | None:
        """:meth:`invalidity` of a plan's file."""
        logger = self.make_logger(lambda severity, text: None)
        runtime = self.trt.Runtime(logger)
        with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return self.invalidity(runtime, content)

    def create_context(self, engine: Any, runtime_cache: Any = None) -> Any:
        """An execution context whose activation memory the caller provides; None if there is too little memory."""
        managed = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self.is_rtx:
            return engine.create_execution_context(managed)
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(managed)
        # All kernels are compiled with the context, so that no call waits for one; hypersd records its own CUDA graphs.
        config.dynamic_shapes_kernel_specialization_strategy = self.trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.cuda_graph_strategy = self.trt.CudaGraphStrategy.DISABLED
        if runtime_cache is not None:
            config.set_runtime_cache(runtime_cache)
        return engine.create_execution_context(config)

    def is_capturable(self, context: Any, stream: int) -> bool:
        """Whether a context's runs can be recorded in a CUDA graph; RTX alone has engines that cannot."""
        return not hasattr(context, "is_stream_capturable") or context.is_stream_capturable(stream)

    def require_capturable(self, config: Any) -> None:
        """Forbid runs that allocate memory (TensorRT-RTX, at large shapes): no CUDA graph can record them."""
        flag = getattr(self.trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)
        if flag is not None:
            config.set_flag(flag)

    def create_runtime_cache(self, engine: Any, stored: Iterable[bytes]) -> Any:
        """TensorRT-RTX's cache of compiled kernels, None for TensorRT, which compiles nothing when it loads.

        Args:
            engine: the deserialized plan.
            stored: contents of earlier caches. The first that is whole and made by this version on such a GPU is taken,
                the cache is empty if none is.
        """
        if not self.is_rtx:
            return None
        cache = engine.create_runtime_config().create_runtime_cache()
        any(cache.deserialize(content) for content in stored)  # a rejected one leaves the cache unchanged
        return cache

    def serialize_runtime_cache(self, cache: Any) -> bytes:
        """The cache's content."""
        return bytes(cache.serialize())

    def refit(self, engine: Any, onnx: Path, logger: Any) -> None:
        """Load the weights of an ONNX file into a plan that has none.

        Raises:
            EngineError: the plan was built from another file.
        """
        refitter = self.trt.Refitter(engine, logger)
        parser = self.trt.OnnxParserRefitter(refitter, logger)
        if self.dialect is None:
            is_refitted = parser.refit_from_file(str(onnx))
        else:  # as it was parsed
            is_refitted = parser.refit_from_bytes(lower(onnx, self.dialect), str(onnx))
        if not is_refitted:
            errors = "; ".join(one_line(Exception(parser.get_error(i).desc())) for i in range(parser.num_errors))
            raise EngineError(f"{onnx} does not refit its plan: {errors or 'no reason given'}")
        if missing := list(refitter.get_missing_weights()):
            raise EngineError(f"{onnx} lacks weights that its plan needs: {', '.join(sorted(missing)[:5])}")
        if not refitter.refit_cuda_engine():
            raise EngineError(f"the plan of {onnx} could not be refitted: build it again")
