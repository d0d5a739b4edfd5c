"""The judge of ``hypersd verify`` fuses LoRAs with diffusers, also those that diffusers cannot read by itself."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_writers import LAYOUTS, Random, kohya, layer_shapes, original_names, pairs, random_lora
from make_tiny_repos import SD15_REPO, SDXL_REPO
from safetensors.torch import save_file
from torch import Tensor

from hypersd.tools.reference_loras import fuse_lora
from hypersd.weights.lora_file import Fusion, LoraFile


@pytest.fixture(scope="module")
def pipes(tiny_repos: Path) -> dict[str, Any]:
    from diffusers import DiffusionPipeline

    return {repo: DiffusionPipeline.from_pretrained(str(tiny_repos / repo)) for repo in (SD15_REPO, SDXL_REPO)}


def mixed_alphas(lora: Random) -> dict[str, Tensor]:
    """Alphas that differ from layer to layer, which diffusers 0.42 mixes up."""
    return kohya({place: (*layer[:2], 1.0 + i % 5) for i, (place, layer) in enumerate(lora.items())})


def with_dora(lora: Random) -> dict[str, Tensor]:
    """kohya's DoRA, which diffusers takes for a LoRA."""
    tensors = kohya(lora)
    rows = {key.removesuffix(".lora_up.weight"): t.shape[0] for key, t in tensors.items() if "lora_up" in key}
    return tensors | {f"{key}.dora_scale": torch.full((rows[key], 1), 2.0) for key in rows}


def loha(lora: Random) -> dict[str, Tensor]:
    tensors = {}
    for (component, path), (down, up, _) in lora.items():
        if component == "unet":
            halves = {f"w{i}_{half}": t for i in (1, 2) for half, t in (("a", up.flatten(1)), ("b", down.flatten(1)))}
            tensors |= {f"lora_unet_{path.replace('.', '_')}.hada_{name}": t.clone() for name, t in halves.items()}
    return tensors


WRITERS = {name: write for name, (write, _, _) in LAYOUTS.items() if "attention" not in name} | {
    "original": lambda lora: kohya(lora, original_names(lora)),
    "peft": lambda lora: pairs(lora, ".lora_A.weight", ".lora_B.weight", lambda place: f"base_model.model.{place[1]}"),
    "mixed alphas": mixed_alphas,
    "dora": with_dora,
    "loha": loha,
}


@pytest.mark.parametrize(
    ("repo", "layout"), [*((SD15_REPO, layout) for layout in WRITERS), (SDXL_REPO, "mixed alphas"), (SDXL_REPO, "dora")]
)
def test_every_layout_is_fused_into_diffusers_pipeline(
    repo: str, layout: str, pipes: dict[str, Any], tmp_path: Path
) -> None:
    """The whole file, at its strength, in UNet and text encoders, as the exporter fuses it."""
    pipe = pipes[repo]
    shapes, judge = layer_shapes(pipe), copy.deepcopy(pipe)
    folder = "adapter_model" if layout == "peft" else "lora"
    path = tmp_path / f"{folder}.safetensors"
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 3, "r": 2}))
    save_file(WRITERS[layout](random_lora(shapes, 1.5)), path)
    lora = LoraFile.open(path, shapes, 0.75)
    fuse_lora(judge, lora)
    for component, layers in lora.layers.items():
        fusion, fused = Fusion(component, (lora,)), getattr(judge, component).state_dict()
        for key, weight in getattr(pipe, component).state_dict().items():
            torch.testing.assert_close(fused[key], fusion.fuse(key, weight), rtol=2e-6, atol=2e-6)
        changed = [key for key, weight in getattr(pipe, component).state_dict().items() if not weight.equal(fused[key])]
        assert len(changed) == len(layers)
