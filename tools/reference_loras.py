"""LoRAs that diffusers fuses into its own pipeline, for comparison with a bundle."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from ..weights.lora_file import LoraFile


def fuse_lora(pipe: Any, lora: LoraFile) -> None:
    """Fuse a LoRA into a pipeline's UNet and text encoders, in the type that their weights have.

    diffusers reads the file itself. What it would read wrongly or not at all (layers that it does not find, alphas that
    it mixes up, kohya's DoRA) it gets in its own layout. Kinds that it does not have (LoHa, LoKr) are added by the
    exporter's arithmetic, which the tests compare with LyCORIS.
    """
    if not _load_file(pipe, lora):
        pipe.unload_lora_weights()
        if (tensors := _in_diffusers_layout(pipe, lora)) is None:
            _add(pipe, lora)
            return
        pipe.load_lora_weights(tensors)
    pipe.fuse_lora(lora_scale=lora.strength)
    pipe.unload_lora_weights()


def _load_file(pipe: Any, lora: LoraFile) -> bool:
    """Whether diffusers reads from the file every layer, with its scale."""
    path = lora.file.path
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it leaves out, which is checked below
            pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    except Exception:  # it has no class of errors for files that it does not understand
        return False
    return all(_has_layers(getattr(pipe, component), layers) for component, layers in lora.layers.items())


def _has_layers(module: Any, layers: dict[str, Any]) -> bool:
    """Whether the tuned layers of a component are these, with these scales."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    tuned = {path.removeprefix("text_model."): m for path, m in module.named_modules() if isinstance(m, BaseTunerLayer)}
    if tuned.keys() != layers.keys():
        return False
    scales = {path: next(iter(tuner.scaling.values()), math.nan) for path, tuner in tuned.items()}  # pyright: ignore
    doras = {path: any(getattr(tuner, "use_dora", {}).values()) for path, tuner in tuned.items()}
    return all(
        math.isclose(scales[path], layer.scale(), rel_tol=1e-6) and doras[path] == layer.is_dora
        for path, layer in layers.items()
    )


def _in_diffusers_layout(pipe: Any, lora: LoraFile) -> dict[str, Tensor] | None:
    """The LoRA with diffusers' names, scales multiplied in; None if it is of another kind."""
    tensors: dict[str, Tensor] = {}
    for component, layers in lora.layers.items():
        for path, layer in layers.items():
            if (factors := layer.factors()) is None:
                return None
            down, up, scale = factors
            found, weight = _module(getattr(pipe, component), path)
            shape = weight.shape
            tensors[f"{component}.{found}.lora_A.weight"] = down.reshape(-1, *shape[1:])
            tensors[f"{component}.{found}.lora_B.weight"] = (up * scale).reshape(shape[0], -1, *[1] * (len(shape) - 2))
    return tensors


def _add(pipe: Any, lora: LoraFile) -> None:
    for component, layers in lora.layers.items():
        for path, layer in layers.items():
            _, weight = _module(getattr(pipe, component), path)
            with torch.no_grad():
                weight.copy_(layer.fuse(weight, lora.strength))


def _module(model: Any, path: str) -> tuple[str, Tensor]:
    """A layer's path in this version of transformers, and its weight."""
    names = dict(model.named_modules())
    found = path if path in names else f"text_model.{path}"
    return found, names[found].weight
