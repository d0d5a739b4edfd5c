"""ONNX files: the contract of names, types and shapes, what the graphs are made of, and the checks of an export."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from make_tiny_repos import SD15_REPO, SDXL_REPO
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from hypersd.engines.bundle import Bundle
from hypersd.engines.precision import PRECISIONS
from hypersd.engines.specs import Range, TensorSpec
from hypersd.errors import ExportError
from hypersd.export.check import CHECK_SEED, Case, check_graph, check_outputs, reference_cases
from hypersd.export.components import TOKENS, ComponentModule, vae_decoder_component, vae_encoder_component
from hypersd.export.graph_weights import PREFIX
from hypersd.export.layout import DiffusersBase
from hypersd.export.models import load_vae
from hypersd.export.repositories import LocalFolder
from hypersd.export.shapes import ShapeOptions, image_shapes
from hypersd.export.trace import TRACE_SEED, _trace_extent, trace

BUNDLES = pytest.mark.parametrize("which", ["sd15_bundle", "sdxl_bundle", "sdxl_dynamic_bundle"])
FP32 = PRECISIONS["fp32"]
ONNX_TYPES = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.INT64: "int64"}
H, W = "latent_height", "latent_width"

# For each component: inputs, then outputs, as (name, dtype, shape) in order; a ranged dimension by its name.
Contract = dict[str, tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]]
SD15_CONTRACT: Contract = {
    "text_encoder": ([("input_ids", "int64", (1, 77))], [("hidden_states", "float32", (1, 77, 32))]),
    "unet": (
        [
            ("sample", "float32", (1, 4, 8, 8)),
            ("timestep", "float32", (1,)),
            ("encoder_hidden_states", "float32", (1, 77, 32)),
        ],
        [("out_sample", "float32", (1, 4, 8, 8))],
    ),
    "vae_encoder": ([("sample", "float32", (1, 3, 64, 64))], [("latent_parameters", "float32", (1, 8, 8, 8))]),
    "vae_decoder": ([("latent_sample", "float32", (1, 4, 8, 8))], [("sample", "float32", (1, 3, 64, 64))]),
}


def sdxl_contract(dtype: str, text: Any, rows: Any, batch: Any, h: Any, w: Any, height: Any, width: Any) -> Contract:
    return {
        "text_encoder": ([("input_ids", "int64", (text, 77))], [("hidden_states", dtype, (text, 77, 32))]),
        "text_encoder_2": (
            [("input_ids", "int64", (text, 77))],
            [("hidden_states", dtype, (text, 77, 32)), ("text_embeds", dtype, (text, 32))],
        ),
        "unet": (
            [
                ("sample", dtype, (rows, 4, h, w)),
                ("timestep", "float32", (1,)),
                ("encoder_hidden_states", dtype, (rows, 77, 64)),
                ("text_embeds", dtype, (rows, 32)),
                ("time_ids", dtype, (rows, 6)),
            ],
            [("out_sample", dtype, (rows, 4, h, w))],
        ),
        "vae_encoder": (
            [("sample", dtype, (batch, 3, height, width))],
            [("latent_parameters", dtype, (batch, 8, h, w))],
        ),
        "vae_decoder": ([("latent_sample", dtype, (batch, 4, h, w))], [("sample", dtype, (batch, 3, height, width))]),
    }


def controlled(contract: Contract, dtype: str, rows: Any, batch: Any, h: Any, w: Any) -> Contract:
    """The contract with a ControlNet, ``canny``: what it makes goes to inputs of the UNet's that are named alike."""
    half = (f"{h}_div2", f"{w}_div2")
    shapes = [(rows, 32, h, w), (rows, 32, h, w), (rows, 32, *half), (rows, 64, *half)]
    down = [("down_block_{}" + f"_{i}", dtype, shape) for i, shape in enumerate(shapes)]
    residuals = [*down, ("mid_block_{}", dtype, (rows, 64, *half))]

    def called(name: str) -> list[tuple[Any, ...]]:
        return [(key.format(name), *rest) for key, *rest in residuals]

    inputs, outputs = contract["unet"]
    embedding = ("cond_embedding", dtype, (rows, 32, h, w))
    image = ("controlnet_cond", dtype, (batch, 3, "height", "width"))
    return contract | {
        "controlnet_cond_embedding/canny": ([image], [("cond_embedding", dtype, (batch, 32, h, w))]),
        "controlnet/canny": (
            [*inputs, embedding, ("conditioning_scale", "float32", (1,))],
            called("res_sample"),
        ),
        "unet": ([*inputs, *called("additional_residual")], outputs),
    }


