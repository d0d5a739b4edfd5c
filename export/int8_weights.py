"""Weights of linear layers in 8 bits: whole numbers from -127 to 127, and a scale for each output channel."""

from __future__ import annotations

import torch
from torch import nn

INT8, SCALE = "weight_int8", "weight_scale"  # buffers of a layer whose weights are rounded
LARGEST = 127  # without -128 the numbers are symmetric: no zero point


def round_linear_weights(model: nn.Module) -> None:
    """Round the weights of a model's linear layers to 8 bits, in place.

    Each layer's weight [out, in] becomes ``weight_int8 * weight_scale``, so that torch computes what the graph will;
    the buffers ``weight_int8`` int8 [out, in] and ``weight_scale`` [out], of the weight's type, have the factors. The
    scale is that of the channel's largest weight (symmetric, round to nearest: Jacob et al. 2018, section 3; per
    channel: Krishnamoorthi 2018, section 3.1).
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            weight = layer.weight.detach()
            scale = (weight.float().abs().amax(dim=1) / LARGEST).to(weight.dtype)
            scale[scale == 0] = 1  # of a channel without weights, or with such as vanish in this type
            rounded = (weight.float() / scale.float()[:, None]).round().clamp(-LARGEST, LARGEST).to(torch.int8)
            layer.register_buffer(INT8, rounded)
            layer.register_buffer(SCALE, scale)
            layer.weight.data = rounded.to(weight.dtype) * scale[:, None]
