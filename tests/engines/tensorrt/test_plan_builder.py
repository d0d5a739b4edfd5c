"""Plans that TensorRT-RTX really builds: it needs no GPU for that."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hypersd.engines.bundle import Bundle
from hypersd.engines.specs import Component, Range, TensorSpec
from hypersd.engines.tensorrt.api import load_api
from hypersd.engines.tensorrt.build_process import BuildJob, Built
from hypersd.engines.tensorrt.plan_builder import BuildCancelledError, _Build, build_plan
from hypersd.engines.tensorrt.validate import _check_file
from hypersd.errors import BundleError, EngineError

from .bundle_jobs import component_job
from .polygraphy_switch import polygraphy_for

pytest.importorskip("tensorrt_rtx")
DTYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int64": TensorProto.INT64}
WIDTH = Range(name="width", min=8, opt=16, max=64)


@pytest.fixture(autouse=True)
def _polygraphy_of_rtx() -> Iterator[None]:
    with polygraphy_for("tensorrt-rtx"):
        yield


def spec(*shape: int | Range, dtype: Any = "float16") -> TensorSpec:
    return TensorSpec(dtype=dtype, shape=shape)


class Graph:
    """A small ONNX file, and the job of building it as it is.

    Dimensions that are a range are open in the file.
    """

    def __init__(self, folder: Path, inputs: dict[str, TensorSpec], outputs: dict[str, TensorSpec]) -> None:
        self.folder = folder
        self.inputs = inputs
        self.outputs = outputs
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def add(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> Graph:
        self.nodes.append(helper.make_node(operator, inputs, [output], name=f"{output}_node", **attributes))
        return self

    def weight(self, name: str, values: np.ndarray) -> Graph:
        self.weights.append(numpy_helper.from_array(values, name))
        return self

    def job(self, *, weights_beside: bool = False, **changes: Any) -> BuildJob:
        """Write the file; ``changes`` are to the job, which then is not what the file says."""
        described = [
            [self._described(name, tensor) for name, tensor in tensors.items()]
            for tensors in (self.inputs, self.outputs)
        ]
        graph = helper.make_graph(self.nodes, "graph", *described, self.weights)
        opsets = [helper.make_opsetid("", 23), helper.make_opsetid("elsewhere", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        beside = (
            {"save_as_external_data": True, "location": "model.onnx_data", "size_threshold": 0}
            if weights_beside
            else {}
        )
        onnx.save(model, self.folder / "model.onnx", **beside)
        return BuildJob(
            **{
                "backend": "tensorrt-rtx",
                "component": "unet",
                "onnx": str(self.folder / "model.onnx"),
                "plan": str(self.folder / "model.plan"),
                "inputs": self.inputs,
                "outputs": self.outputs,
                **changes,
            }
        )

    def _described(self, name: str, tensor: TensorSpec) -> onnx.ValueInfoProto:
        shape = [dim.name if isinstance(dim, Range) else dim for dim in tensor.shape]
        return helper.make_tensor_value_info(name, DTYPES[tensor.dtype], shape)


def doubler(folder: Path, tensor: TensorSpec) -> Graph:
    return Graph(folder, {"x": tensor}, {"y": tensor}).add("Add", ["x", "x"], "y")


def attention(folder: Path, *tensors: TensorSpec) -> Graph:
    """One attention for each tensor, from inputs of that shape; their nodes are out0_node, out1_node, ..."""
    inputs = {f"{name}{i}": tensor for i, tensor in enumerate(tensors) for name in "qkv"}
    graph = Graph(folder, inputs, {f"out{i}": tensor for i, tensor in enumerate(tensors)})
    for i in range(len(tensors)):
        graph.add("Attention", [f"{name}{i}" for name in "qkv"], f"out{i}")
    return graph


def go_on(fraction: float, detail: str) -> bool:
    return True


def build(job: BuildJob) -> Built:
    return build_plan(job, go_on)


# what comes out


def test_a_plan_is_written_and_known_again(tmp_path: Path) -> None:
    """The file is a plan of the installed version, with the network's tensors; the figures are those of the network."""
    weights = np.ones((256, 1024), dtype=np.float16)
    graph = Graph(tmp_path, {"x": spec(8, 256)}, {"y": spec(8, 1024)}).weight("w", weights)
    job = graph.add("MatMul", ["x", "w"], "y").job()
    built = build(job)
    component = Component(inputs=job.inputs, outputs=job.outputs, files=("model.onnx",), key="0" * 64)
    _check_file(load_api("tensorrt-rtx"), Path(job.plan), component)
    assert built.weights_memory is not None
    assert weights.nbytes <= built.weights_memory < 2 * weights.nbytes
    assert Path(job.plan).stat().st_size > weights.nbytes
    assert built.decomposed_attention == ()