CONTRACTS = {
    "sd15_bundle": SD15_CONTRACT,
    "sdxl_bundle": sdxl_contract("float32", 1, 1, 1, 8, 8, 64, 64),
    "sdxl_dynamic_bundle": controlled(
        sdxl_contract("float16", "batch", "batch", "batch", H, W, "height", "width"), "float16", "batch", "batch", H, W
    ),
}
# Attention nodes of the text encoders: a layer each, but SDXL's first encoder is cut before its last layer.
TEXT_LAYERS = {"sd15_bundle": {"text_encoder": 3}, "sdxl_bundle": {"text_encoder": 2, "text_encoder_2": 3}}


@pytest.fixture
def bundle(which: str, request: pytest.FixtureRequest) -> Bundle:
    return Bundle.load(request.getfixturevalue(which))


def graphs(bundle: Bundle) -> dict[str, onnx.ModelProto]:
    return {
        name: onnx.load(str(bundle.path(component.onnx)), load_external_data=False)
        for name, component in bundle.manifest.components.items()
    }


def graph_end(value: onnx.ValueInfoProto) -> tuple[Any, ...]:
    tensor = value.type.tensor_type
    shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
    return value.name, ONNX_TYPES[tensor.elem_type], shape


def manifest_end(name: str, spec: TensorSpec) -> tuple[Any, ...]:
    return name, spec.dtype, tuple(dim.name if isinstance(dim, Range) else dim for dim in spec.shape)


# --- what an export writes -------------------------------------------------------------------------------------------


@BUNDLES
def test_contract_of_files_and_manifest(which: str, bundle: Bundle) -> None:
    """Names, order, types and shapes are DESIGN.md's, in the file as in the manifest; what varies has its name."""
    contract = CONTRACTS[which]
    assert bundle.manifest.components.keys() == contract.keys()
    for name, model in graphs(bundle).items():
        component = bundle.manifest.components[name]
        assert ([graph_end(v) for v in model.graph.input], [graph_end(v) for v in model.graph.output]) == contract[name]
        ends = [[manifest_end(*item) for item in specs.items()] for specs in (component.inputs, component.outputs)]
        assert tuple(ends) == contract[name]


def test_ranges_of_a_guided_bundle(sdxl_dynamic_bundle: Path) -> None:
    """Sizes are the images' by 8; the UNet's batch holds each image twice and says so; the others hold it once."""
    components = Bundle.load(sdxl_dynamic_bundle).manifest.components
    unet, vae = components["unet"].inputs["sample"].shape, components["vae_decoder"]
    latents = (Range(name=H, min=8, opt=8, max=13), Range(name=W, min=8, opt=8, max=12))
    assert unet == (Range(name="batch", min=1, opt=2, max=4), 4, *latents)
    batch = Range(name="batch", min=1, opt=1, max=2)
    assert vae.inputs["latent_sample"].shape == (batch, 4, *latents)
    assert vae.outputs["sample"].shape[2:] == (
        Range(name="height", min=64, opt=64, max=104), Range(name="width", min=64, opt=64, max=96),
    )  # fmt: skip
    assert components["text_encoder"].inputs["input_ids"].shape[0] == batch
    rows = {name: {spec.rows_per_image for spec in part.outputs.values()} for name, part in components.items()}
    assert {name for name, counts in rows.items() if counts == {2}} == {"unet", "controlnet/canny"}
    assert {name for name, counts in rows.items() if counts != {2}} == {name for name, c in rows.items() if c == {1}}


