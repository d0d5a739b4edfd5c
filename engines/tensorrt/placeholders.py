"""Weight placeholders: TensorRT-RTX builds a plan without weights on a machine without a GPU.

Given the weights, it leaves them out with a GPU only: it compiles kernels for their later transformation. Given
placeholders, a type and a number of values, it needs neither the GPU nor the weights ("Reducing Build-Time Memory Usage
with Weight Placeholders" in the documentation of TensorRT-RTX 1.7). The ONNX parser makes none. So it parses the graph
with its weights as mapped files, and each layer whose weights lie at an address of these files is replaced.
"""

from __future__ import annotations

import ctypes
import mmap
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import BundleError, EngineError
from ..lowering import read_graph

if TYPE_CHECKING:
    from .api import TensorRTApi

DTYPES = {"float16": "HALF", "float32": "FLOAT"}  # numpy's to TensorRT's name
CONVOLUTION = ("stride_nd", "dilation_nd", "num_groups", "pre_padding", "post_padding", "padding_mode")


class MappedWeights:
    """The weights of an ONNX graph in files beside it, mapped: pages are read where a library reads them.

    It must outlive all that was made from it.

    Args:
        onnx: the ONNX file.

    Attributes:
        graph: its serialized graph.
        names: the names of the weights by their address and their size in bytes.

    Raises:
        BundleError: a file cannot be read, or is shorter than the graph says.
    """

    def __init__(self, onnx: Path) -> None:
        from onnx import TensorProto

        model = read_graph(onnx)
        self.graph: bytes = model.SerializeToString()
        self.names: dict[tuple[int, int], str] = {}
        self._files: dict[str, mmap.mmap] = {}
        for weight in model.graph.initializer:
            if weight.data_location == TensorProto.EXTERNAL:
                where = {entry.key: entry.value for entry in weight.external_data}
                offset, size = int(where.get("offset", 0)), int(where["length"])
                address, length = self._map(onnx.parent / where["location"])
                if offset + size > length:
                    raise BundleError(f"{onnx.parent / where['location']} ends inside {weight.name}: export it again")
                self.names[address + offset, size] = weight.name

    def _map(self, path: Path) -> tuple[int, int]:
        """A file's address and length."""
        if str(path) not in self._files:
            try:
                with path.open("rb") as file:  # a private copy, which nobody writes to: ctypes takes no read-only one
                    self._files[str(path)] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except (OSError, ValueError) as error:  # ValueError: an empty file
                raise BundleError(f"{path} cannot be read ({error}): export it again") from error
        content = self._files[str(path)]
        return ctypes.addressof(ctypes.c_char.from_buffer(content)), len(content)


def parse_mapped(parser: Any, onnx: Path, weights: MappedWeights) -> bool:
    """Parse an ONNX file whose layers then point into ``weights``; False on failure, with reasons in the parser."""
    return (
        parser.load_model_proto(weights.graph, str(onnx))
        and all(parser.load_initializer(name, *place) for place, name in weights.names.items())
        and parser.parse_model_proto()
    )


def replace_weights(api: TensorRTApi, network: Any, weights: MappedWeights) -> int:
    """Put placeholders in the place of a parsed network's weights.

    Weights stay that the parser converted, that several layers share, that are scales of a quantization, or whose layer
    is the network's output. TensorRT drops the layers that were replaced.

    Args:
        api: TensorRT-RTX.
        network: made by :func:`parse_mapped`.
        weights: those that it points into.

    Returns:
        The number of placeholders, each under the name of its weights in the ONNX file.

    Raises:
        EngineError: TensorRT rejects one, without which the plan could not be refitted.
    """
    layers = list(_typed_layers(api, network))
    readers = defaultdict(list)
    for layer in layers:
        for i in range(layer.num_inputs):
            if (tensor := layer.get_input(i)) is not None:
                readers[tensor.name].append((layer, i))
    found = [_named_weights(api, layer, weights) for layer in layers]
    uses = Counter(name for names in found for name in names.values())
    outputs = {network.get_output(i).name for i in range(network.num_outputs)}
    quantizations = (api.trt.LayerType.QUANTIZE, api.trt.LayerType.DEQUANTIZE)
    count = 0
    for layer, candidates in zip(layers, found, strict=True):
        names = {part: name for part, name in candidates.items() if uses[name] == 1}
        output = layer.get_output(0).name
        if not names or output in outputs or names.keys() == {"bias"}:
            continue
        if any(reader.type in quantizations for reader, _ in readers[output]):
            continue
        new = _with_placeholders(api, network, layer, names)
        for part, name in names.items():
            old = getattr(layer, part)
            unused = api.trt.Weights(_dtype(api, old), old.ctypes.data, old.size)
            if not (
                network.set_weights_name(unused, f"unused {name}")
                and network.set_weights_name(getattr(new, part), name)
            ):
                raise EngineError(f"{api} takes no placeholder for {name}: build with the weights in the plan")
            count += 1
        for reader, i in readers[output]:
            reader.set_input(i, new.get_output(0))
    return count


def _typed_layers(api: TensorRTApi, network: Any) -> Iterator[Any]:
    """The layers; constants and convolutions with their own class, where the binding hands out the base class."""
    kinds = {
        api.trt.LayerType.CONSTANT: api.trt.IConstantLayer,
        api.trt.LayerType.CONVOLUTION: api.trt.IConvolutionLayer,
    }
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        layer.__class__ = kinds.get(layer.type, layer.__class__)
        yield layer


def _named_weights(api: TensorRTApi, layer: Any, weights: MappedWeights) -> dict[str, str]:
    """The names of a layer's weights by attribute."""
    parts = {api.trt.LayerType.CONSTANT: ("weights",), api.trt.LayerType.CONVOLUTION: ("kernel", "bias")}
    arrays = {part: getattr(layer, part) for part in parts.get(layer.type, ())}
    return {
        part: weights.names[place]
        for part, array in arrays.items()
        if isinstance(array, np.ndarray) and array.dtype.name in DTYPES
        if (place := (array.ctypes.data, array.nbytes)) in weights.names
    }


def _with_placeholders(api: TensorRTApi, network: Any, layer: Any, names: dict[str, str]) -> Any:
    """A copy of a layer: TensorRT takes placeholders where a layer is made, and not where its weights are set."""

    def choose(part: str) -> Any:
        old = getattr(layer, part)
        return api.trt.Weights(_dtype(api, old), 0, old.size) if part in names else old

    if "weights" in names:
        new = network.add_constant(layer.shape, choose("weights"))
    else:
        new = network.add_convolution_nd(
            layer.get_input(0), layer.num_output_maps, layer.kernel_size_nd, choose("kernel"), choose("bias")
        )
        for attribute in CONVOLUTION:
            setattr(new, attribute, getattr(layer, attribute))
    new.name = f"{layer.name} (without weights)"
    return new


def _dtype(api: TensorRTApi, array: np.ndarray) -> Any:
    return getattr(api.trt.DataType, DTYPES[array.dtype.name])