def random_weights(*shape: int) -> np.ndarray:
    """Values that no compression makes small."""
    return np.random.default_rng(0).standard_normal(shape).astype(np.float16)


def convolutions(folder: Path) -> Graph:
    """A convolution with every attribute that is not the default, and a matrix product of its pixels."""
    graph = Graph(folder, {"x": spec(1, 64, 16, 16)}, {"y": spec(1, 64, 7, 256)})
    graph.weight("kernel", random_weights(64, 16, 3, 3)).weight("bias", random_weights(64))
    options = {"strides": [2, 3], "dilations": [2, 1], "group": 4, "pads": [0, 1, 1, 2]}
    graph.weight("matrix", random_weights(6, 256))
    return graph.add("Conv", ["x", "kernel", "bias"], "c", **options).add("MatMul", ["c", "matrix"], "y")


def test_a_plan_without_weights_needs_no_gpu(tmp_path: Path) -> None:
    """It has the same tensors and the weights' need of memory, and none of their bytes."""
    graph = Graph(tmp_path, {"x": spec(8, 1024)}, {"y": spec(8, 1024)}).weight("w", random_weights(1024, 1024))
    job = graph.add("MatMul", ["x", "w"], "y").job(weights_beside=True, stripped=True)
    built = build(job)
    assert Path(job.plan).stat().st_size < 0.1 * graph.weights[0].ByteSize()
    assert built.weights_memory is not None
    assert built.weights_memory >= 1024 * 1024 * 2
    component = Component(inputs=job.inputs, outputs=job.outputs, files=("model.onnx",), key="0" * 64)
    _check_file(load_api("tensorrt-rtx"), Path(job.plan), component)


def test_placeholders_change_nothing_but_weights(tmp_path: Path) -> None:
    """The new layers have the old ones' attributes and readers; the weights' names are for the refit."""
    from hypersd.engines.tensorrt.placeholders import MappedWeights, parse_mapped, replace_weights

    api, onnx_file = load_api("tensorrt-rtx"), Path(convolutions(tmp_path).job(weights_beside=True).onnx)
    logger = api.make_logger(lambda severity, text: None)
    network = api.create_network(api.trt.Builder(logger))
    weights = MappedWeights(onnx_file)
    assert set(weights.names.values()) == {"kernel", "bias", "matrix"}
    assert parse_mapped(api.trt.OnnxParser(network, logger), onnx_file, weights)
    before = network.num_layers
    assert replace_weights(api, network, weights) == 3
    new = {network.get_layer(i).name: network.get_layer(i) for i in range(before, network.num_layers)}
    assert len(new) == 2
    (convolution,) = [layer for layer in new.values() if layer.type == api.trt.LayerType.CONVOLUTION]
    assert tuple(convolution.get_output(0).shape) == (1, 64, 7, 6)
    convolution.__class__ = api.trt.IConvolutionLayer
    assert (tuple(convolution.stride_nd), tuple(convolution.dilation_nd), convolution.num_groups) == ((2, 3), (2, 1), 4)
    assert (tuple(convolution.pre_padding), tuple(convolution.post_padding)) == ((0, 1), (1, 2))
    for name in ("kernel", "bias", "matrix"):
        assert network.mark_weights_refittable(name)
    read = {
        network.get_layer(i).get_input(k).name for i in range(before) for k in range(network.get_layer(i).num_inputs)
    }
    assert {layer.get_output(0).name for layer in new.values()} <= read


def test_a_plan_with_all_of_its_weights_is_not_called_one_without(tmp_path: Path) -> None:
    """A graph has none beside it, and a layer that is the network's output keeps its own."""
    with pytest.raises(EngineError, match="has no weights to leave out: build it with them"):
        build(doubler(tmp_path, spec(8, 8)).job(stripped=True))
    graph = Graph(tmp_path, {"x": spec(1, 8, 16, 16)}, {"y": spec(1, 8, 14, 14)}).weight(
        "k", random_weights(8, 8, 3, 3)
    )
    with pytest.raises(EngineError, match="has no weights to leave out: build it with them"):
        build(graph.add("Conv", ["x", "k"], "y").job(weights_beside=True, stripped=True))


def test_the_unet_of_a_bundle_builds_without_weights(sd15_tiny_vae_bundle: Path, tmp_path: Path) -> None:
    """As export writes it, with ranges."""
    bundle = Bundle.load(sd15_tiny_vae_bundle)
    job = component_job(bundle, "unet", tmp_path / "plan", stripped=True)
    build(job)
    _check_file(load_api("tensorrt-rtx"), Path(job.plan), bundle.component("unet"))


