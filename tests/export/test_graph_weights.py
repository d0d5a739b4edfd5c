"""Graphs without weights: the same for all weights, and complete again with any module's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from hypersd.engines.bundle import Bundle
from hypersd.engines.progress import Silent
from hypersd.export import ExportOptions, export_bundle
from hypersd.export.checkpoints import find_checkpoint
from hypersd.export.component_exports import ComponentExport, component_exports
from hypersd.export.graph_weights import hide_weights, read_graph, write_graph
from hypersd.export.manifest_parts import source_records
from hypersd.export.models import check_sources
from hypersd.export.sources import SourceOptions, find_sources
from hypersd.export.trace import trace, trace_graph

TWO = "Hyper-SD15-2steps-lora"
Sources = Callable[..., SourceOptions]


def exports_of(bundle: Bundle, given: SourceOptions) -> Iterator[ComponentExport]:
    """The bundle's components as its own export would make them."""
    manifest = bundle.manifest
    checkpoint = find_checkpoint(manifest.checkpoint)
    sources = find_sources(checkpoint, given, manifest.precision)
    loras = check_sources(sources, checkpoint.family).loras
    records = source_records(sources)
    exports = component_exports(checkpoint, sources, records, manifest.shapes, manifest.precision, loras)
    assert {e.name: (e.key, e.graph) for e in exports} == {n: (c.key, c.graph) for n, c in manifest.components.items()}
    yield from exports


def assert_same_files(one: Path, other: Path) -> None:
    for name in ("model.onnx", "model.onnx_data"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


# --- a traced graph --------------------------------------------------------------------------------------------------


def test_graphs_of_a_bundle_take_their_own_weights_back(
    sdxl_dynamic_bundle: Path, source_options: Sources, controlnet_sources: Any, tiny_repos: Path, tmp_path: Path
) -> None:
    """In every kind of component the weights are found by name, each once: the files come out as they were."""
    bundle = Bundle.load(sdxl_dynamic_bundle)
    name = bundle.manifest.checkpoint
    vae = str(tiny_repos / "madebyollin/sdxl-vae-fp16-fix")
    given = source_options(name, vae=vae, controlnets=controlnet_sources(name, "canny"))
    for export in exports_of(bundle, given):
        module, folder = export.load().module, tmp_path / export.name
        folder.mkdir(parents=True)
        graph = read_graph((bundle.root / export.name / "model.onnx").read_bytes(), module)
        assert graph is not None
        write_graph(graph, module, folder / "model.onnx")
        assert_same_files(folder, bundle.root / export.name)


def test_a_graph_follows_from_the_configuration_alone(
    sd15_bundle: Path, source_options: Sources, tmp_path: Path
) -> None:
    """Traced with nothing but zeros it is the same, though equal weights could be merged and factors of 0 folded."""
    bundle = Bundle.load(sd15_bundle)
    for export in exports_of(bundle, source_options(bundle.manifest.checkpoint)):
        component = export.load()
        weights = {name: weight.clone() for name, weight in component.module.named_parameters()}
        for weight in component.module.parameters():
            weight.zero_()
        graph = trace_graph(component)
        component.module.load_state_dict(weights, strict=False)
        folder = tmp_path / export.name
        folder.mkdir()
        write_graph(graph, component.module, folder / "model.onnx")
        assert_same_files(folder, bundle.root / export.name)


# --- a reused graph --------------------------------------------------------------------------------------------------


class Started(Silent):
    """Keeps the names of the stages."""

    def __init__(self) -> None:
        self.stages: list[str] = []

    def start(self, stage: str) -> None:
        self.stages.append(stage)


def test_another_checkpoint_takes_its_neighbours_graph(
    sd15_bundle: Path, source_options: Sources, copy_bundle: Callable[..., Bundle], tmp_path: Path
) -> None:
    """Its files are those of a trace, byte by byte; the progress names the neighbour."""
    copy_bundle(sd15_bundle, "first")
    started = Started()
    options = ExportOptions(sources=source_options(TWO), precision="fp32")
    bundle = export_bundle(TWO, tmp_path / "second", options, started)
    assert [stage for stage in started.stages if "trace" in stage or "graph" in stage] == [
        "unet: graph of first, new weights"
    ]
    *_, unet = exports_of(bundle, source_options(TWO))
    trace(unet.load(), tmp_path / "model.onnx")
    assert_same_files(tmp_path, bundle.root / "unet")


def test_controlnets_of_a_bundle_share_their_graphs(export_controlled: Callable[[str], Path]) -> None:
    """One trace serves all ControlNets of a kind, whatever they are called."""
    components = Bundle.load(export_controlled("Hyper-SD15-2steps-lora")).manifest.components
    for kind in ("controlnet", "controlnet_cond_embedding"):
        one, other = (components[f"{kind}/{name}"] for name in ("canny", "scribble"))
        assert one.graph == other.graph
        assert one.key != other.key
    assert len({component.graph for component in components.values()}) == len(components) - 2


# --- graphs that do not fit ------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """x * weight + bias."""

    def __init__(self, width: int = 300, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, dtype=dtype))
        self.register_buffer("bias", torch.ones(width, dtype=dtype))


