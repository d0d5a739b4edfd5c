"""Manifests in JSON that are made by hand, for tests that need no bundle's files."""

from __future__ import annotations

import copy
from typing import Any

HASH = "0123456789abcdef" * 4
BASE: dict[str, Any] = {
    "schema_version": 5,
    "checkpoint": "Hyper-SD15-1step-lora",
    "family": "sd15",
    "precision": "fp32",
    "opset": 23,
    "sampler": {
        "kind": "tcd",
        "num_inference_steps": 1,
        "allowed_steps": [1, 2, 4],
        "timesteps": None,
        "eta": 1.0,
        "guidance_scale": 0.0,
    },
    "scheduler": {},
    "vae": {"scaling_factor": 0.18215},
    "force_zeros_for_empty_prompt": False,
    "components": {},
    "files": {},
    "origin": {"base": "a/b", "weights": {}},
    "versions": {},
}


def shapes(batch: tuple[int, int, int], height: tuple[int, int, int], width: tuple[int, int, int]) -> dict[str, Any]:
    """Ranges as (min, opt, max)."""
    ranges = {"batch": batch, "height": height, "width": width}
    return {
        name: {"name": name, "min": least, "opt": usual, "max": most} for name, (least, usual, most) in ranges.items()
    }


def small_manifest(shapes: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A manifest of SD1.5 with these fields; those of the sampler are merged."""
    manifest = copy.deepcopy({**BASE, "shapes": shapes, **fields})
    manifest["sampler"] = {**BASE["sampler"], **fields.get("sampler", {})}
    return manifest
