"""engines/tensorrt against every recorded version of TensorRT's bindings, and how a backend is found and imported.

The recordings say what a version offers (scripts/record_tensorrt_api.py); ``surface.py`` makes a stand-in of each. What
a version lacks is an AttributeError there and other arguments are a TypeError, as they are in the bindings themselves.
"""

from __future__ import annotations

import ast
import contextlib
import errno
import gc
import importlib.metadata
import json
import math
import mmap
import subprocess
import sys
import types
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import record_tensorrt_api
import torch

from hypersd.engines.by_shapes import KEPT
from hypersd.engines.progress import Silent
from hypersd.engines.specs import Component, Range, TensorSpec
from hypersd.engines.tensorrt import api as api_module
from hypersd.engines.tensorrt import target_loader
from hypersd.engines.tensorrt.activation_memory import ActivationMemory
from hypersd.engines.tensorrt.api import OLDEST, TensorRTApi, installed_version, load_api
from hypersd.engines.tensorrt.attention import attentions_without_kernel, mark_decomposable
from hypersd.engines.tensorrt.build_process import BuildJob
from hypersd.engines.tensorrt.plan_builder import build_plan
from hypersd.engines.tensorrt.tensorrt_engine import TensorRTEngine, check_engine
from hypersd.engines.tensorrt.validate import _check_file
from hypersd.errors import BundleError, DeviceError, EngineError, RequestError

from .polygraphy_switch import polygraphy_for
from .surface import PLAN, RECORDINGS, StandIn

ROOT = Path(api_module.__file__).parent
CPU = torch.device("cpu")
VERSIONS = {recording.stem: recording for recording in RECORDINGS}
RTX = [name for name in VERSIONS if name.startswith("tensorrt_rtx")]
PLAIN = [name for name in VERSIONS if name not in RTX]


def with_attention(name: str) -> bool:
    return name in RTX or api_module._release(name.partition("-")[2]) >= (10, 14)


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def stand_in(version: str) -> StandIn:
    return StandIn(VERSIONS[version])


@pytest.fixture
def api(stand_in: StandIn) -> TensorRTApi:
    return TensorRTApi("tensorrt-rtx" if stand_in.package == "tensorrt_rtx" else "tensorrt", stand_in.module)


@pytest.fixture
def builder(stand_in: StandIn, api: TensorRTApi) -> Any:
    return stand_in.module.Builder(api.make_logger(lambda severity, text: None))


# the recordings


def test_recordings_reach_from_the_oldest_version_to_11() -> None:
    """Both ends of what is supported, and both sides of 10.14, which is the first with attention."""
    releases = {api_module._release(name.partition("-")[2]) for name in PLAIN}
    assert min(releases) == OLDEST["tensorrt"]
    assert {(10, 13), (10, 14), (11, 0)} <= releases
    assert min(api_module._release(name.partition("-")[2]) for name in RTX) >= OLDEST["tensorrt-rtx"]


def test_the_installed_version_is_what_was_recorded() -> None:
    """The recorder, run on the backend that is installed whole, says what its file says."""
    import tensorrt_rtx

    recording = VERSIONS.get(f"tensorrt_rtx-{tensorrt_rtx.__version__}")
    if recording is None:
        pytest.skip(f"no recording of tensorrt_rtx {tensorrt_rtx.__version__}")
    expected = {"package": "tensorrt_rtx", **record_tensorrt_api.record(tensorrt_rtx)}
    assert json.loads(recording.read_text()) == expected


def test_the_recorder_knows_every_name_that_the_package_uses() -> None:
    """A class that the package begins to use must be recorded, else no test below would see where it is missing."""
    used = set()
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[-1] == "trt":
                used.add(node.attr)
    assert {"Builder", "Runtime", "BuilderFlag"} <= used
    assert used - {"__version__"} <= {*record_tensorrt_api.CLASSES, *record_tensorrt_api.ENUMS}


