"""Engines of every recorded version of TensorRT: loading, running, memory, refusals, and weights from the ONNX file."""

from __future__ import annotations

import contextlib
import gc
import math
import mmap
import types
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from small_graphs import write_attention

from hypersd.engines.by_shapes import KEPT
from hypersd.engines.progress import Silent
from hypersd.engines.specs import Component, Range, TensorSpec
from hypersd.engines.tensorrt import target_loader
from hypersd.engines.tensorrt.activation_memory import ActivationMemory
from hypersd.engines.tensorrt.api import TensorRTApi
from hypersd.engines.tensorrt.tensorrt_engine import TensorRTEngine, check_engine
from hypersd.engines.tensorrt.validate import _check_file
from hypersd.errors import BundleError, DeviceError, EngineError

from .surface import PLAIN, RTX, StandIn

CPU = torch.device("cpu")
SPECS = Component(
    inputs={"sample": TensorSpec(dtype="float16", shape=(1, Range(name="width", min=8, opt=16, max=32)))},
    outputs={"out": TensorSpec(dtype="float32", shape=(1, Range(name="width", min=8, opt=16, max=32)))},
    files=("unet/model.onnx",),
    key="0" * 64,
)


@pytest.fixture
def engine_of(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """A stand-in whose runtime loads an engine of ``SPECS``, and torch that takes the CPU for a CUDA device."""
    modes, dtypes = stand_in.module.TensorIOMode, stand_in.module.DataType
    stand_in.behaviour |= {
        "ICudaEngine.num_io_tensors": lambda _: 2,
        "ICudaEngine.get_tensor_name": lambda _, i: ("sample", "out")[i],
        "ICudaEngine.get_tensor_mode": lambda _, name: modes.INPUT if name == "sample" else modes.OUTPUT,
        "ICudaEngine.get_tensor_dtype": lambda _, name: dtypes.HALF if name == "sample" else dtypes.FLOAT,
        "ICudaEngine.get_tensor_shape": lambda *_: (1, -1),
        "ICudaEngine.get_tensor_profile_shape": lambda *_: [(1, 8), (1, 16), (1, 32)],
        "IExecutionContext.get_tensor_shape": lambda *_: (1, 16),
    }
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    stream = types.SimpleNamespace(cuda_stream=7, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    return stand_in


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    (tmp_path / "unet.plan").write_bytes(b"a plan with the tensors sample and out")
    return tmp_path / "unet.plan"


@pytest.mark.parametrize("stripped", [False, True])
def test_an_engine_loads_and_runs_on_every_version(
    engine_of: StandIn, api: TensorRTApi, plan: Path, stripped: bool
) -> None:
    """From the file to the enqueued call: no attribute is used that the version lacks.

    Contexts get the shared activation memory; shapes and addresses are told once; the stream is torch's.
    """
    onnx_file = write_attention(plan.parent) if stripped else None
    engine = TensorRTEngine(api, "unet", plan, SPECS, CPU, ActivationMemory(CPU), onnx=onnx_file, cached=[b"earlier"])
    feeds = {"sample": aligned(1, 16)}
    outputs = [engine.run(feeds)["out"] for _ in range(2)]
    assert [(output.shape, output.dtype) for output in outputs] == [((1, 16), torch.float32)] * 2
    assert outputs[0].data_ptr() == outputs[1].data_ptr()
    ((_, size),) = engine_of.called("IExecutionContext.set_device_memory")
    assert size == engine.activation_memory == 512
    assert engine_of.called("IExecutionContext.set_input_shape") == [("sample", (1, 16))]
    assert engine_of.called("IExecutionContext.set_tensor_address") == [
        ("sample", feeds["sample"].data_ptr()),
        ("out", outputs[0].data_ptr()),
    ]
    assert engine_of.called("IExecutionContext.execute_async_v3") == [(7,), (7,)]
    from_file = stripped and hasattr(api.trt, "IAttention")
    assert engine_of.called("OnnxParserRefitter.refit_from_file") == ([(str(onnx_file),)] if from_file else [])
    assert engine.capturable
    assert engine.runtime_cache() == (b"kernels" if api.is_rtx else b"")
    assert engine_of.called("IRuntimeCache.deserialize") == ([(b"earlier",)] if api.is_rtx else [])


def aligned(*shape: int) -> torch.Tensor:
    """float16 zeros at an address that TensorRT takes, as those of a GPU's allocator are."""
    block = torch.zeros(math.prod(shape) * 2 + 256, dtype=torch.uint8)
    start = -block.data_ptr() % 256
    return block[start : start + math.prod(shape) * 2].view(torch.float16).view(shape)


def test_shapes_have_contexts_of_their_own(engine_of: StandIn, api: TensorRTApi, plan: Path) -> None:
    """The first run after a change of shapes cannot be recorded: one image may need several, in turns."""
    widths: list[int] = []
    engine_of.behaviour["IExecutionContext.get_tensor_shape"] = lambda *_: (1, widths[-1])
    engine = TensorRTEngine(api, "unet", plan, SPECS, CPU, ActivationMemory(CPU))
    for width in (16, 8, 16, 8):
        widths.append(width)
        assert engine.run({"sample": aligned(1, width)})["out"].shape == (1, width)
    assert engine_of.called("IExecutionContext.set_input_shape") == [("sample", (1, 16)), ("sample", (1, 8))]
    assert len({address for address, _ in engine_of.called("IExecutionContext.set_device_memory")}) == 1
    engine.drop_lanes()
    engine.run({"sample": aligned(1, 8)})
    assert len(engine_of.called("IExecutionContext.set_device_memory")) == 3


@pytest.mark.parametrize("version", RTX)
def test_rtx_is_asked_whether_a_run_can_be_recorded(engine_of: StandIn, api: TensorRTApi, plan: Path) -> None:
    """Once for every context, after its first run; what is known stays known when the context is gone."""
    engine_of.behaviour["IExecutionContext.is_stream_capturable"] = lambda *_: False
    engine = TensorRTEngine(api, "unet", plan, SPECS, CPU, ActivationMemory(CPU))
    assert engine.capturable
    for _ in range(3):
        engine.run({"sample": aligned(1, 16)})
    engine.drop_lanes()
    assert not engine.capturable
    assert engine_of.called("IExecutionContext.is_stream_capturable") == [(7,)]


@pytest.fixture
def made(engine_of: StandIn, api: TensorRTApi, plan: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A bundle with a stand-in for a target, "made", of one plan; the GPU is a stand-in, and so are its streams."""

    class Stream(types.SimpleNamespace):
        """A stand-in for a CUDA stream."""

        cuda_stream = 7

        def wait_stream(self, other: Any) -> None: ...
        def synchronize(self) -> None: ...

    monkeypatch.setattr(target_loader, "claim_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(target_loader, "load_api", lambda backend: api)
    monkeypatch.setenv("XDG_CACHE_HOME", str(plan.parent / "caches"))
    target = types.SimpleNamespace(
        backend=api.backend, version="1.7", stripped=False, plans={"unet": types.SimpleNamespace(file=plan.name)}
    )
    files = {plan.name: types.SimpleNamespace(sha256="0" * 64)}
    manifest = types.SimpleNamespace(engines={"made": target}, files=files)
    return types.SimpleNamespace(
        manifest=manifest, path=lambda file: plan.with_name(file), check_file=lambda file: None
    )


def test_memory_of_a_first_run_is_given_back(engine_of: StandIn, made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the contexts are gone: torch would keep it for a stream that nobody uses any more."""
    alive: list[int] = []
    contexts: weakref.WeakSet[Any] = weakref.WeakSet()

    class Watched(TensorRTEngine):
        def _make_lane(self, *args: Any) -> Any:
            lane = super()._make_lane(*args)
            contexts.add(lane)
            return lane

    monkeypatch.setattr(target_loader, "TensorRTEngine", Watched)
    monkeypatch.setattr(target_loader, "release_cached_memory", lambda device: alive.append(len(contexts)))
    target_loader.load_target(made, "made", {"unet": SPECS}, CPU, Silent())
    assert len(engine_of.called("IExecutionContext.execute_async_v3")) == 1
    assert alive == [0]
    late = target_loader.late_target(made, "made", {"unet": SPECS}, CPU)["unet"]
    late.run({"sample": aligned(1, 16)})
    assert alive == [0], "the kernels were kept, so nothing ran before"


def test_memory_of_a_late_engines_first_run_is_given_back(
    engine_of: StandIn, api: TensorRTApi, made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the run that loads it, after one that compiled RTX's kernels."""
    runs: list[int] = []
    execute = "IExecutionContext.execute_async_v3"
    monkeypatch.setattr(
        target_loader, "release_cached_memory", lambda device: runs.append(len(engine_of.called(execute)))
    )
    target_loader.late_target(made, "made", {"unet": SPECS}, CPU)["unet"].run({"sample": aligned(1, 16)})
    assert runs == [1] * api.is_rtx


@pytest.mark.parametrize("empty", [b"", b"header"])
def test_a_target_in_low_memory_loads_a_plan_when_it_is_needed(
    empty: bytes, engine_of: StandIn, api: TensorRTApi, made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a release the engine and its activations go; RTX's kernels are compiled and kept at the first load alone.

    A cache without kernels may be no bytes, or a header.
    """
    execute = "IExecutionContext.execute_async_v3"
    engine_of.behaviour["IRuntimeCache.serialize"] = lambda _: b"kernels" if engine_of.called(execute) else empty
    late = target_loader.late_target(made, "made", {"unet": SPECS}, CPU)["unet"]
    assert not engine_of.called("Runtime.deserialize_cuda_engine")
    loaded: list[weakref.ref[Any]] = []

    class Watched(TensorRTEngine):
        def __init__(self, *args: Any, **options: Any) -> None:
            assert all(engine() is None for engine in loaded), "the engine before it is released"
            super().__init__(*args, **options)
            loaded.append(weakref.ref(self))

    monkeypatch.setattr(target_loader, "TensorRTEngine", Watched)
    for load in range(1, 4):
        for _ in range(2):
            assert late.run({"sample": aligned(1, 16)})["out"].shape == (1, 16)
        assert len(loaded) == load
        runs = len(engine_of.called(execute))
        assert runs == 2 * load + api.is_rtx
        late.release()
        assert loaded[-1]() is None
    deserialized = engine_of.called("IRuntimeCache.deserialize")
    assert deserialized == ([(b"kernels",)] * 2 if api.is_rtx else [])


def test_a_row_of_a_larger_tensor_is_moved(engine_of: StandIn, api: TensorRTApi, plan: Path) -> None:
    """TensorRT takes addresses that are multiples of 256 alone; a second row of token ids is at none."""
    engine = TensorRTEngine(api, "unet", plan, SPECS, CPU, ActivationMemory(CPU))
    tensor = aligned(3, 16)
    for row in range(3):
        engine.run({"sample": tensor[row : row + 1]})
    addresses = [at for name, at in engine_of.called("IExecutionContext.set_tensor_address") if name == "sample"]
    assert tensor.data_ptr() in addresses
    assert not {tensor[1:].data_ptr(), tensor[2:].data_ptr()} & set(addresses)


def test_an_engine_is_freed_with_its_last_reference(engine_of: StandIn, api: TensorRTApi, plan: Path) -> None:
    """The runtime keeps the logger where Python cannot see it: gigabytes must not hang on what the logger refers to."""
    loggers: list[Any] = []
    make = api.trt.Runtime.__init__
    engine_of.module.Runtime.__init__ = lambda self, logger: (loggers.append(logger), make(self, logger))[1]
    engine = TensorRTEngine(api, "unet", plan, SPECS, CPU, ActivationMemory(CPU))
    engine.run({"sample": aligned(1, 16)})
    gone = weakref.ref(engine)
    del engine
    gc.collect()
    assert loggers
    assert gone() is None


def test_contexts_bring_no_memory_of_their_own(stand_in: StandIn, api: TensorRTApi) -> None:
    """USER_MANAGED in every version, else each engine would hold its own gigabytes of activations.

    RTX compiles every kernel at once, records no CUDA graphs by itself and shares the cache that it is given.
    """
    cache = object.__new__(stand_in.module.IRuntimeCache) if api.is_rtx else None
    api.create_context(stand_in.make("ICudaEngine"), cache)
    managed = stand_in.module.ExecutionContextAllocationStrategy.USER_MANAGED
    if not api.is_rtx:
        assert stand_in.calls == [("ICudaEngine.create_execution_context", (managed,))]
        return
    trt = stand_in.module
    assert stand_in.called("IRuntimeConfig.set_execution_context_allocation_strategy") == [(managed,)]
    assert stand_in.called("IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy") == [
        (trt.DynamicShapesKernelSpecializationStrategy.EAGER,)
    ]
    assert stand_in.called("IRuntimeConfig.cuda_graph_strategy") == [(trt.CudaGraphStrategy.DISABLED,)]
    assert stand_in.called("IRuntimeConfig.set_runtime_cache") == [(cache,)]
    ((config,),) = stand_in.called("ICudaEngine.create_execution_context")
    assert isinstance(config, trt.IRuntimeConfig)


def test_runtime_caches_are_rtx_only(stand_in: StandIn, api: TensorRTApi) -> None:
    """Other backends compile nothing when they load."""
    cache = api.create_runtime_cache(stand_in.make("ICudaEngine"), [])
    assert (cache is not None) == api.is_rtx
    assert stand_in.called("IRuntimeCache.deserialize") == []
    if api.is_rtx:
        assert api.serialize_runtime_cache(cache) == b"kernels"


def test_a_runtime_cache_that_is_rejected_makes_room_for_the_next(stand_in: StandIn, api: TensorRTApi) -> None:
    """A corrupt one, or one of another version or GPU; the rest is not read once one is taken."""
    stand_in.behaviour["IRuntimeCache.deserialize"] = lambda _, content: content == b"good"
    stored = iter([b"of another GPU", b"good", b"unread"])
    cache = api.create_runtime_cache(stand_in.make("ICudaEngine"), stored)
    assert (cache is not None) == api.is_rtx
    assert list(stored) == ([b"unread"] if api.is_rtx else [b"of another GPU", b"good", b"unread"])


def test_an_engine_must_be_the_manifests(engine_of: StandIn, api: TensorRTApi, plan: Path) -> None:
    """Name, direction, type, shape and range of every tensor, in every version's words."""
    check_engine(api, engine_of.make("ICudaEngine"), plan, SPECS)
    modes, dtypes = engine_of.module.TensorIOMode, engine_of.module.DataType
    for name, wrong in {
        "get_tensor_name": lambda _, i: ("sample", "other")[i],
        "get_tensor_mode": lambda *_: modes.INPUT,
        "get_tensor_dtype": lambda *_: dtypes.INT64,
        "get_tensor_shape": lambda *_: (2, -1),
        "get_tensor_profile_shape": lambda *_: [(1, 8), (1, 16), (1, 31)],
    }.items():
        right = engine_of.behaviour[f"ICudaEngine.{name}"]
        engine_of.behaviour[f"ICudaEngine.{name}"] = wrong
        with pytest.raises(BundleError, match=r"the manifest says .*: build it again with `hypersd build`"):
            check_engine(api, engine_of.make("ICudaEngine"), plan, SPECS)
        engine_of.behaviour[f"ICudaEngine.{name}"] = right


def test_dropping_a_context_waits_for_its_stream_alone(
    engine_of: StandIn, api: TensorRTApi, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wait for the whole device would invalidate a CUDA graph that another thread is recording.

    So would one for another stream, which may be the one that is recorded: each has its own contexts, and drops those.
    """
    waited: list[int] = []

    def run_on(stream: int, width: int) -> None:
        on = types.SimpleNamespace(cuda_stream=stream, synchronize=lambda: waited.append(stream))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: on)
        engine.run({"sample": torch.zeros(1, width, dtype=torch.float16)})

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: pytest.fail("waited for the device"))
    engine = TensorRTEngine(api, "unet", plan, SPECS, CPU, ActivationMemory(CPU))
    run_on(1, 8)
    for width in range(8, 8 + KEPT):
        run_on(2, width)
    assert waited == []
    run_on(2, 32)
    assert waited == [2]


def test_every_refusal_of_tensorrt_is_an_error(engine_of: StandIn, api: TensorRTApi, plan: Path) -> None:
    """Each answer of False or None is looked at: a plan, a context, a shape, an address, the call itself."""

    def engine() -> TensorRTEngine:
        return TensorRTEngine(api, "unet", plan, SPECS, CPU, ActivationMemory(CPU))

    feeds = {"sample": torch.zeros(1, 16, dtype=torch.float16)}
    for name, answer, message in [
        ("Runtime.deserialize_cuda_engine", None, r"unet: TensorRT.* cannot load .* on a GPU .*8.9.*it gave no reason"),
        (
            "ICudaEngine.create_execution_context",
            None,
            "unet: TensorRT.* cannot make a context: it gave no reason .*GB of device memory are free",
        ),
        ("IExecutionContext.set_input_shape", False, r"input 'sample': TensorRT does not take the shape \[1, 16\]"),
        ("IExecutionContext.set_tensor_address", False, "tensor 'sample': TensorRT does not take its address"),
        ("IExecutionContext.execute_async_v3", False, "unet: TensorRT.* failed: it gave no reason"),
    ]:
        right = engine_of.behaviour.get(name)
        engine_of.behaviour[name] = lambda *_, answer=answer: answer
        with pytest.raises(EngineError, match=message):
            engine().run(feeds)
        if right is None:
            del engine_of.behaviour[name]
        else:
            engine_of.behaviour[name] = right


def test_the_check_after_a_build_runs_on_every_version(engine_of: StandIn, api: TensorRTApi, plan: Path) -> None:
    """The header where the version can read it, and the tensors' names in the file."""
    _check_file(api, plan, SPECS)
    plan.write_bytes(b"a plan with the tensor sample")
    with pytest.raises(EngineError, match=r"has no tensor out"):
        _check_file(api, plan, SPECS)


@contextlib.contextmanager
def mapped(path: Path) -> Iterator[mmap.mmap]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        yield content


@pytest.mark.parametrize("version", PLAIN)
def test_versions_that_cannot_tell_say_nothing_of_validity(stand_in: StandIn, api: TensorRTApi, plan: Path) -> None:
    """They find out when they load."""
    with mapped(plan) as content:
        assert api.invalidity(stand_in.make("Runtime"), content) is None


@pytest.mark.parametrize("version", RTX)
def test_invalidity_is_named(stand_in: StandIn, api: TensorRTApi, plan: Path) -> None:
    """RTX looks at the header alone; its bits become its own words, in the order of its enum."""
    trt = stand_in.module
    bits = trt.EngineInvalidityDiagnostics.UNSUPPORTED_CC.value | trt.EngineInvalidityDiagnostics.CUDA_ERROR.value
    for validity, answer, expected in [
        (trt.EngineValidity.INVALID, bits, "UNSUPPORTED_CC, CUDA_ERROR"),
        (trt.EngineValidity.SUBOPTIMAL, bits, None),
        (trt.EngineValidity.VALID, 0, None),
    ]:
        stand_in.behaviour["Runtime.get_engine_validity"] = lambda *_, answer=(validity, answer): answer
        with mapped(plan) as content:
            assert api.invalidity(stand_in.make("Runtime"), content) == expected
    assert set(stand_in.called("Runtime.get_engine_validity")) == {(plan.read_bytes()[:4],)}


@pytest.mark.parametrize("version", RTX)
def test_a_plan_for_another_gpu_is_a_device_error(engine_of: StandIn, api: TensorRTApi, plan: Path) -> None:
    """Refused before it is loaded, in RTX's words and with both the GPU and what to do."""
    trt = engine_of.module
    engine_of.behaviour["Runtime.get_engine_validity"] = lambda *_: (
        trt.EngineValidity.INVALID,
        trt.EngineInvalidityDiagnostics.UNSUPPORTED_CC.value,
    )
    with pytest.raises(DeviceError, match=r"a GPU \(compute capability 8.9\): UNSUPPORTED_CC; build it again"):
        TensorRTEngine(api, "unet", plan, SPECS, CPU, ActivationMemory(CPU))
    assert engine_of.called("Runtime.deserialize_cuda_engine") == []


def test_refit_takes_the_weights_of_the_file(stand_in: StandIn, api: TensorRTApi, tmp_path: Path) -> None:
    """By path, because the weights lie beside it, and then into the engine; from the graph that was built."""
    logger = api.make_logger(lambda severity, text: None)
    api.refit(stand_in.make("ICudaEngine"), write_attention(tmp_path), logger)
    for content, path in stand_in.called("OnnxParserRefitter.refit_from_bytes"):
        assert path == str(tmp_path / "model.onnx")
        assert "Attention" not in {node.op_type for node in onnx.load_from_string(content).graph.node}
    parser = "refit_from_file" if api.dialect is None else "refit_from_bytes"
    assert [name for name, _ in stand_in.calls] == [
        f"OnnxParserRefitter.{parser}",
        "Refitter.get_missing_weights",
        "Refitter.refit_cuda_engine",
    ]


@pytest.mark.parametrize(
    ("name", "answer", "message"),
    [
        ("OnnxParserRefitter.refit_from_file", False, "does not refit its plan: first reason; second reason$"),
        ("Refitter.get_missing_weights", ["d", "c", "b", "a", "f", "e"], "lacks weights .* needs: a, b, c, d, e$"),
        ("Refitter.refit_cuda_engine", False, "could not be refitted: build it again$"),
    ],
)
def test_a_file_that_does_not_refit_its_plan(
    stand_in: StandIn, api: TensorRTApi, name: str, answer: Any, message: str, tmp_path: Path
) -> None:
    """Each of the three steps can fail, and names the file."""
    reasons = iter(["first\nreason", "second reason"])
    stand_in.behaviour |= {
        name: lambda *_: answer,
        name.replace("from_file", "from_bytes"): lambda *_: answer,
        "OnnxParserRefitter.num_errors": lambda _: 2,
        "OnnxParserRefitter.get_error": lambda *_: stand_in.make("ParserError"),
        "ParserError.desc": lambda _: next(reasons),
    }
    logger = api.make_logger(lambda severity, text: None)
    with pytest.raises(EngineError, match=rf"^(the plan of )?{tmp_path}/model\.onnx .*{message}"):
        api.refit(stand_in.make("ICudaEngine"), write_attention(tmp_path), logger)
