"""Sets of values that several rooms share. Imports nothing: the command line's parsers read it before any library."""

from __future__ import annotations

from typing import Literal, get_args

TensorRTBackend = Literal["tensorrt", "tensorrt-rtx"]
Backend = Literal["onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"]
ONNX_BACKENDS = ("onnxruntime", "openvino")  # run the ONNX files themselves: nothing has to be built
TENSORRT_BACKENDS: tuple[TensorRTBackend, ...] = get_args(TensorRTBackend)
BACKENDS: tuple[str, ...] = ("auto", *get_args(Backend))

DIMS = ("batch", "height", "width")  # of a bundle's images, which may vary
OPTIMIZATION_LEVELS = range(6)  # TensorRT's: quickest build to fastest engine
SHA256 = r"[0-9a-f]{64}"

Preprocess = Literal["canny", "scribble", "none"]  # of a control image
PREPROCESSES: tuple[Preprocess, ...] = get_args(Preprocess)