@BUNDLES
def test_opset(which: str, bundle: Bundle) -> None:
    """Opset 23 of ONNX's own operators and nothing of anyone else's: every engine takes it."""
    for model in graphs(bundle).values():
        assert [(o.domain, o.version) for o in model.opset_import if o.domain == ""] == [("", 23)]
        assert {node.domain for node in model.graph.node} == {""}
        assert not model.functions
    assert bundle.manifest.opset == 23


@pytest.mark.parametrize("which", ["sd15_tiny_vae_bundle", "sdxl_bundle"])
def test_torchs_own_optimization_finds_nothing_more(which: str, bundle: Bundle) -> None:
    """The rules that an export leaves out match nothing: fixed and ranged sizes, a LoRA slot, both kinds of VAE."""
    for name, graph in graphs(bundle).items():
        model = ir.from_proto(graph)
        for weight, value in model.graph.initializers.items():
            if weight.startswith(PREFIX):  # an export optimizes before it has seen a weight
                value.const_value = None
        nodes = [(node.op_type, len(node.inputs)) for node in model.graph]
        torch.onnx.ONNXProgram(model, None).optimize()
        assert [(node.op_type, len(node.inputs)) for node in model.graph] == nodes, name


@pytest.mark.parametrize("which", TEXT_LAYERS)
def test_attention_and_group_norm_stay_whole(which: str, bundle: Bundle, tiny_repos: Path) -> None:
    """One node for each attention and group norm of the module, and none of the nodes that they fall apart into."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.models.attention_processor import Attention

    base = tiny_repos / {"sd15": SD15_REPO, "sdxl": SDXL_REPO}[bundle.manifest.family]
    modules = {
        "unet": UNet2DConditionModel.from_pretrained(base / "unet"),
        "vae_encoder": AutoencoderKL.from_pretrained(base / "vae").encoder,
        "vae_decoder": AutoencoderKL.from_pretrained(base / "vae").decoder,
    }
    expected = {name: (layers, 0) for name, layers in TEXT_LAYERS[which].items()}
    for name, module in modules.items():
        kinds = [type(m) for m in module.modules()]
        expected[name] = (sum(issubclass(k, Attention) for k in kinds), kinds.count(nn.GroupNorm))
        assert min(expected[name]) > 0
    for name, model in graphs(bundle).items():
        found = Counter(node.op_type for node in model.graph.node)
        assert (found["Attention"], found["GroupNormalization"]) == expected[name]
        assert not found.keys() & {"Softmax", "InstanceNormalization", "ReduceMean", "ReduceVar", "Erf", "If", "Loop"}


def test_dynamic_half_precision_stays_whole(sdxl_dynamic_bundle: Path, sdxl_bundle: Path) -> None:
    """fp16 and ranges change nothing about that."""
    dynamic, fixed = (graphs(Bundle.load(path)) for path in (sdxl_dynamic_bundle, sdxl_bundle))
    for name, model in fixed.items():
        wanted, found = (Counter(n.op_type for n in m.graph.node) for m in (model, dynamic[name]))
        for kind in ("Attention", "GroupNormalization", "LayerNormalization", "Conv", "Softmax"):
            assert found[kind] == wanted[kind], (name, kind)


@BUNDLES
def test_files_tell_nothing_of_this_machine(which: str, bundle: Bundle, tiny_repos: Path) -> None:
    """No stack traces, source files or local paths: neither in the graphs nor in the weights' files."""
    for name in bundle.manifest.files:
        content = bundle.path(name).read_bytes()
        for word in (b"site-packages", b"stack_trace", b"Traceback", b'.py"', b'File "', str(tiny_repos).encode()):
            assert word not in content, (name, word)
        assert not re.search(rb"/(home|root|work|tmp|usr|Users)/", content), name
    for model in graphs(bundle).values():
        assert not any(node.doc_string or node.metadata_props for node in model.graph.node)


