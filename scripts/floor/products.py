"""Matrix products of the libraries that run networks on a processor; which is the fastest depends on the processor."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import numpy as np
import torch
from onnx import TensorProto, helper, numpy_helper

Product = Callable[[], object]  # computes it once


def cpu_products(dtype: torch.dtype) -> dict[str, Callable[[int], Product]]:
    """By library, for those that are installed and multiply in ``dtype``: makes a product of square matrices of a side.

    Libraries for inference have the right-hand matrix beforehand, as they have a network's weights.
    """
    found: dict[str, Callable[[int], Product]] = {"torch": lambda side: torch_product(side, dtype, torch.device("cpu"))}
    if dtype == torch.float32 and _is_installed("onnxruntime"):
        found["ONNX Runtime"] = _onnxruntime_product
    if dtype in (torch.float32, torch.bfloat16) and _is_installed("openvino"):
        found["OpenVINO"] = lambda side: _openvino_product(side, dtype)
    return found


def torch_product(side: int, dtype: torch.dtype, device: torch.device) -> Product:
    """Torch's product, on any device."""
    a, b = (torch.rand(side, side, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def _is_installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def _random(side: int) -> np.ndarray:
    return np.random.default_rng(0).random((side, side), np.float32)


def _onnxruntime_product(side: int) -> Product:
    """In float32."""
    import onnxruntime as ort

    value = helper.make_tensor_value_info
    ends = [value(name, TensorProto.FLOAT, [side, side]) for name in "ac"]
    node, weights = helper.make_node("MatMul", ["a", "b"], ["c"]), numpy_helper.from_array(_random(side), "b")
    graph = helper.make_graph([node], "product", ends[:1], ends[1:], [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    a = _random(side)
    return lambda: session.run(None, {"a": a})


def _openvino_product(side: int, dtype: torch.dtype) -> Product:
    """In float32 or bfloat16, within its type."""
    import openvino as ov

    kind = {torch.float32: ov.Type.f32, torch.bfloat16: ov.Type.bf16}[dtype]
    ops = ov.opset13
    a = ops.parameter([side, side], kind)
    model = ov.Model([ops.matmul(a, ops.constant(_random(side), kind), False, False)], [a], "product")
    config = {"INFERENCE_PRECISION_HINT": kind, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    request = ov.Core().compile_model(model, "CPU", config).create_infer_request()
    left = ops.constant(_random(side), kind)  # it owns the memory of its view
    request.get_input_tensor().copy_from(left.get_tensor_view())
    return request.infer
