"""Builds with every recorded version of TensorRT: networks, attention, plans and kernel timings."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from small_graphs import write_attention

from hypersd.engines.specs import Range, TensorSpec
from hypersd.engines.tensorrt import api as api_module
from hypersd.engines.tensorrt.api import TensorRTApi, load_api
from hypersd.engines.tensorrt.attention import attentions_without_kernel, mark_decomposable
from hypersd.engines.tensorrt.build_process import BuildJob
from hypersd.engines.tensorrt.plan_builder import build_plan
from hypersd.errors import EngineError

from .polygraphy_switch import polygraphy_for
from .surface import PLAIN, PLAN, RTX, VERSIONS, StandIn


def with_attention(name: str) -> bool:
    return name in RTX or api_module._release(name.partition("-")[2]) >= (10, 14)


# TensorRTApi


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