@BUNDLES
def test_weights_are_external(which: str, bundle: Bundle) -> None:
    """Weights lie beside the graph in one file that the manifest lists; the graph holds small ones and constants."""
    for name, model in graphs(bundle).items():
        component = bundle.manifest.components[name]
        assert component.files == (f"{name}/model.onnx", f"{name}/model.onnx_data")
        external = [t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL]
        assert len(external) >= (1 if "embedding" in name else 10), "an image's embedding is tiny"
        assert {e.value for t in external for e in t.external_data if e.key == "location"} == {"model.onnx_data"}
        inline = [t for t in model.graph.initializer if t.data_location != TensorProto.EXTERNAL]
        assert all(len(t.raw_data) <= 1024 for t in inline if t.name.startswith(PREFIX))
        assert all(len(t.raw_data) <= TOKENS**2 for t in inline), "the largest is a text encoder's mask"
        constants = [a.t for n in model.graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "value"]
        assert all(len(t.raw_data) <= 1024 for t in constants)


def test_half_precision_graph_has_no_wider_weights(sdxl_dynamic_bundle: Path, sdxl_bundle: Path) -> None:
    """Every weight of the fp16 bundle is float16: float32 is left to a few numbers, such as the time frequencies."""
    bundle = Bundle.load(sdxl_dynamic_bundle)
    for name, model in graphs(bundle).items():
        kinds = Counter()
        for tensor in model.graph.initializer:
            kinds[tensor.data_type] += int(np.prod(tensor.dims, dtype=int))
            assert not (tensor.name.endswith((".weight", ".bias")) and tensor.data_type != TensorProto.FLOAT16)
        assert kinds[TensorProto.DOUBLE] == 0
        assert kinds[TensorProto.FLOAT] < 200, (name, kinds)
        assert kinds[TensorProto.FLOAT16] > 1000
    sizes = [sum(r.size for n, r in Bundle.load(p).manifest.files.items()
                 if n.endswith("_data") and "controlnet" not in n)
             for p in (sdxl_dynamic_bundle, sdxl_bundle)]  # fmt: skip
    assert sizes[0] < 0.55 * sizes[1]


