"""A bundle in the layout of optimum's exports: links to its graphs and tokenizers, and the missing configurations.

The graphs have optimum's names, inputs and outputs. Its pipelines also read the classes of the components, and a few
numbers of each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...engines import Bundle, Manifest
from ...engines.specs import TensorSpec
from ...families import find_family
from ...samplers import find_sampler

LONGEST_PROMPT = 77  # tokens
DIFFUSERS_VERSION = "0.30.0"  # of the layout: optimum requires one


def write_optimum_folder(bundle: Bundle, folder: Path) -> None:
    """Write the layout into the empty ``folder``. It consists of links: keep the bundle."""
    for name, component in bundle.manifest.components.items():
        (folder / name).mkdir(parents=True)
        for file in component.files:
            (folder / file).symlink_to(bundle.path(file).resolve())
    for name in _tokenizers(bundle.manifest):
        (folder / name).mkdir()
        source = bundle.path(f"{name}/tokenizer.json").resolve()
        (folder / name / "tokenizer.json").symlink_to(source)
        _write(folder / name / "tokenizer_config.json", _tokenizer_config(source))
    for file, config in _configs(bundle.manifest).items():
        (folder / file).parent.mkdir(exist_ok=True)
        _write(folder / file, config)


def _configs(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """The configuration files by name."""
    scheduler = find_sampler(manifest.sampler.kind).scheduler_class
    configs = {
        "model_index.json": _model_index(manifest, scheduler),
        "scheduler/scheduler_config.json": {"_class_name": scheduler, **manifest.scheduler},
        "unet/config.json": _unet_config(manifest),
        "vae_decoder/config.json": _vae_config(manifest),
    }
    for name in find_family(manifest.family).encoder_names:
        configs[f"{name}/config.json"] = _text_encoder_config(manifest.components[name].outputs)
    return configs


def _model_index(manifest: Manifest, scheduler: str) -> dict[str, Any]:
    """The classes of the pipeline's parts; optimum has its own for the components."""
    family = find_family(manifest.family)
    index: dict[str, Any] = {
        "_class_name": family.pipeline_class,
        "_diffusers_version": DIFFUSERS_VERSION,
        "scheduler": ["diffusers", scheduler],
        "feature_extractor": [None, None],
    }
    index |= {family.denoiser: ["diffusers", family.denoiser_class]}
    index |= {encoder.component: ["transformers", encoder.class_name] for encoder in family.text_encoders}
    index |= {name: ["transformers", "CLIPTokenizerFast"] for name in _tokenizers(manifest)}
    index |= {name: [None, None] for name in family.pipeline_parts}
    if family.has_zeroed_negatives:
        index["force_zeros_for_empty_prompt"] = manifest.force_zeros_for_empty_prompt
    return {**index, **family.pipeline_settings}


def _tokenizers(manifest: Manifest) -> list[str]:
    return [encoder.tokenizer for encoder in find_family(manifest.family).text_encoders]


def _tokenizer_config(tokenizer: Path) -> dict[str, Any]:
    """The padding of ``tokenizer.json``, in the file where transformers reads it."""
    padding = json.loads(tokenizer.read_text(encoding="utf-8"))["padding"]
    return {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": LONGEST_PROMPT,
        "pad_token": padding["pad_token"],
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    }


def _unet_config(manifest: Manifest) -> dict[str, Any]:
    """The fields of a UNet that the pipelines read."""
    return {
        "in_channels": manifest.vae.latent_channels,
        "out_channels": manifest.vae.latent_channels,
        "sample_size": manifest.shapes.height.opt // manifest.vae.spatial,
        "time_cond_proj_dim": None,
    }


def _vae_config(manifest: Manifest) -> dict[str, Any]:
    """The fields of a decoder that the pipelines read; the number of blocks gives the pixels per latent."""
    return {
        "block_out_channels": [1] * manifest.vae.spatial.bit_length(),
        "latent_channels": manifest.vae.latent_channels,
        "scaling_factor": manifest.vae.scaling_factor,
        "force_upcast": False,
    }


def _text_encoder_config(outputs: Mapping[str, TensorSpec]) -> dict[str, Any]:
    """A bundle's text encoder returns only the layer in use."""
    config: dict[str, Any] = {"num_hidden_layers": 0}
    if "text_embeds" in outputs:
        config["projection_dim"] = outputs["text_embeds"].shape[-1]
    return config


def _write(file: Path, config: dict[str, Any]) -> None:
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