def test_the_stand_in_rejects_what_its_version_lacks() -> None:
    """The stand-in itself: no other attribute, no other arguments, no other enum member, and no new attribute."""
    stand_in = StandIn(VERSIONS["tensorrt-10.8.0.43"])
    builder = stand_in.module.Builder(stand_in.module.ILogger())
    with pytest.raises(AttributeError):
        builder.build_serialized_network_to_stream  # noqa: B018
    with pytest.raises(AttributeError):
        stand_in.module.IStreamWriter  # noqa: B018
    with pytest.raises(AttributeError):
        builder.no_such_setting = 1
    with pytest.raises(TypeError, match=r"flags: int"):
        builder.create_network("strongly typed")
    with pytest.raises(TypeError):
        builder.create_network(0, 0)
    with pytest.raises(TypeError):
        stand_in.make("ICudaEngine").create_execution_context(stand_in.module.ProfilingVerbosity.DETAILED)
    with pytest.raises(AttributeError):
        stand_in.make("ICudaEngine").num_io_tensors = 3
    with pytest.raises(NotImplementedError):
        stand_in.make("ICudaEngine").num_io_tensors  # noqa: B018


# TensorRTApi: building


def test_networks_are_strongly_typed(stand_in: StandIn, api: TensorRTApi, builder: Any) -> None:
    """In every version, whatever the number of the flag: otherwise TensorRT 10 would choose types by itself."""
    api.create_network(builder)
    flag = stand_in.recorded["enums"]["NetworkDefinitionCreationFlag"]["STRONGLY_TYPED"]
    assert stand_in.called("Builder.create_network") == [(1 << flag,)]


def test_a_version_that_has_only_strong_types_needs_no_flag(stand_in: StandIn, api: TensorRTApi, builder: Any) -> None:
    """The flag is deprecated where nothing else is left; a version without it gets none."""
    del stand_in.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    api.create_network(builder)
    assert stand_in.called("Builder.create_network") == [(0,)]


def test_a_plan_is_streamed_where_the_version_can(
    stand_in: StandIn, api: TensorRTApi, builder: Any, version: str, tmp_path: Path
) -> None:
    """From 10.9 on a plan is never whole in memory; before it comes as one block. The file is the same."""
    built = api.build(builder, api.create_network(builder), stand_in.make("IBuilderConfig"), tmp_path / "plan")
    assert built is True
    assert (tmp_path / "plan").read_bytes() == PLAN
    streamed, whole = "Builder.build_serialized_network_to_stream", "Builder.build_serialized_network"
    expected = (0, 1) if version in ("tensorrt-10.3.0", "tensorrt-10.8.0.43") else (1, 0)
    assert (len(stand_in.called(streamed)), len(stand_in.called(whole))) == expected


def test_a_failed_build_is_false(stand_in: StandIn, api: TensorRTApi, builder: Any, tmp_path: Path) -> None:
    """TensorRT's own failure is no exception here: its logger was told why."""
    stand_in.behaviour["Builder.build_serialized_network"] = lambda *_: None
    stand_in.behaviour["Builder.build_serialized_network_to_stream"] = lambda *_: False
    network, config = api.create_network(builder), stand_in.make("IBuilderConfig")
    assert api.build(builder, network, config, tmp_path / "plan") is False


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_comes_out_as_itself(stand_in: StandIn, api: TensorRTApi, builder: Any) -> None:
    """Not as TensorRT's complaint that its writer failed, and nothing is thrown through TensorRT."""
    stand_in.behaviour["Builder.build_serialized_network"] = lambda *_: bytes(1 << 20)
    large = bytes(1 << 20)  # more than Python buffers, so that write() itself fails
    returned = []

    def build(_: Any, network: Any, config: Any, writer: Any) -> bool:
        returned.append(writer.write(large))
        return returned == [len(large)]

    stand_in.behaviour["Builder.build_serialized_network_to_stream"] = build
    with pytest.raises(OSError, match=r"No space left") as caught:
        api.build(builder, api.create_network(builder), stand_in.make("IBuilderConfig"), Path("/dev/full"))
    assert caught.value.errno == errno.ENOSPC
    assert returned in ([], [0])


def test_compute_capabilities_are_rtx_only(api: TensorRTApi, version: str) -> None:
    """TensorRT itself builds for the GPU that is there; RTX names those it can build for, oldest first."""
    if version in PLAIN:
        assert api.compute_capabilities == ()
    else:
        assert api.compute_capabilities == ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")


@pytest.mark.parametrize("version", RTX)
def test_a_plan_for_named_gpus(stand_in: StandIn, api: TensorRTApi) -> None:
    """RTX is told how many GPUs and each one's place."""
    api.set_compute_capabilities(stand_in.make("IBuilderConfig"), ["8.9", "12.0"])
    named = stand_in.module.ComputeCapability
    assert stand_in.calls == [
        ("IBuilderConfig.num_compute_capabilities", (2,)),
        ("IBuilderConfig.set_compute_capability", (named.SM89, 0)),
        ("IBuilderConfig.set_compute_capability", (named.SM120, 1)),
    ]


