"""Comparison of arrays: the tolerances and their limits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from hypersd.engines.compare import TOLERANCES, differences
from hypersd.engines.onnx_runtime import make_plain_session

SIDE = 1024  # pixels of SDXL's images; a group of its decoder's last norm has four channels


def test_a_large_group_norm_is_the_same(tmp_path: Path) -> None:
    """ONNX Runtime adds up four million values one by one: that must not stop an export of SDXL in float32."""
    x = torch.randn(1, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 3 + 5
    weight, bias = torch.ones(4), torch.zeros(4)
    node = helper.make_node("GroupNormalization", ["x", "weight", "bias"], ["y"], num_groups=1, epsilon=1e-6)
    shapes = {"x": list(x.shape), "weight": [4], "bias": [4]}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, list(x.shape))]
    graph = helper.make_graph([node], "norm", inputs, outputs)
    path = tmp_path / "norm.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), path)
    expected = torch.nn.functional.group_norm(x, 1, weight, bias, 1e-6).numpy()
    feeds = {"x": x.numpy(), "weight": weight.numpy(), "bias": bias.numpy()}
    largest, rms = differences(np.asarray(make_plain_session(path).run(None, feeds)[0]), expected)
    assert rms > 1e-5, "it has become exact: the tolerance may be tightened"
    assert largest <= TOLERANCES["float32"][0]
    assert rms <= TOLERANCES["float32"][1]


def test_a_float32_network_that_computes_in_half_is_another() -> None:
    """A cast to float16 on the way is a mistake of the exporter; the tolerance has to see it."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((256, 256)).astype(np.float32) for _ in range(2))
    rounded = (a.astype(np.float16) @ b.astype(np.float16)).astype(np.float32)
    assert differences(rounded, a @ b)[1] > TOLERANCES["float32"][1]