# --- the components of a base ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_sdxls_own_vae_stays_float32_in_a_half_precision_bundle(half: str, tiny_repos: Path, tmp_path: Path) -> None:
    """A VAE whose configuration says force_upcast is loaded, traced and described in float32 (it overflows in fp16)."""
    from hypersd.export.checkpoints import find_checkpoint
    from hypersd.export.component_exports import component_exports
    from hypersd.export.manifest_parts import source_records
    from hypersd.export.sources import SourceOptions, find_sources

    entry = find_checkpoint("Hyper-SDXL-1step-lora")
    base = str(tiny_repos / SDXL_REPO)
    options = SourceOptions(
        base=base, vae=base, checkpoint_file=str(tiny_repos / "ByteDance/Hyper-SD" / entry.filename)
    )
    sources = find_sources(entry, options, "fp16")
    exports = component_exports(entry, sources, source_records(sources), image_shapes(ShapeOptions(), 64), "fp16")
    export = next(export for export in exports if export.name == f"vae_{half}")
    component = export.load()
    assert export.precision == FP32
    assert {p.dtype for p in component.module.parameters()} == {torch.float32}
    assert {spec.dtype for spec in (*component.inputs.values(), *component.outputs.values())} == {"float32"}
    cases = reference_cases(component)
    files = trace(component, tmp_path / "model.onnx")
    check_graph(files[0], 4)
    assert check_outputs(files[0], cases, FP32) < 1e-4
    types = {t.data_type for t in onnx.load(str(files[0]), load_external_data=False).graph.initializer}
    assert TensorProto.FLOAT16 not in types


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tiny_decoder(dtype: torch.dtype, tiny_repos: Path, tmp_path: Path) -> None:
    """TAESD is traced like any VAE, over ranges, and equals torch."""
    part = DiffusersBase(LocalFolder(tiny_repos / "madebyollin/taesd")).part_in("", "vae")
    shapes = image_shapes(ShapeOptions(dynamic={"height": (64, 64, 96), "batch": (1, 1, 3)}), 64)
    component = vae_decoder_component(load_vae(part, dtype), shapes, 8)
    cases = reference_cases(component)
    files = trace(component, tmp_path / "model.onnx")
    check_graph(files[0], dtype.itemsize)
    check_outputs(files[0], cases, FP32 if dtype == torch.float32 else PRECISIONS["fp16"])
    assert [tuple(case.expected[0].shape) for case in cases] == [(1, 3, 64, 64), (3, 3, 64, 64), (1, 3, 96, 64)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tiny_encoder(dtype: torch.dtype, tiny_repos: Path, tmp_path: Path) -> None:
    """TAESD's encoder gives latents, as many channels as the decoder takes."""
    part = DiffusersBase(LocalFolder(tiny_repos / "madebyollin/taesd")).part_in("", "vae")
    shapes = image_shapes(ShapeOptions(dynamic={"width": (64, 64, 96), "batch": (1, 1, 3)}), 64)
    component = vae_encoder_component(load_vae(part, dtype, "encoder"), shapes, 8, is_tiny=True)
    cases = reference_cases(component)
    files = trace(component, tmp_path / "model.onnx")
    check_graph(files[0], dtype.itemsize)
    check_outputs(files[0], cases, FP32 if dtype == torch.float32 else PRECISIONS["fp16"])
    assert [tuple(case.expected[0].shape) for case in cases] == [(1, 4, 8, 8), (3, 4, 8, 8), (1, 4, 8, 12)]


# --- a small component, to see the checks fail -----------------------------------------------------------------------

WIDTH = 96


class Small(nn.Module):
    """A layer on an image's pixels: like attention in a UNet it flattens height and width, and takes them apart."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, sample: Tensor) -> Tensor:
        batch, channels, height, width = sample.shape
        flat = sample.permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        return self.layer(flat).reshape(batch, height, width, channels).permute(0, 3, 1, 2)


def small_component(*dims: int | Range, dtype: str = "float32") -> ComponentModule:
    batch, height, width = dims
    spec = TensorSpec(dtype=dtype, shape=(batch, WIDTH, height, width))  # type: ignore[arg-type]
    module = Small().eval().requires_grad_(False).to(getattr(torch, dtype))
    return ComponentModule(module, {"sample": spec}, {"out_sample": spec})


def span(name: str, low: int, high: int) -> Range:
    return Range(name=name, min=low, opt=low, max=high)


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> tuple[ComponentModule, Path]:
    """A small component of fixed shape and its ONNX file. Copy the folder before changing anything in it."""
    component = small_component(1, 5, 4)
    path = tmp_path_factory.mktemp("small") / "model.onnx"
    assert trace(component, path) == [path, path.with_name("model.onnx_data")]
    return component, path


@pytest.fixture
def copied(traced: tuple[ComponentModule, Path], tmp_path: Path) -> tuple[list[Case], Path]:
    """The small component's cases, and a copy of its file."""
    component, path = traced
    shutil.copytree(path.parent, tmp_path / "copy")
    return reference_cases(component), tmp_path / "copy" / path.name


def test_an_honest_file_passes(copied: tuple[list[Case], Path]) -> None:
    """The tests below would prove nothing if the checks rejected everything."""
    cases, path = copied
    check_graph(path, 4)
    assert check_outputs(path, cases, FP32) < 1e-5


def test_a_changed_weight_is_found(copied: tuple[list[Case], Path]) -> None:
    """One weight of 9216 off by its own size: the outputs differ, and the file, output and error are said."""
    cases, path = copied
    weights = np.fromfile(path.with_name("model.onnx_data"), np.float32)
    weights[1000] += 0.1
    weights.tofile(path.with_name("model.onnx_data"))
    with pytest.raises(ExportError, match=r"model\.onnx: out_sample .* differs from torch by") as error:
        check_outputs(path, cases, FP32)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_outputs_that_are_not_finite(value: float, copied: tuple[list[Case], Path]) -> None:
    """NaN and infinity fail, with the hint that fits."""
    cases, path = copied
    weights = np.fromfile(path.with_name("model.onnx_data"), np.float32)
    weights[7] = value
    weights.tofile(path.with_name("model.onnx_data"))
    with pytest.raises(ExportError, match="not finite: try --precision fp32"):
        check_outputs(path, cases, FP32)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_reference_that_is_not_finite(value: float, dtype: torch.dtype, copied: tuple[list[Case], Path]) -> None:
    """If torch overflows and ONNX Runtime does not, nothing was compared: this must not pass for equality."""
    (case,), path = copied
    expected = case.expected[0].clone().to(dtype)
    expected[0, 0, 0, 0] = value
    with pytest.raises(ExportError, match="finite"):
        check_outputs(path, [Case(case.extents, case.inputs, [expected])], FP32)


def test_an_output_of_another_shape(copied: tuple[list[Case], Path]) -> None:
    """Shapes are compared, not broadcast."""
    (case,), path = copied
    with pytest.raises(ExportError, match=r"has the shape \(1, 96, 5, 4\), torch gave \(1, 96, 5, 1\)"):
        check_outputs(path, [Case(case.extents, case.inputs, [case.expected[0][..., :1]])], FP32)


def test_outputs_in_another_order(copied: tuple[list[Case], Path]) -> None:
    """A file whose output is another one than the module's is found out, though shape and size agree."""
    (case,), path = copied
    with pytest.raises(ExportError, match="differs from torch"):
        check_outputs(path, [Case(case.extents, case.inputs, [case.expected[0].flip(1)])], FP32)


def test_a_size_that_the_file_does_not_take(copied: tuple[list[Case], Path]) -> None:
    """ONNX Runtime's refusal becomes one line that says at which extents."""
    _, path = copied
    case = reference_cases(small_component(1, span(H, 7, 9), 4))[0]
    with pytest.raises(ExportError, match=r"does not run at .*latent_height") as error:
        check_outputs(path, [case], FP32)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["gone", "short"])
