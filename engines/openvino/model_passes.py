"""Rewrites of an OpenVINO model before it is compiled: the same function, in another form."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from .library import load_library

if TYPE_CHECKING:
    import openvino as ov

PERIODIC = ("Sin", "Cos")
ANGLES = "hypersd_angles_"  # begins the names of inputs that are added to a model
DECOMPRESSION = "decompression_0"  # marks a Convert that OpenVINO runs layer by layer, not on all constants first


def widen(model: ov.Model) -> None:
    """Let a float16 graph compute in float32, from its float16 constants, with inputs and outputs as they are.

    OpenVINO would copy all constants of such a graph to float32 first. Converted by nodes that are marked as
    decompression they stay in the mapping of the file, until each layer packs its own.
    """
    ops = load_library().opset13
    half, full = load_library().Type.f16, load_library().Type.f32
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if kind in ("Constant", "Parameter") and node.get_output_element_type(0) == half:
            readers = node.output(0).get_target_inputs()
            wide = ops.convert(node, full)
            if kind == "Constant":
                wide.get_rt_info()[DECOMPRESSION] = ""
            for reader in readers:
                reader.replace_source_output(wide.output(0))
        elif kind == "Convert" and node.get_output_element_type(0) == half:
            node.set_attribute("destination_type", "f32")
        elif kind == "Result" and node.get_input_element_type(0) == half:
            _narrow(node.input(0))
    model.validate_nodes_and_infer_types()


def holds_float32(model: ov.Model) -> bool:
    """Whether most of a model's weights are float32."""
    constants = [node.output(0) for node in model.get_ordered_ops() if node.get_type_name() == "Constant"]
    sizes = [(port.get_element_type(), port.get_tensor().size) for port in constants]  # bytes
    full = load_library().Type.f32
    return 2 * sum(size for kind, size in sizes if kind == full) > sum(size for _, size in sizes)


def _narrow(result: ov.Input) -> None:
    """Convert what a Result reads to float16; the tensor's names go to the converted one."""
    source = result.get_source_output()
    names = source.get_names()
    narrow = load_library().opset13.convert(source, load_library().Type.f16)
    source.get_tensor().set_names(set())
    narrow.output(0).get_tensor().set_names(names)
    result.replace_source_output(narrow.output(0))


def expand_group_normalizations(model: ov.Model) -> None:
    """Write each GroupNormalization as means over pixels, which OpenVINO computes in the convolutions' NHWC layout.

    OpenVINO's own form reshapes to groups, for which each tensor is reordered to NCHW and back.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() == "GroupNormalization":
            expanded = _group_normalization(node)
            for reader in node.output(0).get_target_inputs():
                reader.replace_source_output(expanded.output(0))
    model.validate_nodes_and_infer_types()


def _group_normalization(node: ov.Node) -> ov.Node:
    """The same in elementary operations, as exact in bfloat16 as OpenVINO's own.

    A mean rounded to bfloat16 is off by up to a part in 512 of itself, which is much where a group's mean is many times
    its spread. So the rest of the mean is computed from the means of rows, which are small and whose own rounding
    averages out; and squares are summed around the rounded mean, where the rest is a small correction.
    """
    ops = load_library().opset13
    values, scale, bias = (node.input_value(i) for i in range(3))
    groups, epsilon = node.get_attributes()["num_groups"], np.float32(node.get_attributes()["epsilon"])
    shape = values.get_partial_shape()
    channels, pixels = shape[1].get_length(), range(2, len(shape))
    per_channel = [0, channels, *(1 for _ in pixels)]  # 0: the extent that it has

    def mean_of_rows(tensor: Any) -> Any:
        return ops.reduce_mean(tensor, list(pixels[1:]), keep_dims=True) if pixels[1:] else tensor

    def mean_of_group(tensor: Any) -> Any:
        """The mean over a group's channels and their pixels, one for each channel."""
        mean = ops.reduce_mean(ops.reshape(tensor, [0, groups, -1], special_zero=True), [2], keep_dims=True)
        of_channels = ops.broadcast(mean, [1, 1, channels // groups], broadcast_spec="BIDIRECTIONAL")
        return ops.reshape(of_channels, per_channel, special_zero=True)

    def of_channel(parameter: Any) -> Any:
        return ops.reshape(parameter, [1, *per_channel[1:]], special_zero=False)

    rows = mean_of_rows(values)
    mean = mean_of_group(rows)
    rest = mean_of_group(ops.subtract(rows, mean))
    centred = ops.subtract(values, mean)
    squares = mean_of_group(mean_of_rows(ops.multiply(centred, centred)))
    variance = ops.subtract(squares, ops.multiply(rest, rest))
    factor = ops.divide(of_channel(scale), ops.sqrt(ops.add(variance, epsilon)))
    offset = ops.subtract(of_channel(bias), ops.multiply(rest, factor))
    return ops.add(ops.multiply(centred, factor), offset)


def take_angles(model: ov.Model) -> ov.Model | None:
    """Split off the subgraph that computes the arguments of Sin and Cos, as a model of its own; None if there is none.

    A timestep of 999 rounded to bfloat16's 8 bits is 1000, and its angles are off by up to 2: the UNet would compute
    for another timestep. So the angles' model is compiled for float32, and the angles become inputs of the rest.
    """
    ov, sources, parameters = load_library(), _angles_in(model), []
    if not sources:
        return None
    for i, source in enumerate(sources):
        parameter = ov.opset13.parameter(source.get_partial_shape(), source.get_element_type())
        parameter.output(0).get_tensor().set_names({f"{ANGLES}{i}"})
        for reader in source.get_target_inputs():
            reader.replace_source_output(parameter.output(0))
        source.get_tensor().set_names({f"{ANGLES}{i}"})
        parameters.append(parameter)
    model.add_parameters(parameters)
    return ov.Model(sources, list(_parameters_above(sources)), "angles")


def _angles_in(model: ov.Model) -> list[ov.Output]:
    """The arguments of Sin and Cos that are computed from inputs, each once."""
    sources: dict[tuple[str, int], ov.Output] = {}
    for node in model.get_ordered_ops():
        if node.get_type_name() in PERIODIC:
            source = node.input_value(0)
            is_input = source.get_node().get_type_name() == "Parameter"
            if not is_input and any(_parameters_above([source])):
                sources[source.get_node().get_friendly_name(), source.get_index()] = source
    return list(sources.values())


def _parameters_above(outputs: Iterable[ov.Output]) -> Iterator[ov.Node]:
    """The model's inputs that these tensors depend on."""
    to_visit, seen = [output.get_node() for output in outputs], set()
    while to_visit:
        node = to_visit.pop()
        if node.get_friendly_name() not in seen:
            seen.add(node.get_friendly_name())
            to_visit += [value.get_node() for value in node.input_values()]
            if node.get_type_name() == "Parameter":
                yield node
