"""Graphs without Attention, for TensorRT before 10.14: ONNX Runtime says that they compute the same."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from hypersd.engines.bundle import Bundle
from hypersd.engines.compare import TOLERANCES, differences
from hypersd.engines.image_shapes import extents_of
from hypersd.engines.specs import TensorSpec
from hypersd.engines.tensorrt.attention import without_attention

COMPONENTS = ["text_encoder", "unet", "vae_decoder"]


def operators(model: onnx.ModelProto) -> set[str]:
    return {node.op_type for graph in (model.graph, *model.functions) for node in graph.node}


def random_input(spec: TensorSpec, end: int, generator: np.random.Generator) -> np.ndarray:
    shape = extents_of(spec)[end]
    if spec.dtype == "int64":
        return generator.integers(0, 64, shape)
    return generator.standard_normal(shape).astype(spec.dtype)


def run(path: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feeds)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("component", COMPONENTS)
def test_the_lowered_graph_computes_the_same(
    component: str, precision: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """No Attention is left, the graph is valid, and its outputs are the original's: with the causal mask of the text
    encoder, at both ends of the fp16 bundle's ranges, and with the weights where they were, beside the graph."""
    bundle = Bundle.load(request.getfixturevalue({"fp32": "sd15_bundle", "fp16": "sdxl_dynamic_bundle"}[precision]))
    specs = bundle.manifest.components[component]
    original = bundle.path(specs.onnx)
    shutil.copytree(original.parent, tmp_path, dirs_exist_ok=True)
    lowered = tmp_path / original.name
    lowered.write_bytes(without_attention(original))

    assert "Attention" in operators(onnx.load(original, load_external_data=False))
    assert "Attention" not in operators(onnx.load(lowered, load_external_data=False))
    onnx.checker.check_model(str(lowered), full_check=True)
    generator = np.random.default_rng(0)
    for end in (0, 2):
        feeds = {name: random_input(spec, end, generator) for name, spec in specs.inputs.items()}
        for (name, spec), actual, expected in zip(
            specs.outputs.items(), run(lowered, feeds), run(original, feeds), strict=True
        ):
            largest, rms = differences(actual, expected)
            assert np.abs(expected).max() > 0, name
            assert largest <= TOLERANCES[spec.dtype][0], name
            assert rms <= TOLERANCES[spec.dtype][1], name


def test_the_weights_stay_where_they_are(sd15_bundle: Path) -> None:
    """Gigabytes are neither read nor copied: the lowered graph is small and points to the same file."""
    bundle = Bundle.load(sd15_bundle)
    component = bundle.manifest.components["unet"]
    content = without_attention(bundle.path(component.onnx))
    weights = bundle.path(component.files[1])
    assert len(content) < weights.stat().st_size / 2
    external = [tensor for tensor in onnx.load_from_string(content).graph.initializer if tensor.external_data]
    assert {entry.value for tensor in external for entry in tensor.external_data if entry.key == "location"} == {
        weights.name
    }