def test_the_logger_hands_on_every_severity_by_name(stand_in: StandIn, api: TensorRTApi) -> None:
    """The engine and the builder tell errors by that name."""
    said: list[tuple[str, str]] = []
    logger = api.make_logger(lambda severity, text: said.append((severity, text)))
    assert isinstance(logger, stand_in.module.ILogger)
    for severity in stand_in.module.ILogger.Severity.__members__.values():
        logger.log(severity, "text")
    assert {("INTERNAL_ERROR", "text"), ("ERROR", "text"), ("WARNING", "text"), ("VERBOSE", "text")} <= {*said}


def test_the_progress_monitor_is_the_versions_own(stand_in: StandIn, api: TensorRTApi) -> None:
    """It overrides the methods that the version calls, and hands the answer of ``step`` back."""
    told: list[tuple] = []
    monitor = api.make_progress_monitor(
        lambda *phase: told.append(phase), lambda name, index: index < 1, lambda name: told.append((name,))
    )
    recorded = stand_in.recorded["classes"]["IProgressMonitor"]["methods"]
    assert isinstance(monitor, stand_in.module.IProgressMonitor)
    assert {name for name in vars(type(monitor)) if not name.startswith("_")} == recorded.keys() - {"__init__"}
    monitor.phase_start("Building", None, 2)
    monitor.phase_finish("Building")
    assert [monitor.step_complete("Building", i) for i in range(2)] == [True, False]
    assert told == [("Building", None, 2), ("Building",)]


# attention


def test_attentions_are_found_and_marked_from_10_14_on(
    stand_in: StandIn, api: TensorRTApi, builder: Any, version: str
) -> None:
    """Older versions have none, not even where their enums speak of it; newer ones hand out each, and take the mark."""
    network = api.create_network(builder)
    if with_attention(version):
        stand_in.attentions = [stand_in.attention("first"), stand_in.attention("second")]
    stand_in.module.OnnxParser(network, stand_in.module.ILogger()).parse_from_file("a file")
    assert [attention.name for attention in api.attentions(network)] == (
        ["first", "second"] if with_attention(version) else []
    )
    marked = mark_decomposable(api, network, {"second"})
    assert marked == (["second"] if with_attention(version) else [])
    assert stand_in.called("IAttention.decomposable") == ([(True,)] if with_attention(version) else [])


@pytest.mark.parametrize("version", [name for name in VERSIONS if with_attention(name)])
def test_one_build_answers_for_all_attentions_alike(stand_in: StandIn, api: TensorRTApi, builder: Any) -> None:
    """Each kind of attention is tried once, with its mask; those without a kernel are named."""
    mask = stand_in.make("ITensor", name="mask", dtype=stand_in.module.DataType.HALF, shape=(1, 1, -1, 16))
    attentions = [stand_in.attention("plain"), stand_in.attention("masked", mask=mask), stand_in.attention("again")]
    stand_in.attentions = attentions
    network = api.create_network(builder)
    stand_in.module.OnnxParser(network, stand_in.module.ILogger()).parse_from_file("a file")
    answers = iter([PLAN, None])
    stand_in.behaviour["Builder.build_serialized_network"] = lambda *_: next(answers)
    missing = attentions_without_kernel(api, builder, network, lambda: stand_in.make("IBuilderConfig"))
    assert missing == {"masked"}
    assert len(stand_in.called("INetworkDefinition.add_attention")) == 2
    masks = [arguments for arguments in stand_in.called("INetworkDefinition.add_input") if arguments[0] == "mask"]
    assert masks == [("mask", stand_in.module.DataType.HALF, (1, 1, 64, 16))]  # an open dimension gets a usual size
    assert len(stand_in.called("IAttention.mask")) == 1


@pytest.mark.parametrize("version", [name for name in VERSIONS if with_attention(name)])
def test_a_single_head_is_tried_as_two(stand_in: StandIn, api: TensorRTApi, builder: Any) -> None:
    """TensorRT folds a single head away where nothing is around it, and then finds no kernel; an open length is 64."""
    attention = stand_in.attention("vae")
    attention._state["_inputs"] = [
        stand_in.make("ITensor", name="tensor", dtype=stand_in.module.DataType.HALF, shape=(1, 1, -1, 512))
    ] * 3
    stand_in.attentions = [attention]
    network = api.create_network(builder)
    stand_in.module.OnnxParser(network, stand_in.module.ILogger()).parse_from_file("a file")
    attentions_without_kernel(api, builder, network, lambda: stand_in.make("IBuilderConfig"))
    assert [shape for _, _, shape in stand_in.called("INetworkDefinition.add_input")] == [(1, 2, 64, 512)] * 3


