"""Weights of the UNet's linear layers in 8 bits: rounding, graph, images, and the libraries that read them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hypersd import Pipeline
from hypersd.engines import Bundle
from hypersd.engines.compare import peak_signal_to_noise
from hypersd.engines.load import choose
from hypersd.export.graph_weights import read_graph
from hypersd.export.int8_weights import INT8, SCALE, round_linear_weights

PROMPT = "a red circle on a blue background"


def linear(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    layer.weight.data = weight
    return layer


@given(
    seed=st.integers(0, 1000),
    exponents=st.lists(st.integers(-30, 14), min_size=1, max_size=6),
    columns=st.integers(1, 40),
    dtype=st.sampled_from([torch.float16, torch.float32]),
)
def test_no_weight_moves_by_more_than_half_a_step(
    seed: int, exponents: list[int], columns: int, dtype: torch.dtype
) -> None:
    """Channels of any size, those that vanish among them; the graph's product is the layer's weight to the bit."""
    noise = torch.randn(len(exponents), columns, generator=torch.Generator().manual_seed(seed))
    before = (noise * torch.tensor([2.0**e for e in exponents])[:, None]).clamp(-6e4, 6e4).to(dtype)
    layer = linear(before.clone())
    round_linear_weights(layer)
    rounded, scale = getattr(layer, INT8), getattr(layer, SCALE)
    assert rounded.dtype == torch.int8
    assert rounded.abs().max() <= 127
    assert torch.equal(rounded.to(dtype) * scale[:, None], layer.weight)
    step = before.float().abs().amax(dim=1, keepdim=True) / 127
    smallest = torch.finfo(dtype).smallest_normal  # below it a scale has fewer bits
    error = (layer.weight.float() - before.float()).abs()
    is_normal = step > smallest
    assert (error <= step * (0.5 + 127 * 2**-10))[is_normal.expand_as(error)].all()
    assert (error <= before.float().abs() + 128 * smallest).all()


def test_a_layer_without_weights_stays_without() -> None:
    layer = linear(torch.zeros(3, 4, dtype=torch.float16))
    round_linear_weights(layer)
    assert not layer.weight.any()


def test_only_the_unets_linear_layers_are_stored_in_8_bits(demo_int8_bundle: Path) -> None:
    """Each weight is dequantized from a byte; the other components are those of an fp16 bundle."""
    bundle = Bundle.load(demo_int8_bundle)
    graphs = {
        name: onnx.load(str(bundle.path(component.onnx)), load_external_data=False).graph
        for name, component in bundle.manifest.components.items()
    }
    unet = graphs.pop("unet")
    for name, graph in graphs.items():
        kinds = {tensor.data_type for tensor in graph.initializer}
        assert (onnx.TensorProto.FLOAT16 in kinds, onnx.TensorProto.INT8 in kinds) == (True, False), name
    in_bytes = {tensor.name for tensor in unet.initializer if tensor.data_type == onnx.TensorProto.INT8}
    assert in_bytes == {node.input[0] for node in unet.node if node.op_type == "DequantizeLinear"}
    assert not [t for t in unet.initializer if t.data_type == onnx.TensorProto.FLOAT16 and len(t.dims) == 2]


def test_images_are_nearly_those_of_float32(demo_int8_bundle: Path, demo_bundle: Path) -> None:
    """On both libraries for CPUs; the score of the demonstration stays (benchmarks/README.md)."""
    theirs = pixels(demo_bundle, "onnxruntime")
    for backend in ("onnxruntime", "openvino"):
        assert 33 < peak_signal_to_noise(pixels(demo_int8_bundle, backend) - theirs) < 80, backend


def pixels(bundle: Path, backend: str) -> np.ndarray:
    image = Pipeline.load(bundle, backend=backend, device="cpu")(PROMPT, seed=3).images[0]
    return np.asarray(image, np.float32) / 255


def test_int8_is_half_precision_to_the_choice_of_a_backend(demo_int8_bundle: Path) -> None:
    assert choose(Bundle.load(demo_int8_bundle), "auto", "cpu").backend == "openvino"


def test_a_graph_goes_to_rounded_weights_only(demo_int8_bundle: Path) -> None:
    """A module without weights in 8 bits must not take the graph that reads them."""
    bundle = Bundle.load(demo_int8_bundle)
    content = bundle.path(bundle.manifest.components["unet"].onnx).read_bytes()
    assert read_graph(content, linear(torch.zeros(2, 2))) is None


def test_tensorrt_rtx_parses_it(demo_int8_bundle: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    bundle = Bundle.load(demo_int8_bundle)
    builder = trt.Builder(logger := trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(bundle.path(bundle.manifest.components["unet"].onnx))), parser.get_error(0).desc()