def test_damaged_external_data(damage: str, copied: tuple[list[Case], Path]) -> None:
    """Weights that are not there: one line from either check, no crash."""
    cases, path = copied
    data = path.with_name("model.onnx_data")
    if damage == "gone":
        data.unlink()
    else:
        data.write_bytes(data.read_bytes()[:1000])

    def check() -> None:
        check_graph(path, 4)
        check_outputs(path, cases, FP32)

    with pytest.raises(ExportError) as error:
        check()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"garbage", b"<html>", None])
def test_a_file_that_is_no_onnx(content: bytes | None, copied: tuple[list[Case], Path]) -> None:
    """Empty, something else, cut in half: both checks say so in one line."""
    cases, path = copied
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content is None else content)
    for check in (lambda: check_graph(path, 4), lambda: check_outputs(path, cases, FP32)):
        with pytest.raises(ExportError) as error:
            check()
        assert "\n" not in str(error.value)


# --- how the checks are run ------------------------------------------------------------------------------------------


def test_cases_are_both_ends_of_every_range() -> None:
    """All dimensions at their smallest, then each at its largest; one case if nothing varies."""
    ranged = reference_cases(small_component(span("batch", 1, 3), span(H, 2, 5), 4))
    usual = {name: extent.opt for name, extent in small_component(span("batch", 1, 3), span(H, 2, 5), 4).ranges.items()}
    assert [case.extents for case in ranged] == [{"batch": 1, H: 2}, {**usual, "batch": 3}, {**usual, H: 5}]
    shapes = [(1, WIDTH, 2, 4), (3, WIDTH, usual[H], 4), (usual["batch"], WIDTH, 5, 4)]
    assert [tuple(case.inputs["sample"].shape) for case in ranged] == shapes
    assert [tuple(case.expected[0].shape) for case in ranged] == shapes
    assert len(reference_cases(small_component(1, 5, 4))) == 1