# the builder


@pytest.fixture
def job(stand_in: StandIn, tmp_path: Path) -> BuildJob:
    """A network of one fixed and one ranged input, over a graph that leaves both open."""
    width = Range(name="width", min=8, opt=16, max=32)
    stand_in.inputs = {"fixed": ("HALF", (-1, 4)), "ranged": ("FLOAT", (1, -1))}
    stand_in.outputs = {"result": ("INT64", (1, -1))}
    return BuildJob(
        backend="tensorrt-rtx" if stand_in.package == "tensorrt_rtx" else "tensorrt",
        component="unet",
        onnx=str(write_attention(tmp_path)),
        plan=str(tmp_path / "plan"),
        inputs={
            "fixed": TensorSpec(dtype="float16", shape=(2, 4)),
            "ranged": TensorSpec(dtype="float32", shape=(1, width)),
        },
        outputs={"result": TensorSpec(dtype="int64", shape=(1, width))},
        optimization_level=3,
        stripped=stand_in.package == "tensorrt",  # RTX' way is tested with RTX itself, in test_plan_builder.py
        timing_cache=str(tmp_path / "cache" / "timings") if stand_in.package == "tensorrt" else None,
    )


def write_attention(folder: Path) -> Path:
    """A file with one Attention node."""
    inputs = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 2, 4, 8]) for name in "qkv"]
    result = onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, [1, 2, 4, 8])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Attention", [*"qkv"], ["out"])], "g", inputs, [result])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)])
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