def scaled_graph(width: int = 300, constant: onnx.TensorProto | None = None, weight: str = "module.weight") -> Any:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [width]) for name in ("x", "y")]
    nodes = [
        helper.make_node("Mul", ["x", weight], ["product"]),
        helper.make_node("Add", ["product", "module.bias"], ["sum"]),
        helper.make_node("Add", ["sum", "constant"], ["y"]),
    ]
    values = {name: numpy_helper.from_array(torch.zeros(width).numpy(), name) for name in (weight, "module.bias")}
    constant = constant or numpy_helper.from_array(torch.ones(1).numpy(), "constant")
    graph = helper.make_graph(nodes, "graph", ends[:1], ends[1:], [*values.values(), constant])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def test_parameters_and_buffers_are_set_and_constants_kept(tmp_path: Path) -> None:
    """Large ones are in the file beside the graph, which is left without weights; small ones in the graph."""
    module = Scaled()
    graph = read_graph(scaled_graph().SerializeToString(), module)
    assert graph is not None
    files = write_graph(graph, module, tmp_path / "model.onnx")
    assert [file.name for file in files] == ["model.onnx", "model.onnx_data"]
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(str(files[0])).graph.initializer}
    assert (stored["module.weight"] == module.weight.detach().numpy()).all()
    assert (stored["module.bias"] == 1).all()
    assert stored["constant"] == 1
    assert graph.graph.initializers["module.weight"].const_value is None
    small = Scaled(width=4)
    graph = read_graph(scaled_graph(width=4).SerializeToString(), small)
    assert graph is not None
    assert write_graph(graph, small, tmp_path / "small.onnx") == [tmp_path / "small.onnx"]


def test_parameters_are_hidden_and_buffers_are_not() -> None:
    """Buffers follow from the configuration, so that an optimizer may fold them."""
    model = ir.from_proto(scaled_graph())
    hide_weights(model, Scaled())
    values = {name: value.const_value is not None for name, value in model.graph.initializers.items()}
    assert values == {"module.weight": False, "module.bias": True, "constant": True}


@pytest.mark.parametrize("what", ["shape", "type", "name", "a constant elsewhere", "no ONNX"])
def test_a_graph_that_does_not_fit_is_not_taken(what: str) -> None:
    """Nothing is set by half: such a component is traced."""
    graph, module = scaled_graph(), Scaled()
    if what == "shape":
        module = Scaled(width=301)
    elif what == "type":
        module = Scaled(dtype=torch.float16)
    elif what == "name":
        graph = scaled_graph(weight="module.scale")
    elif what == "a constant elsewhere":
        constant = TensorProto(name="constant", data_type=TensorProto.FLOAT, dims=[300])
        constant.data_location = TensorProto.EXTERNAL
        constant.external_data.add(key="location", value="model.onnx_data")
        graph = scaled_graph(constant=constant)
    content = b"graph of unet" if what == "no ONNX" else graph.SerializeToString()
    assert read_graph(content, module) is None
