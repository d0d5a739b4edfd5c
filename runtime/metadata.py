"""The settings of an image, as they are written into its file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from PIL.PngImagePlugin import PngInfo

from ..engines import Manifest
from .request import Request

METADATA_KEY = "hypersd"


def png_info(metadata: Mapping[str, Any]) -> PngInfo:
    """Settings as JSON in an iTXt chunk named ``hypersd``; no chunk if there are none."""
    info = PngInfo()
    if metadata:
        info.add_itxt(METADATA_KEY, json.dumps(metadata, ensure_ascii=False))
    return info


def image_metadata(manifest: Manifest, request: Request, seed: int) -> dict[str, Any]:
    """The settings that generate the image again, under the pipeline's argument names where it has them."""
    settings = {
        "prompt": request.prompts[0],
        "negative_prompt": request.negative_prompts[0] if request.negative_prompts else None,
        "num_inference_steps": request.num_inference_steps,
        "timesteps": request.timesteps,
        "eta": request.eta,
        "guidance_scale": request.guidance_scale,
        "height": request.height,
        "width": request.width,
        "seed": seed,
        "strength": None if request.starts_from == "noise" else request.strength,
        "keep_steps": request.keep_steps or None,
        **_control_numbers(request),
        "adapters": _adapters(request) or None,
        "checkpoint": manifest.checkpoint,
        "random_weights": manifest.random_weights or None,
        "base": manifest.origin.base,
        "vae": manifest.origin.vae,
        "lora_scale": manifest.origin.lora_scale,
        "added_loras": manifest.origin.described_loras or None,
        "precision": manifest.precision,
        "sampler": manifest.sampler.kind,
    }
    return {name: value for name, value in settings.items() if value is not None}


def _adapters(request: Request) -> dict[str, dict[str, Any]]:
    """The LoRAs by name: strength, file and its hash."""
    return {
        chosen.name: {
            "strength": chosen.strength,
            "file": chosen.adapter and chosen.adapter.path.name,
            "sha256": chosen.adapter and chosen.adapter.sha256,
        }
        for chosen in request.adapters
    }


def _control_numbers(request: Request) -> dict[str, dict[str, float]]:
    if not request.controls:
        return {}
    return {
        "controlnet_conditioning_scale": {control.name: control.conditioning_scale for control in request.controls},
        "control_guidance_start": {control.name: control.start for control in request.controls},
        "control_guidance_end": {control.name: control.end for control in request.controls},
    }