@pytest.fixture
def imported(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """The stand-in as the module that ``load_api`` and Polygraphy import."""
    monkeypatch.setitem(sys.modules, stand_in.package, stand_in.module)
    load_api.cache_clear()
    with polygraphy_for(stand_in.package.replace("_", "-")):
        yield stand_in
    load_api.cache_clear()


def test_build_plan_runs_on_every_version(imported: StandIn, job: BuildJob, version: str) -> None:
    """The whole build, Polygraphy's part included: no attribute is used that the version lacks.

    Fixed dimensions are fixed in the network, ranged ones get a profile; float32 stays float32; a plan without weights
    can be given them again; RTX allocates nothing by itself; versions whose parser knows no Attention are given a graph
    without it, and told where it lies.
    """
    built = build_plan(job, lambda fraction, detail: True)
    assert Path(job.plan).read_bytes() == PLAN
    assert built.decomposed_attention == ()
    assert imported.called("ITensor.shape") == [((2, 4),)]
    assert ("ranged", (1, 8), (1, 16), (1, 32)) in imported.called("IOptimizationProfile.set_shape")
    assert imported.called("IBuilderConfig.builder_optimization_level") == [(3,)]
    flags = imported.module.BuilderFlag
    assert imported.called("IBuilderConfig.clear_flag") == [(flags.TF32,)]
    flag = flags.REQUIRE_USER_ALLOCATION if job.backend == "tensorrt-rtx" else flags.STRIP_PLAN
    assert {flag for (flag,) in imported.called("IBuilderConfig.set_flag")} == {flag}
    assert len(imported.called("IBuilderConfig.progress_monitor")) == 1
    parsed, lowered = imported.called("OnnxParser.parse_from_file"), imported.called("OnnxParser.parse")
    if with_attention(version):
        assert (parsed, lowered) == ([(job.onnx,)], [])
    else:
        assert parsed == []
        ((content, path),) = lowered
        assert path == job.onnx
        assert "Attention" not in {node.op_type for node in onnx.load_from_string(content).graph.node}


@pytest.mark.parametrize("version", PLAIN)
def test_kernel_timings_are_kept_for_the_next_build(imported: StandIn, job: BuildJob) -> None:
    """The first build makes the file and its folder, the second reads it."""
    assert job.timing_cache is not None
    build_plan(job, lambda fraction, detail: True)
    assert Path(job.timing_cache).read_bytes() == b"timings"
    build_plan(job, lambda fraction, detail: True)
    assert imported.called("IBuilderConfig.create_timing_cache") == [(b"",), (b"",), (b"timings",)]
    assert [path.name for path in Path(job.timing_cache).parent.iterdir() if "tmp" in path.name] == []


@pytest.mark.parametrize("version", PLAIN)
def test_kernel_timings_are_read_where_no_lock_can_be_written(imported: StandIn, job: BuildJob) -> None:
    """As in a read-only folder; nothing but the saving of new timings may fail there."""
    assert job.timing_cache is not None
    Path(job.timing_cache).parent.mkdir()
    Path(job.timing_cache).write_bytes(b"old timings")
    Path(f"{job.timing_cache}.lock").mkdir()
    build_plan(job, lambda fraction, detail: True)
    assert imported.called("IBuilderConfig.create_timing_cache")[-1] == (b"old timings",)


@pytest.mark.parametrize("version", PLAIN[:1])
@pytest.mark.parametrize("reply", [{"create": None}, {"set": False}], ids=["damaged", "of another GPU"])
def test_kernel_timings_that_are_rejected_are_made_anew(reply: dict, imported: StandIn, job: BuildJob) -> None:
    """The build goes on without them, and says so."""
    assert job.timing_cache is not None
    Path(job.timing_cache).parent.mkdir()
    Path(job.timing_cache).write_bytes(b"old timings")
    create = imported.behaviour["IBuilderConfig.create_timing_cache"]
    imported.behaviour |= {
        "IBuilderConfig.create_timing_cache": lambda config, content: (
            create(config) if "create" not in reply or not content else reply["create"]
        ),
        "IBuilderConfig.set_timing_cache": lambda *_: reply.get("set", True),
    }
    (note,) = [note for note in build_plan(job, lambda fraction, detail: True).notes if "timing cache" in note]
    assert note.endswith("is damaged, or not of this TensorRT and GPU: written anew")
    assert Path(job.timing_cache).read_bytes() == b"timings"


@pytest.mark.parametrize("version", PLAIN[:1])
def test_a_build_takes_the_cores_that_are_available(
    imported: StandIn, job: BuildJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container with 2 of 64 cores, 2 threads."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2})
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    build_plan(job, lambda fraction, detail: True)
    ((threads,),) = imported.called("Builder.max_threads")
    assert threads <= 3


@pytest.mark.parametrize("version", [name for name in VERSIONS if with_attention(name)])
def test_attention_becomes_plain_only_as_far_as_it_must(imported: StandIn, job: BuildJob) -> None:
    """First nothing is marked, then what has no kernel alone, then everything; then the build has failed.

    The reason given is the last build's, not what the little networks complained of.
    """
    imported.attentions = [imported.attention("first"), imported.attention("second", causal=True)]
    marks: list[list[bool]] = []

    def say(builder: Any, text: str) -> None:
        builder._state["_arguments"][0].log(imported.module.ILogger.Severity.ERROR, text)

    def build(builder: Any, *_: Any) -> bool:
        marks.append([attention._state.get("decomposable", False) for attention in imported.attentions])
        say(builder, f"try {len(marks)}: Attention operation was not supported by a dedicated kernel")
        return False

    def probe(builder: Any, *_: Any) -> bytes | None:
        *_, is_causal = imported.called("INetworkDefinition.add_attention")[-1]
        say(builder, "a little network")
        return None if is_causal else PLAN

    imported.behaviour["Builder.build_serialized_network_to_stream"] = build
    imported.behaviour["Builder.build_serialized_network"] = probe
    with pytest.raises(EngineError, match=r"unet: .* could not build the engine: try 3: [\w ]+ kernel$"):
        build_plan(job, lambda fraction, detail: True)
    assert marks == [[False, False], [False, True], [True, True]]
    assert not Path(job.plan).exists()


def test_a_parser_that_fails_names_node_and_operator(imported: StandIn, job: BuildJob) -> None:
    """The reason comes from ParserError, whose methods every version has."""
    said = {"node_name": "node_7", "node_operator": "Strange", "desc": "no\nimporter"}
    for name, text in said.items():
        imported.behaviour[f"ParserError.{name}"] = lambda _, text=text: text
    imported.behaviour["OnnxParser.parse_from_file"] = imported.behaviour["OnnxParser.parse"] = lambda *_: False
    imported.behaviour["OnnxParser.num_errors"] = lambda _: 1
    imported.behaviour["OnnxParser.get_error"] = lambda *_: imported.make("ParserError")
    with pytest.raises(EngineError, match=r"unet: .* cannot parse .*: node 'node_7' \(Strange\): no importer$"):
        build_plan(job, lambda fraction, detail: True)


# running


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


# weights from the ONNX file


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


# finding and importing a backend


@pytest.fixture
def nothing_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A folder to install a backend in; no backend has been imported, and none is when the test is over."""
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)  # so that monkeypatch puts back what was there
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    load_api.cache_clear()
    yield tmp_path
    load_api.cache_clear()


def install(folder: Path, module: str, code: str) -> None:
    (folder / module).mkdir()
    (folder / module / "__init__.py").write_text(code)


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_a_backend_that_is_not_installed(backend: str, nothing_loaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line with the way to install it."""
    monkeypatch.setitem(sys.modules, backend.replace("-", "_"), None)
    title = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}[backend]
    assert installed_version(backend) is None
    with pytest.raises(DeviceError, match=rf"^{title} is not installed: pip install -e '\.\[{backend}\]'$"):
        load_api(backend)


@pytest.mark.parametrize(
    ("backend", "version", "oldest"),
    [("tensorrt", "10.2.0.post1", "10.3"), ("tensorrt", "8.6.1", "10.3"), ("tensorrt-rtx", "1.6.0.42", "1.7")],
)
def test_a_backend_that_is_too_old(backend: str, version: str, oldest: str, nothing_loaded: Path) -> None:
    """Numbers are compared as numbers: 8 is older than 10."""
    install(nothing_loaded, backend.replace("-", "_"), f"__version__ = {version!r}")
    message = rf"^TensorRT(-RTX)? {version} is too old, expected {oldest}: pip install -e '\.\[{backend}\]' -U$"
    with pytest.raises(DeviceError, match=message):
        load_api(backend)


@pytest.mark.parametrize(
    ("backend", "version"), [("tensorrt", "10.3.0"), ("tensorrt", "11.0"), ("tensorrt-rtx", "2.0")]
)
def test_a_backend_that_is_new_enough(backend: str, version: str, nothing_loaded: Path) -> None:
    """The oldest itself, and a next major version. Installed without pip, its version is its own word."""
    install(nothing_loaded, backend.replace("-", "_"), f"__version__ = {version!r}")
    api = load_api(backend)
    assert (api.backend, api.version) == (backend, version)
    if backend == "tensorrt":
        assert installed_version(backend) == version


def test_a_folder_of_that_name_is_no_backend(nothing_loaded: Path) -> None:
    """An empty folder ``tensorrt`` where Python looks is importable, and yet nothing is installed."""
    (nothing_loaded / "tensorrt").mkdir()
    assert installed_version("tensorrt") is None
    with pytest.raises(DeviceError, match=r"^TensorRT without a version is too old"):
        load_api("tensorrt")


def test_libraries_that_are_missing(nothing_loaded: Path) -> None:
    """The wheel of the bindings is there, what it loads is not: one line with the loader's words and what to do."""
    code = "raise ImportError('libnvinfer.so.10: cannot open shared object file:\\nNo such file or directory')"
    install(nothing_loaded, "tensorrt", code)
    message = (
        r"^TensorRT cannot be loaded: libnvinfer\.so\.10: cannot open shared object file: No such file or directory; "
        r"install it anew: pip install -e '\.\[tensorrt\]'$"
    )
    with pytest.raises(DeviceError, match=message):
        load_api("tensorrt")
    assert installed_version("tensorrt") is None


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt_rtx", ""])
def test_a_backend_that_is_none(backend: str) -> None:
    """Not even a module's name will do: it never comes to an import."""
    with pytest.raises(RequestError, match=r"is not TensorRT: expected tensorrt or tensorrt-rtx$"):
        load_api(backend)


def test_the_real_backend_loads() -> None:
    """tensorrt_rtx as it is installed."""
    api = load_api("tensorrt-rtx")
    assert api.is_rtx
    assert str(api) == f"TensorRT-RTX {importlib.metadata.version('tensorrt-rtx')}"
    assert "8.9" in api.compute_capabilities


def test_looking_for_a_version_imports_nothing() -> None:
    """``hypersd info`` asks for versions: that must cost no seconds of loading libraries, nor their memory."""
    program = """if True:
        import sys
        import sys
        from hypersd.engines.tensorrt.api import installed_version
        print(installed_version("tensorrt-rtx"), "tensorrt_rtx" in sys.modules)
        print([name for name in sys.modules if name.startswith("tensorrt")])
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == [f"{importlib.metadata.version('tensorrt-rtx')} False", "[]"]
