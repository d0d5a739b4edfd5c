"""A bundle in the layout of OpenVINO's exports, for the two tools that read it: OpenVINO GenAI and optimum-intel.

The layout is optimum's. :mod:`hypersd.tools.bench.openvino_models` converts the graphs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...engines import Bundle, Manifest
from ...samplers import make_sampler
from ...samplers.schedule import SchedulerConfig, alphas_cumprod
from .optimum_folder import write_optimum_folder


def write_openvino_folder(bundle: Bundle, folder: Path, for_genai: bool) -> None:
    """Write the layout into the empty ``folder``, with links to the graphs in place of OpenVINO's models."""
    write_optimum_folder(bundle, folder)
    _change(folder / "model_index.json", {"vae": ["diffusers", "AutoencoderKL"]})
    if for_genai:
        _change(folder / "scheduler/scheduler_config.json", _genai_scheduler(bundle.manifest))


def _genai_scheduler(manifest: Manifest) -> dict[str, Any]:
    """The changes to a bundle's schedule for GenAI, which has neither TCD nor custom timesteps.

    In one step DDIM is TCD, if it begins at the last timestep and ends at the first one's noise; LCM does not read
    these. The only timestep of one original step over t + 1 is t.
    """
    kind, timesteps = manifest.sampler.kind, manifest.sampler.timesteps
    changes: dict[str, Any] = {"_class_name": "LCMScheduler" if kind == "lcm" else "DDIMScheduler"}
    if kind == "tcd":
        changes |= {"timestep_spacing": "trailing", "set_alpha_to_one": False}
    if kind == "lcm" and timesteps is not None:
        changes |= {"original_inference_steps": 1, "num_train_timesteps": timesteps[0] + 1}
        changes |= {"trained_betas": _betas(make_sampler(kind, **manifest.scheduler).config)}
    return changes


def _betas(config: SchedulerConfig) -> list[float]:
    """The share of noise that every training timestep adds."""
    bars = alphas_cumprod(config)
    return (1 - torch.cat([bars[:1], bars[1:] / bars[:-1]])).tolist()


def _change(file: Path, values: Mapping[str, Any]) -> None:
    """Set fields of a JSON file."""
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, **values}, indent=2) + "\n", encoding="utf-8")
