"""Inputs and outputs of a bundle's Triton model, and its ``config.pbtxt`` (protobuf text format)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence

from ..engines import Manifest

PROMPT = "prompt"
NEGATIVE_PROMPT = "negative_prompt"
SEED = "seed"
CONTROL_IMAGE = "control_image"
IMAGE = "image"  # the init image in a request, the finished one in a response
MASK_IMAGE = "mask_image"
ADAPTERS = "adapters"  # JSON
KEEP_STEPS = "keep_steps"
#: inputs of one number, by the pipeline's arguments
NUMBERS = {
    "steps": "num_inference_steps",
    "eta": "eta",
    "guidance_scale": "guidance_scale",
    "width": "width",
    "height": "height",
}
CONTROL_NUMBERS = {
    "control_scale": "controlnet_conditioning_scale",
    "control_start": "control_guidance_start",
    "control_end": "control_guidance_end",
}
IMAGE_NUMBERS = {
    "strength": "strength",
    KEEP_STEPS: "keep_steps",
    "padding_mask_crop": "padding_mask_crop",
    "mask_blur": "mask_blur",
}
WHOLE = ("steps", "width", "height", "padding_mask_crop", "mask_blur")
QUEUE = 64  # requests that may wait, as in `hypersd serve`
TIMEOUT = 60_000_000  # microseconds that a request may wait

# Requests are batched while the model is busy; without a delay none waits for others when it is idle.
SCHEDULING = f"""\
dynamic_batching {{
  default_queue_policy {{
    max_queue_size: {QUEUE}
    default_timeout_microseconds: {TIMEOUT}
    timeout_action: REJECT
    allow_timeout_override: true
  }}
}}

# One instance on each GPU, or one on the CPU where there is none.
instance_group [ {{ count: 1, kind: KIND_AUTO }} ]
"""


def config_text(name: str, manifest: Manifest, parameters: Mapping[str, str]) -> str:
    """The configuration of a bundle's model.

    Args:
        name: the model's name, which is its folder's.
        manifest: the bundle's.
        parameters: parameters of the Python model.
    """
    parts = [
        "# Written by `hypersd export --triton`.\n"
        f"name: {_quoted(name)}\n"
        'backend: "python"\n'
        f"max_batch_size: {manifest.shapes.batch.max}\n",
        _tensors("input", input_configs(manifest)),
        _tensors("output", output_configs()),
        SCHEDULING,
        "# Paths are relative to this file's folder, or absolute.\n" + _parameters(parameters),
    ]
    return "\n".join(parts)


def _tensors(field: str, configs: Sequence[TensorConfig]) -> str:
    return f"{field} [\n" + ",\n".join(map(_tensor, configs)) + "\n]\n"


def _tensor(config: TensorConfig) -> str:
    dims = ", ".join(map(str, config.dims))
    optional = ", optional: true" if config.optional else ""
    return f"  {{ name: {_quoted(config.name)}, data_type: {config.data_type}, dims: [ {dims} ]{optional} }}"


def _parameters(parameters: Mapping[str, str]) -> str:
    lines = [
        f"  {{ key: {_quoted(key)}, value: {{ string_value: {_quoted(value)} }} }}" for key, value in parameters.items()
    ]
    return "parameters [\n" + ",\n".join(lines) + "\n]\n"


def _quoted(text: str) -> str:
    """A string of the text format; for names and paths JSON's escapes are the same."""
    return json.dumps(text, ensure_ascii=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorConfig:
    """An input or output as a model configuration describes it.

    Attributes:
        data_type: ``"TYPE_INT64"`` and so on; ``TYPE_STRING`` are bytes.
        dims: -1 for an extent that varies.
        optional: requests may leave it out; the bundle's own setting is used.
    """

    name: str
    data_type: str
    dims: tuple[int, ...] = (1,)
    optional: bool = False


def input_configs(manifest: Manifest) -> list[TensorConfig]:
    """Inputs of a request, one row per image.

    Images are PNG, JPEG or WebP files, empty for none; of control images there is one for each ControlNet in the
    bundle's order. They are strings, not UINT8: only requests of equal shapes are batched, and files have unequal
    lengths.
    """
    numbers = dict(NUMBERS)
    if manifest.controlnets:
        numbers |= CONTROL_NUMBERS
    if manifest.has_encoder:
        numbers |= IMAGE_NUMBERS
    configs = [
        TensorConfig(name=PROMPT, data_type="TYPE_STRING"),
        TensorConfig(name=NEGATIVE_PROMPT, data_type="TYPE_STRING", optional=True),
        TensorConfig(name=SEED, data_type="TYPE_INT64", optional=True),
        *(TensorConfig(name=name, data_type=_number_type(name), optional=True) for name in numbers),
    ]
    if manifest.controlnets:
        dims = (len(manifest.controlnets),)
        configs.append(TensorConfig(name=CONTROL_IMAGE, data_type="TYPE_STRING", dims=dims, optional=True))
    if manifest.has_encoder:
        configs += [TensorConfig(name=name, data_type="TYPE_STRING", optional=True) for name in (IMAGE, MASK_IMAGE)]
    if manifest.lora_slot:
        configs.append(TensorConfig(name=ADAPTERS, data_type="TYPE_STRING", optional=True))
    return configs


def _number_type(name: str) -> str:
    return "TYPE_BOOL" if name == KEEP_STEPS else "TYPE_INT32" if name in WHOLE else "TYPE_FP32"


def output_configs() -> list[TensorConfig]:
    """Outputs of a response: pixels uint8 [H, W, 3], and their seed."""
    return [
        TensorConfig(name=IMAGE, data_type="TYPE_UINT8", dims=(-1, -1, 3)),
        TensorConfig(name=SEED, data_type="TYPE_INT64"),
    ]
