"""Graphs for older parsers and runtimes: nothing is left that they lack, and ONNX Runtime's CPU provider says that the
graphs compute the same.

The lists in tests/assets/operators name their sources; see scripts/record_operators.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx.numpy_helper
import onnxruntime
import pytest
import record_operators
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from hypersd.engines.bundle import Bundle
from hypersd.engines.compare import TOLERANCES, differences
from hypersd.engines.image_shapes import extents_of
from hypersd.engines.lora_slot import LORA
from hypersd.engines.lowering import UNCHANGED_SINCE, Dialect, lower
from hypersd.engines.onnx_runtime import CUDA_DIALECT, SILENT_VERSIONS_LACK
from hypersd.engines.specs import TensorSpec
from hypersd.engines.tensorrt.api import DIALECTS, TensorRTApi
from hypersd.errors import EngineError
from hypersd.runtime.params import Params

LISTS = {path.stem: json.loads(path.read_text()) for path in sorted(record_operators.OUT.glob("*.json"))}
CUDA = [name for name in LISTS if name.startswith("onnxruntime")]
ALL_KERNELS = ["onnxruntime-gpu-1.27.0", "onnxruntime-gpu-1.31.1"]  # that have a kernel for all of our operators
TYPES = {
    TensorProto.FLOAT: "FP32",
    TensorProto.FLOAT16: "FP16",
    TensorProto.INT64: "INT64",
    TensorProto.INT32: "INT32",
    TensorProto.BOOL: "BOOL",
    TensorProto.UINT8: "UINT8",
    TensorProto.INT8: "INT8",
}
CUDA_TYPES = {
    "FP32": "float",
    "FP16": "float16",
    "INT64": "int64",
    "INT32": "int32",
    "BOOL": "bool",
    "UINT8": "uint8",
    "INT8": "int8",
}
SD15, SDXL = "Hyper-SD15-1step-lora", "Hyper-SDXL-1step-Unet"


def dialect_of(name: str) -> Dialect | None:
    """What our code writes for the version of a list."""
    if name.startswith("onnxruntime"):
        return None if name in ALL_KERNELS else CUDA_DIALECT
    module: Any = SimpleNamespace(__version__=LISTS[name]["release"])
    return TensorRTApi("tensorrt-rtx" if "rtx" in name else "tensorrt", module).dialect


def graph_for(path: Path, dialect: Dialect | None) -> onnx.ModelProto:
    if dialect is None:
        return onnx.load(path, load_external_data=False)
    return onnx.load_from_string(lower(path, dialect))


def opset_of(model: onnx.ModelProto) -> int:
    return next(entry.version for entry in model.opset_import if not entry.domain)


Node = tuple[str, int, str | None]  # the operator, the opset that it is of, and its data's type


def nodes_of(model: onnx.ModelProto) -> set[Node]:
    """The kinds of nodes in a graph. The data is the input that the schema calls T, else the first."""
    assert not model.functions
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    types |= {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}
    nodes: set[Node] = set()
    for node in graph.node:
        assert not node.domain
        assert not any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute)
        schema = onnx.defs.get_schema(node.op_type, opset_of(model))
        data = next((name for name, port in zip(node.input, schema.inputs, strict=False) if port.type_str == "T"), None)
        dtype = types.get(data or next(iter(node.input), ""))
        nodes.add((node.op_type, schema.since_version, TYPES[dtype] if dtype else None))
    return nodes


def missing_in_parser(nodes: set[Node], listed: dict[str, Any]) -> set[Node]:
    """Nodes that a TensorRT parser does not take."""

    def takes(operator: str, since: int, dtype: str | None) -> bool:
        types = listed["operators"].get(operator)
        is_listed = types is not None and (not types or dtype is None or dtype in types.split())
        return is_listed and since <= listed.get("until_opset", {}).get(operator, since)

    return {node for node in nodes if not takes(*node)}


def missing_on_cuda(nodes: set[Node], listed: dict[str, Any]) -> set[Node]:
    """Nodes that have no CUDA kernel: one is of the operator's own opset, or of a range that has an end."""

    def has_kernel(operator: str, since: int, dtype: str | None) -> bool:
        return operator == "Constant" or any(
            (first == since or (last is not None and first <= since <= last))
            and (dtype is None or not types or CUDA_TYPES[dtype] in types.split())
            for first, last, types in listed["operators"].get(operator, [])
        )

    return {node for node in nodes if not has_kernel(*node)}


