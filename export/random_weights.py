"""Writes random weights in the place of trained ones, to measure a checkpoint at full size without a download.

The architecture is the published one. The files are those that an export reads: a base in diffusers layout, TAESD and
a LoRA. The usual export follows, LoRA fusion included, and ``hypersd verify`` reads the same files. The LoRA is random
too: without one, export and verify would need a case that no real checkpoint has.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..engines.files import cache_folder, lock_file, partial_path
from ..engines.progress import Progress, Stage
from ..errors import DiskFullError, RequestError, disk_errors
from ..families import find_family
from .architectures import PUBLISHED, Architecture, empty_networks
from .checkpoints import DEMO_CHECKPOINTS, Checkpoint
from .random_tensors import RandomFile, lora_file, network_file
from .sources import SourceOptions
from .tokenizer import write_byte_tokenizer
from .workspace import check_space

LAYOUT_VERSION = 1  # raise it when the same seed and architecture make other files
BASE, TINY_VAE, LORA = "base", "taesd", "lora.safetensors"
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
CACHE_REMEDY = "point XDG_CACHE_HOME at another disk"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomWeights:
    """The choice of random weights.

    Attributes:
        seed: equal seeds make equal weights.
        folder: a folder that keeps them for later exports; None for this package's cache.
        architectures: by family.
    """

    seed: int = 0
    folder: Path | None = None
    architectures: Mapping[str, Architecture] = dataclasses.field(default_factory=lambda: PUBLISHED)

    def place(self, family: str) -> Path:
        """The folder of a family's weights; other architectures and seeds have others."""
        described = [LAYOUT_VERSION, self.seed, dataclasses.asdict(self.architectures[family])]
        key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:8]
        return (self.folder or cache_folder() / "random-weights") / f"{family}-{key}"


def check_random_weights(checkpoint: Checkpoint, options: SourceOptions, lora_scale: float) -> None:
    """Check the options that random weights cannot be combined with, before anything is written.

    Raises:
        RequestError: the message names the option.
    """
    if checkpoint in DEMO_CHECKPOINTS:
        raise RequestError(f"{checkpoint.name} has weights, small ones in the clone: leave --random-weights out")
    if options.vae not in (None, "tiny"):
        raise RequestError(f"--random-weights takes no --vae but tiny, got {options.vae!r}: leave one of them out")
    given = {
        "--base": options.base,
        "--revision": options.revision or options.checkpoint_revision or options.vae_revision,
        "--variant": options.variant,
        "--lora": options.checkpoint_file,
        "--lora-scale": None if lora_scale == 1.0 else lora_scale,
    }
    for option, value in given.items():
        if value is not None:
            raise RequestError(f"--random-weights cannot be combined with {option} {value!r}: leave one of them out")


def random_sources(
    checkpoint: Checkpoint, options: SourceOptions, random: RandomWeights, progress: Progress
) -> SourceOptions:
    """The sources with all weights but those of ControlNets replaced by random ones, written unless they are there.

    Raises:
        DiskFullError: the weights do not fit on the disk; nothing was written, or nothing was kept.
        UserError: their folder cannot be written.
    """
    root = random_base(checkpoint.family, random, progress)
    checkpoint_file = LORA if checkpoint.kind == "lora" else f"{BASE}/unet/{DIFFUSERS_WEIGHTS}"
    vae = TINY_VAE if options.vae == "tiny" else f"{BASE}/vae"
    return dataclasses.replace(
        options, base=str(root / BASE), checkpoint_file=str(root / checkpoint_file), vae=str(root / vae)
    )


def random_base(family: str, random: RandomWeights, progress: Progress) -> Path:
    """The folder of a family's random weights: ``base``, ``taesd`` and ``lora.safetensors``.

    The folder is renamed into place when it is whole; an interrupted run resumes file by file. Raises as
    :func:`random_sources`.
    """
    root = random.place(family)
    with lock_file(root, lambda: progress.note(f"waiting for another process to write {root}")):
        if root.exists():
            progress.note(f"random weights are taken from {root}")
        else:
            _write_all(root, family, random, progress)
    return root


def _write_all(root: Path, family: str, random: RandomWeights, progress: Progress) -> None:
    architecture, partial = random.architectures[family], partial_path(root)
    networks = empty_networks(architecture)
    missing = [file for file in _files(family, networks, architecture) if not (partial / file.path).exists()]
    size = sum(file.size for file in missing)
    check_space(root.parent, size, "the random weights need", CACHE_REMEDY)
    progress.note(f"random weights for {find_family(family).title} are written to {root}: {size / 1e6:,.0f} MB, once")
    try:
        with disk_errors(partial, CACHE_REMEDY):
            _write_small_files(partial, networks, architecture)
            for file in missing:
                with Stage(progress, f"random weights: {file.name}") as stage:
                    stage.note = f"{file.size / 1e6:,.0f} MB"
                    file.write(partial, random.seed, lambda done: progress.update(done, ""))
            partial.rename(root)
    except DiskFullError:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _network_folder(name: str) -> str:
    return TINY_VAE if name == "tiny_vae" else f"{BASE}/{name}"


def _files(family: str, networks: Mapping[str, Any], architecture: Architecture) -> list[RandomFile]:
    """Every weight file, smallest networks first."""
    lora = lora_file(LORA, networks["unet"], find_family(family).lora_prefix, architecture.lora_rank)
    files = [lora]
    for name, network in networks.items():
        filename = "model.safetensors" if name in architecture.text_encoders else DIFFUSERS_WEIGHTS
        files.append(network_file(f"{_network_folder(name)}/{filename}", network))
    return sorted(files, key=lambda file: file.size)


def _write_small_files(root: Path, networks: Mapping[str, Any], architecture: Architecture) -> None:
    """Configurations, tokenizers and the index of the base."""
    for name, network in networks.items():
        is_encoder = name in architecture.text_encoders
        save = network.config.save_pretrained if is_encoder else network.save_config
        save(root / _network_folder(name))
    for name, pad_token in architecture.pad_tokens.items():
        write_byte_tokenizer(root / BASE / _tokenizer(name), pad_token=pad_token)
    _write_json(root / BASE / "scheduler/scheduler_config.json", architecture.scheduler)
    _write_json(root / BASE / "model_index.json", _model_index(networks, architecture))


def _model_index(networks: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """The classes of the folders, for diffusers' pipelines."""
    encoders = {name: ["transformers", type(networks[name]).__name__] for name in architecture.text_encoders}
    return {
        "_class_name": architecture.pipeline,
        **encoders,
        **{_tokenizer(name): ["transformers", "CLIPTokenizer"] for name in encoders},
        **{name: ["diffusers", type(networks[name]).__name__] for name in ("unet", "vae")},
        "scheduler": ["diffusers", architecture.scheduler["_class_name"]],
        **architecture.pipeline_settings,
    }


def _tokenizer(text_encoder: str) -> str:
    return text_encoder.replace("text_encoder", "tokenizer")


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(value), indent=2) + "\n", encoding="utf-8")