def test_cases_are_not_the_traced_inputs() -> None:
    """A constant that tracing folded in by mistake would agree with the traced inputs: others are compared."""
    component = small_component(1, 5, 4)
    (traced_input,) = component.random_inputs({}, TRACE_SEED)
    case = reference_cases(component)[0]
    assert CHECK_SEED != TRACE_SEED
    assert not torch.isclose(case.inputs["sample"], traced_input).any()
    ranged = reference_cases(small_component(span("batch", 1, 2), 5, 4))
    assert not torch.equal(ranged[0].inputs["sample"][0], ranged[1].inputs["sample"][0])


def test_a_frozen_input_is_found(tmp_path: Path) -> None:
    """A component that remembers its traced input in place of reading it does not pass."""

    class Frozen(nn.Module):
        def forward(self, sample: Tensor) -> Tensor:
            return sample * 0 + self.kept if torch.compiler.is_compiling() else sample * 2

    component = small_component(1, 5, 4)
    module = Frozen()
    module.register_buffer("kept", component.random_inputs({}, TRACE_SEED)[0] * 2)
    component = ComponentModule(module.eval(), component.inputs, component.outputs)
    cases = reference_cases(component)
    files = trace(component, tmp_path / "model.onnx")
    check_graph(files[0], 4)
    with pytest.raises(ExportError, match="differs from torch"):
        check_outputs(files[0], cases, FP32)


@pytest.mark.parametrize(
    ("height", "width"), [((4, 5), (4, 5)), ((4, 9), (4, 9)), ((4, 6), (5, 6))], ids=["narrow", "wide", "even-top"]
)
def test_height_and_width_stay_apart(height: tuple[int, int], width: tuple[int, int], tmp_path: Path) -> None:
    """Two ranges over the same sizes are two dimensions: every corner runs, also the ones that are not square."""
    component = small_component(1, span(H, *height), span(W, *width))
    files = trace(component, tmp_path / "model.onnx")
    check_graph(files[0], 4)
    check_outputs(files[0], reference_cases(component), FP32)
    session = ort.InferenceSession(str(files[0]), providers=["CPUExecutionProvider"])
    for h in range(height[0], height[1] + 1):
        for w in range(width[0], width[1] + 1):
            (sample,) = component.random_inputs({H: h, W: w}, 5)
            (output,) = session.run(None, {"sample": sample.numpy()})
            torch.testing.assert_close(torch.from_numpy(output), component.module(sample), rtol=1e-4, atol=1e-5)


@given(st.integers(1, 512), st.integers(1, 512), st.integers(0, 3))
def test_traced_extents_lie_in_the_range(low: int, more: int, index: int) -> None:
    """Tracing never happens at a size that the component was not asked for."""
    extent = span("x", low, low + more)
    assert extent.min <= _trace_extent(extent, index) <= extent.max


# --- graphs that the exporter must not let out -----------------------------------------------------------------------