def test_weights_that_are_cut_off_are_rejected(tmp_path: Path) -> None:
    job = convolutions(tmp_path).job(weights_beside=True, stripped=True)
    data = tmp_path / "model.onnx_data"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"model\.onnx_data ends inside \w+: export it again"):
        build(job)
    data.unlink()
    with pytest.raises(BundleError, match=r"model\.onnx_data cannot be read"):
        build(job)


@pytest.mark.parametrize(
    ("bundle", "component"),
    [
        *product(["sd15_bundle", "sdxl_dynamic_bundle"], ["text_encoder", "unet", "vae_decoder"]),
        *product(["sdxl_dynamic_bundle"], ["controlnet/canny", "controlnet_cond_embedding/canny", "vae_encoder"]),
    ],
)
def test_the_networks_of_a_bundle_build(
    bundle: str, component: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """As export writes them, in fp32 and fixed, in fp16 and ranged: TensorRT's parser takes every operator."""
    opened = Bundle.load(request.getfixturevalue(bundle))
    specs = opened.manifest.components[component]
    job = component_job(opened, component, tmp_path / "plan")
    built = build(job)
    _check_file(load_api("tensorrt-rtx"), Path(job.plan), specs)
    weights = sum(opened.manifest.files[file].size for file in specs.files)
    assert built.weights_memory is not None
    assert weights / 4 < built.weights_memory < 4 * weights


# shapes


def parsed(job: BuildJob) -> tuple[list[tuple[int, ...]], int]:
    """The network's inputs as they are built, and the number of profiles."""
    under_way = _Build(load_api("tensorrt-rtx"), job, go_on)
    under_way.monitor = under_way.api.make_progress_monitor(lambda *_: None, lambda *_: True, lambda *_: None)
    network = under_way._parse()
    shapes = [tuple(network.get_input(i).shape) for i in range(network.num_inputs)]
    return shapes, under_way._configure(network).num_optimization_profiles


def test_fixed_shapes_over_an_open_graph_become_static(tmp_path: Path) -> None:
    """A bundle with ranges, built for one size: kernels for that size, and no profile."""
    job = doubler(tmp_path, spec(1, WIDTH)).job(inputs={"x": spec(1, 16)}, outputs={"y": spec(1, 16)})
    assert parsed(job) == ([(1, 16)], 0)
    build(job)
    assert Path(job.plan).stat().st_size > 0


def test_ranged_shapes_get_a_profile(tmp_path: Path) -> None:
    """The open dimension stays open, and memory is planned for the largest extent."""
    job = doubler(tmp_path, spec(1, WIDTH)).job()
    assert parsed(job) == ([(1, -1)], 1)
    memory = []
    for most in (1 << 10, 1 << 20):
        wide = spec(1, Range(name="width", min=8, opt=16, max=most))
        graph = Graph(tmp_path, {"x": wide}, {"y": wide}).add("Softmax", ["x"], "s").add("Softmax", ["s"], "y", axis=0)
        memory.append(build(graph.job()).activation_memory)
    assert memory[0] < memory[1]


# a network that is not the job's


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": {"other": spec(1, 8)}}, r"has the inputs \['x'\], the manifest says \['other'\]; export it again$"),
        ({"inputs": {"x": spec(1, 8), "z": spec(1)}}, r"the inputs \['x'\], the manifest says \['x', 'z'\]"),
        ({"outputs": {}}, r"has the outputs \['y'\], the manifest says \[\]; export it again$"),
        (
            {"inputs": {"x": spec(1, 8, dtype="float32")}},
            r"input x is float16\[1, 8\], the manifest says float32\[1, 8\]",
        ),
        ({"inputs": {"x": spec(1, 9)}}, r"input x is float16\[1, 8\], the manifest says float16\[1, 9\]"),
        ({"inputs": {"x": spec(8)}}, r"input x is float16\[1, 8\], the manifest says float16\[8\]"),
        ({"outputs": {"y": spec(2, 8)}}, r"output y is float16\[1, 8\], the manifest says float16\[2, 8\]"),
        (
            {"outputs": {"y": spec(1, 8, dtype="int64")}},
            r"output y is float16\[1, 8\], the manifest says int64\[1, 8\]",
        ),
        ({"inputs": {"x": spec(1, WIDTH)}}, r"input x is float16\[1, 8\], the manifest says float16\[1, 8..64\]"),
    ],
)
def test_a_file_that_is_not_the_manifests(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Both are named, nothing is built, and no file is left."""
    job = doubler(tmp_path, spec(1, 8)).job(**changes)
    with pytest.raises(BundleError, match=message):
        build(job)
    assert not Path(job.plan).exists()


def test_a_parse_error_names_node_and_operator(tmp_path: Path) -> None:
    """The message is one line and names the part of the export that must change."""
    graph = Graph(tmp_path, {"x": spec(1, 8)}, {"y": spec(1, 8)})
    job = graph.add("Strange", ["x"], "y", domain="elsewhere").job()
    with pytest.raises(
        EngineError, match=r"^unet: TensorRT-RTX .* cannot parse .*: node 'y_node' \(Strange\): ."
    ) as caught:
        build(job)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not ONNX at all", None])
def test_a_file_that_cannot_be_parsed(content: bytes | None, tmp_path: Path) -> None:
    """Empty, something else, or not there: the message names the file, whatever else TensorRT says."""
    job = doubler(tmp_path, spec(1, 8)).job()
    Path(job.onnx).unlink()
    if content is not None:
        Path(job.onnx).write_bytes(content)
    with pytest.raises((EngineError, BundleError), match=r"model\.onnx"):
        build(job)


# attention

WITH_KERNEL = spec(1, 2, 64, 64)


@pytest.mark.parametrize(
    "tensor", [spec(1, 2, 64, 8), spec(1, 2, 64, 512), spec(1, 2, 64, 64, dtype="float32")], ids=str
)
def test_attention_without_a_kernel_becomes_plain(tensor: TensorSpec, tmp_path: Path) -> None:
    """The networks of tiny heads, the VAE's single head of 512 and float32: otherwise their builds fail. Only the one
    attention is marked, not the one beside it that has a kernel."""
    assert build(attention(tmp_path, WITH_KERNEL, tensor).job()).decomposed_attention == ("out1_node",)


def test_attention_with_a_kernel_stays_fused(tmp_path: Path) -> None:
    """Plain kernels would be slower and take memory for every pair of tokens."""
    assert build(attention(tmp_path, WITH_KERNEL).job()).decomposed_attention == ()


def test_ranged_attention_is_tried_at_a_usual_length(tmp_path: Path) -> None:
    """A length that varies does not stand in the way of the fused kernel, nor of finding out that there is none."""
    length = Range(name="length", min=16, opt=64, max=256)
    job = attention(tmp_path, spec(1, 2, length, 64), spec(1, 2, length, 8)).job()
    assert build(job).decomposed_attention == ("out1_node",)


# progress


def test_progress_rises_to_the_end(tmp_path: Path) -> None:
    """It never falls, not even where the build starts anew because of an attention, and names its phases."""
    told: list[tuple[float, str]] = []

    def report(fraction: float, detail: str) -> bool:
        told.append((fraction, detail))
        return True

    build_plan(attention(tmp_path, spec(1, 2, 64, 8)).job(), report)
    fractions = [fraction for fraction, _ in told]
    assert fractions == sorted(fractions)
    assert fractions[0] < 0.2
    assert fractions[-1] == 1.0
    assert len({round(fraction, 1) for fraction in fractions}) >= 5
    assert {"Building engine", "Optimizing graph"} <= {detail for _, detail in told}


@pytest.mark.parametrize("after", [0, 30])
def test_a_cancelled_build_leaves_no_file(after: int, tmp_path: Path) -> None:
    """At once or later: it is no error of TensorRT's, and nobody takes half a plan for a whole."""
    job = doubler(tmp_path, spec(1, 8)).job()
    reports: list[float] = []

    def report(fraction: float, detail: str) -> bool:
        reports.append(fraction)
        return len(reports) <= after

    with pytest.raises(BuildCancelledError):
        build_plan(job, report)
    assert len(reports) > after
    assert not Path(job.plan).exists()


def test_a_disk_that_is_full_is_the_systems_error(tmp_path: Path) -> None:
    """Through the real TensorRT, which gets no exception from its writer."""
    if not Path("/dev/full").exists():
        pytest.skip("needs a device that is always full")
    job = doubler(tmp_path, spec(1, 8)).job()
    link = tmp_path / "full"
    link.symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left"):
        build(BuildJob(**{name: getattr(job, name) for name in job.__struct_fields__} | {"plan": str(link)}))


def test_a_plan_for_named_gpus_is_another(tmp_path: Path) -> None:
    """The names reach TensorRT: it knows them, and says in the plan what it is for."""
    graph = doubler(tmp_path, spec(1, 8))
    build(graph.job())
    portable = (tmp_path / "model.plan").read_bytes()
    build(graph.job(compute_capabilities=("8.6", "8.9")))
    assert (tmp_path / "model.plan").read_bytes() != portable
