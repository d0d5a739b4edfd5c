"""Attention without a fused kernel.

An ``IAttention`` is one kernel or a failed build, unless it is marked decomposable. Which head sizes, types and masks
have a kernel depends on version and GPU and is not documented: a trial build of the attention alone takes milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import TensorRTApi

PROBED_EXTENT = 64  # of a dimension that varies: kernels differ by head size, type and mask, not by length
PROBED_HEADS = 2  # instead of one, which TensorRT folds away in a network of its own and then finds no kernel for


def attentions_without_kernel(api: TensorRTApi, builder: Any, network: Any, make_config: Callable[[], Any]) -> set[str]:
    """The names of a network's attentions that TensorRT cannot build as one kernel.

    Args:
        api: TensorRT or TensorRT-RTX.
        builder: TensorRT's builder of the network.
        network: the parsed network.
        make_config: a new configuration for the GPUs in question.
    """
    has_kernel: dict[Any, bool] = {}
    missing = set()
    for attention in api.attentions(network):
        signature = _signature(attention)
        if signature not in has_kernel:
            has_kernel[signature] = _builds(api, builder, signature, make_config())
        if not has_kernel[signature]:
            missing.add(attention.name)
    return missing


def mark_decomposable(api: TensorRTApi, network: Any, names: set[str]) -> list[str]:
    """Let TensorRT build the named attentions from plain layers; returns their names in the network's order."""
    marked = [attention for attention in api.attentions(network) if attention.name in names]
    for attention in marked:
        attention.decomposable = True
    return [attention.name for attention in marked]


def _signature(attention: Any) -> tuple[Any, ...]:
    """The values that decide the kernel: shapes and types of all inputs, normalization, causality."""
    tensors = [attention.get_input(i) for i in range(3)]
    mask = attention.mask
    return (
        *(_described(tensor) for tensor in tensors),
        None if mask is None else _described(mask, is_mask=True),
        attention.norm_op,
        attention.causal,
    )


def _described(tensor: Any, is_mask: bool = False) -> tuple[tuple[int, ...], Any]:
    batch, heads, *rest = (PROBED_EXTENT if extent < 0 else extent for extent in tensor.shape)
    if not is_mask and batch * heads == 1:
        heads = PROBED_HEADS
    return (batch, heads, *rest), tensor.dtype


def _builds(api: TensorRTApi, builder: Any, signature: tuple[Any, ...], config: Any) -> bool:
    *tensors, mask, norm_op, causal = signature
    network = api.create_network(builder)
    inputs = [network.add_input(f"input_{i}", dtype, shape) for i, (shape, dtype) in enumerate(tensors)]
    attention = network.add_attention(*inputs, norm_op, causal)
    if mask is not None:
        attention.mask = network.add_input("mask", mask[1], mask[0])
    network.mark_output(attention.get_output(0))
    return builder.build_serialized_network(network, config) is not None