def write(
    path: Path, nodes: list[onnx.NodeProto], inputs: dict[str, int], output: tuple[str, int], *weights: np.ndarray
) -> Path:
    """A graph over [1, 4] tensors, with ``weights`` under the names w0, w1, ..."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, kind, [1, 4]) for name, kind in inputs.items()],
        [helper.make_tensor_value_info(output[0], output[1], ["rows", "columns"])],
        [numpy_helper.from_array(weight, f"w{i}") for i, weight in enumerate(weights)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), str(path))
    return path


HALF, SINGLE, DOUBLE = TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.DOUBLE


@pytest.mark.parametrize("kind", [HALF, SINGLE])
def test_a_graph_of_one_type_passes(kind: int, tmp_path: Path) -> None:
    """The same graphs as below, types agreeing, are let through."""
    concat = helper.make_node("Concat", ["a", "b"], ["c"], axis=1)
    check_graph(write(tmp_path / "g.onnx", [concat], {"a": kind, "b": kind}, ("c", kind)), 2 if kind == HALF else 4)
    add = [helper.make_node("Sigmoid", ["x"], ["b"]), helper.make_node("Add", ["a", "b"], ["c"])]
    check_graph(write(tmp_path / "g.onnx", add, {"a": kind, "x": kind}, ("c", kind)), 2 if kind == HALF else 4)


@pytest.mark.parametrize(
    "node",
    [
        helper.make_node("Concat", ["a", "b"], ["c"], axis=1),
        helper.make_node("Add", ["a", "b"], ["c"]),
        helper.make_node("Mul", ["a", "b"], ["c"]),
        helper.make_node("Where", ["mask", "a", "b"], ["c"]),
    ],
    ids=lambda node: node.op_type,
)
@pytest.mark.parametrize("through", [[], ["Sigmoid"]], ids=["at-once", "after-a-node"])
def test_a_node_of_mixed_types_is_refused(node: onnx.NodeProto, through: list[str], tmp_path: Path) -> None:
    """float16 beside float32 in one node: TensorRT takes none such, so it must not leave the exporter."""
    before = [helper.make_node(kind, ["x"], ["b"]) for kind in through]
    inputs = {"mask": TensorProto.BOOL, "a": HALF, ("x" if through else "b"): SINGLE}
    path = write(tmp_path / "g.onnx", [*before, node], inputs, ("c", HALF))
    with pytest.raises(ExportError, match="not valid ONNX") as error:
        check_graph(path, 2)
    assert "\n" not in str(error.value)


def test_a_wide_weight_in_a_half_precision_graph(tmp_path: Path) -> None:
    """A float32 weight behind a Cast is valid ONNX and twice the size: named and refused; small ones may stay."""
    nodes = [
        helper.make_node("Cast", ["w0"], ["narrow"], to=HALF),
        helper.make_node("MatMul", ["a", "narrow"], ["c"]),
    ]
    for columns, refused in ((2000, True), (4, False)):
        path = write(tmp_path / f"{columns}.onnx", nodes, {"a": HALF}, ("c", HALF), np.ones((4, columns), np.float32))
        check_graph(path, 4)
        if refused:
            with pytest.raises(ExportError, match=r"stayed float32 in a float16 graph: w0"):
                check_graph(path, 2)
        else:
            check_graph(path, 2)


@pytest.mark.parametrize("weight_bytes", [2, 4])
def test_a_float64_weight_is_refused(weight_bytes: int, tmp_path: Path) -> None:
    """No weight is wider than the graph's precision, float64 included."""
    kind = {2: HALF, 4: SINGLE}[weight_bytes]
    nodes = [
        helper.make_node("Cast", ["w0"], ["narrow"], to=kind),
        helper.make_node("MatMul", ["a", "narrow"], ["c"]),
    ]
    path = write(tmp_path / "g.onnx", nodes, {"a": kind}, ("c", kind), np.ones((4, 2000)))
    with pytest.raises(ExportError, match="w0"):
        check_graph(path, weight_bytes)


INVALID: dict[str, Callable[[Path], Path]] = {
    "unknown operator": lambda path: write(path, [helper.make_node("Frob", ["a"], ["c"])], {"a": HALF}, ("c", HALF)),
    "input from nowhere": lambda path: write(
        path, [helper.make_node("Add", ["a", "z"], ["c"])], {"a": HALF}, ("c", HALF)
    ),
    "wrong output type": lambda path: write(
        path, [helper.make_node("Sigmoid", ["a"], ["c"])], {"a": HALF}, ("c", SINGLE)
    ),
}


@pytest.mark.parametrize("what", INVALID)
def test_an_invalid_graph_is_refused(what: str, tmp_path: Path) -> None:
    """ONNX's own checker and its type inference are run, and their findings are one line."""
    with pytest.raises(ExportError, match="not valid ONNX") as error:
        check_graph(INVALID[what](tmp_path / "g.onnx"), 2)
    assert "\n" not in str(error.value)
