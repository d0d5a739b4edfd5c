"""The text of a model's ``config.pbtxt``, in protobuf's text format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from ..engines import Manifest
from .tensors import TensorConfig, input_configs, output_configs

QUEUE = 64  # requests that may wait, as `hypersd serve` has it
TIMEOUT = 60_000_000  # microseconds that one may wait

# Requests are batched while the model is busy; no delay is set, so that none waits for others when it is idle.
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
        name: the model's, which is that of its folder.
        manifest: the bundle's.
        parameters: what the Python model is told.
    """
    parts = [
        "# Written by `hypersd export --triton`.\n"
        f"name: {_quoted(name)}\n"
        'backend: "python"\n'
        f"max_batch_size: {manifest.shapes.batch.max}\n",
        _tensors("input", input_configs(manifest)),
        _tensors("output", output_configs()),
        SCHEDULING,
        "# The bundle's path is relative to this file's folder, or absolute.\n" + _parameters(parameters),
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
    """A string of the text format, whose escapes are those of JSON as far as names and paths need them."""
    return json.dumps(text, ensure_ascii=False)