def missing(model: onnx.ModelProto, names: list[str]) -> dict[str, set[Node]]:
    """By list, what the version does not take of a graph."""
    found = {}
    nodes: dict[frozenset[str], set[Node]] = {}
    operators = {node.op_type for node in model.graph.node}
    for name in names:
        listed = LISTS[name]
        # ONNX Runtime expands a function that no provider has a kernel for.
        expanded = frozenset(operators - {*listed["operators"], *listed["cpu"]}) if name in CUDA else frozenset()
        if expanded not in nodes:
            functions = [("", operator) for operator in sorted(expanded)]
            nodes[expanded] = nodes_of(
                onnx.inliner.inline_selected_functions(model, functions, inline_schema_functions=True)
            )
        found[name] = (missing_on_cuda if name in CUDA else missing_in_parser)(nodes[expanded], listed)
    return found


@pytest.fixture(scope="module")
def bundle_of(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """``bundle_of(kind)``: a tiny bundle; the kinds together have every sort of component."""

    def one_graph() -> Path:
        from hypersd.tools.one_graph import add_one_graph

        root = tmp_path_factory.mktemp("one-graph") / "bundle"
        shutil.copytree(request.getfixturevalue("sd15_bundle"), root)
        return add_one_graph(Bundle.load(root), Params(prompt="", num_inference_steps=2)).root

    def load(kind: str) -> Bundle:
        if kind == "one-graph":
            return Bundle.load(one_graph())
        if kind.startswith("export_"):
            return Bundle.load(request.getfixturevalue(kind)(SDXL if kind == "export_slotted" else SD15))
        return Bundle.load(request.getfixturevalue(kind))

    return load


KINDS = [
    "export_controlled",
    "export_slotted",  # SDXL, with a LoRA slot in all its networks
    "sdxl_dynamic_bundle",  # in float16, with a ControlNet
    "sd15_tiny_vae_bundle",  # ranges of shapes in float32
    "demo_int8_bundle",
    "one-graph",
]


def graphs_of(bundle: Bundle) -> dict[str, Path]:
    manifest = bundle.manifest
    components = {name: bundle.path(component.onnx) for name, component in manifest.components.items()}
    return components | {name: bundle.path(graph.network.onnx) for name, graph in manifest.one_graphs.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_version_takes_every_component(kind: str, bundle_of: Callable[[str], Bundle]) -> None:
    """Of the graph that our code gives to a version, its list has every operator, in this opset and type."""
    for component, path in graphs_of(bundle_of(kind)).items():
        for dialect in {dialect_of(name) for name in LISTS}:
            names = [name for name in LISTS if dialect_of(name) == dialect]
            graph = graph_for(path, dialect)
            assert missing(graph, names) == {name: set() for name in names}, component
            assert all(opset_of(graph) <= LISTS[name].get("opset", 23) for name in names)


def test_versions_lack_what_is_lowered_for_them(sd15_bundle: Path) -> None:
    """The lists do say it: without lowering TensorRT before 10.14 cannot parse the UNet, nor 10.8 its normalization,
    and ONNX Runtime before 1.27 does not run all of it on a GPU: 1.23 not even its convolutions."""
    unet = graph_for(sd15_bundle / "unet" / "model.onnx", None)
    operators = {name: {operator for operator, *_ in nodes} for name, nodes in missing(unet, list(LISTS)).items()}
    assert operators == {
        "tensorrt-10.3": {"Attention", "GroupNormalization"},
        "tensorrt-10.8": {"Attention", "GroupNormalization"},
        "tensorrt-10.13": {"Attention"},
        "tensorrt-10.14": set(),
        "tensorrt-10.16": set(),
        "tensorrt-11.1": set(),
        "tensorrt_rtx-1.7.1.116": set(),
        "onnxruntime-gpu-1.23.2": {
            *("Attention", "Resize", "Sin", "Cos"),
            *("Cast", "Conv", "Reshape", "Shape", "Transpose", "Unsqueeze"),
        },
        "onnxruntime-gpu-1.24.4": {"Attention", "Resize", "Sin", "Cos"},
        "onnxruntime-gpu-1.25.0": {"Sin", "Cos"},
        "onnxruntime-gpu-1.26.0": {"Sin", "Cos"},
        "onnxruntime-gpu-1.27.0": set(),
        "onnxruntime-gpu-1.31.1": set(),
    }
    assert operators["onnxruntime-gpu-1.23.2"] <= set(SILENT_VERSIONS_LACK)


def test_the_installed_parser_takes_what_its_list_says() -> None:
    """TensorRT-RTX is asked itself, and says what was recorded."""
    pytest.importorskip("tensorrt_rtx")
    recorded = record_operators.record_rtx()
    listed = LISTS.get(f"tensorrt_rtx-{recorded['release']}")
    if listed is None:
        pytest.skip(f"no list of tensorrt_rtx {recorded['release']}")
    assert recorded == listed


def random_input(name: str, spec: TensorSpec, end: int, generator: np.random.Generator) -> np.ndarray:
    shape = extents_of(spec)[end]
    if spec.dtype == "int64":
        return generator.integers(0, 64, shape)
    scale = 0.01 if name == LORA else 1.0  # a LoRA as large as its network's weights would only amplify roundings
    return (scale * generator.standard_normal(shape)).astype(spec.dtype)


def run(path: Path, *runs: dict[str, np.ndarray]) -> list[list[np.ndarray]]:
    """The outputs of each run."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [session.run(None, feeds) for feeds in runs]


@pytest.mark.parametrize("kind", ["export_controlled", "export_slotted", "sdxl_dynamic_bundle"])
def test_the_lowered_graphs_compute_the_same(kind: str, bundle_of: Callable[[str], Bundle], tmp_path: Path) -> None:
    """The graph is valid, and its outputs are the original's: with the causal mask of the text encoder, at both ends of
    the fp16 bundle's ranges, and with the weights where they were, beside the graph. GroupNormalization says nothing
    here: ONNX Runtime's CPU provider expands it as the lowering does, and the export has compared that with torch.

    Within the tolerance of the precision that is computed in (:data:`hypersd.engines.compare.TOLERANCES`).
    """
    bundle = bundle_of(kind)
    for component, specs in bundle.manifest.components.items():
        original, generator = bundle.path(specs.onnx), np.random.default_rng(0)
        ends = [
            {name: random_input(name, spec, end, generator) for name, spec in specs.inputs.items()}
            for end in ((0, 2) if "dynamic" in kind else (0,))
        ]
        expected = run(original, *ends)
        shutil.copytree(original.parent, tmp_path / component)
        lowered = tmp_path / component / original.name
        for dialect in (CUDA_DIALECT, *DIALECTS.values()):
            lowered.write_bytes(lower(original, dialect))
            onnx.checker.check_model(str(lowered), full_check=True)
            for outputs, wanted in zip(run(lowered, *ends), expected, strict=True):
                for (name, spec), actual, right in zip(specs.outputs.items(), outputs, wanted, strict=True):
                    largest, rms = differences(actual, right)
                    assert np.abs(right).max() > 0, (component, name)
                    assert largest <= TOLERANCES[spec.dtype][0], (component, name, dialect)
                    assert rms <= TOLERANCES[spec.dtype][1], (component, name, dialect)


def test_the_weights_stay_where_they_are(sd15_bundle: Path) -> None:
    """Gigabytes are neither read nor copied: the lowered graph is small and points to the same file."""
    bundle = Bundle.load(sd15_bundle)
    component = bundle.manifest.components["unet"]
    content = lower(bundle.path(component.onnx), CUDA_DIALECT)
    weights = bundle.path(component.files[1])
    assert len(content) < weights.stat().st_size / 2
    external = [tensor for tensor in onnx.load_from_string(content).graph.initializer if tensor.external_data]
    assert {entry.value for tensor in external for entry in tensor.external_data if entry.key == "location"} == {
        weights.name
    }


def write_dequantized(path: Path, weight: np.ndarray, scale: np.ndarray, axis: int = 0) -> Path:
    """A graph whose output is a matrix of 8-bit weights, dequantized."""
    dtype = helper.np_dtype_to_tensor_dtype(scale.dtype)
    node = helper.make_node("DequantizeLinear", ["weight_int8", "weight_scale"], ["weight"], axis=axis)
    output = helper.make_tensor_value_info("weight", dtype, weight.shape)
    tensors = {"weight_int8": weight, "weight_scale": scale}
    initializers = [onnx.numpy_helper.from_array(array, name) for name, array in tensors.items()]
    graph = helper.make_graph([node], "g", [], [output], initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), path)
    return path


@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([np.float16, np.float32]),
)
def test_weights_of_8_bits_are_the_same_products_in_an_older_opset(
    rows: int, columns: int, seed: int, dtype: type, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """To the bit: a product of the type that is computed in is rounded once."""
    generator = np.random.default_rng(seed)
    weight = generator.integers(-127, 128, (rows, columns), dtype=np.int8)
    scale = (2.0 ** generator.uniform(-14, 2, rows)).astype(dtype)
    path = write_dequantized(tmp_path_factory.getbasetemp() / "dequantized.onnx", weight, scale)
    ((expected,),) = run(path, {})
    path.write_bytes(lower(path, Dialect(opset=18)))
    onnx.checker.check_model(str(path), full_check=True)
    assert "DequantizeLinear" not in {node.op_type for node in onnx.load(path).graph.node}
    ((product,),) = run(path, {})
    assert np.array_equal(product, expected)


def test_other_scales_than_a_rows_are_not_rewritten(tmp_path: Path) -> None:
    path = write_dequantized(tmp_path / "model.onnx", np.ones((2, 3), np.int8), np.ones(3, np.float16), axis=1)
    with pytest.raises(EngineError, match="DequantizeLinear is of a matrix and its rows' scales alone"):
        lower(path, Dialect(opset=18))


def write_node(folder: Path, operator: str, **attributes: Any) -> Path:
    """A file with one node of opset 23."""
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 4]) for name in ("x", "y")]
    node = helper.make_node(operator, ["x"], ["y"], **attributes)
    graph = helper.make_graph([node], "g", tensors[:1], tensors[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), folder / "model.onnx")
    return folder / "model.onnx"


def test_an_attribute_that_is_newer_is_left_out_if_it_is_the_default(tmp_path: Path) -> None:
    """``saturate`` of Cast is of opset 19: opset 18 has none, and does what 1 means."""
    path = write_node(tmp_path, "Cast", to=TensorProto.FLOAT, saturate=1)
    (node,) = onnx.load_from_string(lower(path, Dialect(opset=18))).graph.node
    assert [attribute.name for attribute in node.attribute] == ["to"]


@pytest.mark.parametrize(
    ("operator", "attributes", "told"),
    [
        ("Gelu", {}, "Gelu does not exist in opset 18"),
        ("Pad", {"mode": "wrap"}, "Pad of opset 23 cannot be written in opset 18"),
        ("Cast", {"to": TensorProto.FLOAT, "saturate": 0}, "Cast of opset 23 cannot be written in opset 18"),
    ],
)
def test_what_cannot_be_said_in_the_older_opset_is_rejected(
    operator: str, attributes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    """Rather an error than a graph that computes something else."""
    with pytest.raises(EngineError, match=told):
        lower(write_node(tmp_path, operator, **attributes), Dialect(opset=18))


def test_operators_called_unchanged_have_only_gained_types_and_attributes() -> None:
    """ONNX's own schemas: the same inputs and outputs since then as in opset 23, and no attribute lost."""
    for operator, since in UNCHANGED_SINCE.items():
        old, new = (onnx.defs.get_schema(operator, opset) for opset in (since, 23))
        assert old.since_version < new.since_version, f"{operator} need not be named"
        for ports in ("inputs", "outputs"):
            assert [port.name for port in getattr(old, ports)] == [port.name for port in getattr(new, ports)]
        assert set(old.attributes) <= set(new.attributes)
