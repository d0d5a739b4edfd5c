"""The manifest of an export: every file and source is recorded, and settings are diffusers' and the model card's."""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from make_tiny_repos import SD15_REPO, SDXL_REPO

from hypersd.engines.bundle import Bundle
from hypersd.export.checkpoints import HYPER_SD_REPO, find_checkpoint

from .export_runs import ONE, TWO, UNET, Run


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("which", ["sd15_bundle", "sdxl_bundle"])
def test_every_file_is_recorded_and_harmless(which: str, request: pytest.FixtureRequest) -> None:
    """The manifest lists every file with its size and hash; none is executable, pickled or of an unknown kind."""
    root = request.getfixturevalue(which)
    files = Bundle.load(root).manifest.files
    there = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if not path.is_dir()}
    assert there.keys() - {"bundle.json"} == files.keys()
    for name, record in files.items():
        assert (record.size, record.sha256) == (there[name].stat().st_size, sha256(there[name]))
    for name, path in there.items():
        assert path.suffix in (".onnx", ".onnx_data", ".json"), name
        assert not path.is_symlink()
        assert path.stat().st_mode & 0o111 == 0
        # Pickle's protocols 2 to 5: a float32 may begin with 0x80 by chance.
        pickles = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
        assert not path.read_bytes().startswith((*pickles, b"PK", b"\x7fELF", b"#!"))


@pytest.mark.parametrize("which", ["sd15_bundle", "sdxl_bundle"])
def test_sources_are_recorded(which: str, request: pytest.FixtureRequest, tiny_repos: Path) -> None:
    """Size, hash and place of every weight file that went in, and nothing else."""
    manifest = Bundle.load(request.getfixturevalue(which)).manifest
    is_sdxl = manifest.family == "sdxl"
    base = tiny_repos / (SDXL_REPO if is_sdxl else SD15_REPO)
    expected = {
        "text_encoder": base / "text_encoder/model.safetensors",
        "unet": base / "unet/diffusion_pytorch_model.safetensors",
        "vae": base / "vae/diffusion_pytorch_model.safetensors",
        "lora": tiny_repos / HYPER_SD_REPO / f"{manifest.checkpoint}.safetensors",
    }
    if is_sdxl:
        expected["text_encoder_2"] = base / "text_encoder_2/model.safetensors"
    assert manifest.origin.weights.keys() == expected.keys()
    for name, path in expected.items():
        (record,) = manifest.origin.weights[name]
        assert (record.size, record.sha256) == (path.stat().st_size, sha256(path))
        assert record.path == str(path.resolve())
        assert record.repo is None
    assert manifest.origin.base == str(base.resolve())
    assert manifest.origin.lora_scale == 1.0


@pytest.mark.parametrize("which", ["sd15_bundle", "sdxl_bundle"])
def test_versions_are_recorded(which: str, request: pytest.FixtureRequest) -> None:
    """The versions of the packages that wrote the bundle, as the packages themselves say."""
    import diffusers
    import onnx
    import onnxruntime
    import onnxscript
    import transformers

    import hypersd

    libraries = (torch, diffusers, transformers, onnx, onnxscript, onnxruntime, hypersd)
    expected = {library.__name__: library.__version__.split("+")[0] for library in libraries}
    versions = Bundle.load(request.getfixturevalue(which)).manifest.versions
    assert {name: version.split("+")[0] for name, version in versions.items()} == expected


SCHEDULERS = {"tcd": "TCDScheduler", "ddim": "DDIMScheduler", "lcm": "LCMScheduler"}


@pytest.mark.parametrize("name", [ONE, TWO, "Hyper-SDXL-1step-lora", "Hyper-SDXL-4steps-lora", UNET])
def test_scheduler_constants_are_diffusers(name: str, run: Run, cheap: Any, tiny_repos: Path) -> None:
    """Every constant is what diffusers' from_config makes of the base's scheduler, as the model card calls it."""
    import diffusers

    entry = find_checkpoint(name)
    manifest = run(name)[0].manifest
    config = json.loads((tiny_repos / entry.base / "scheduler/scheduler_config.json").read_text())
    more = {"timestep_spacing": "trailing"} if entry.sampler == "ddim" else {}
    theirs = getattr(diffusers, SCHEDULERS[entry.sampler]).from_config(config, **more).config
    assert {key: theirs[key] for key in manifest.scheduler} == manifest.scheduler
    known = inspect.signature(getattr(diffusers, SCHEDULERS[entry.sampler])).parameters
    left_out = known.keys() - manifest.scheduler.keys()
    assert left_out == {"sample_max_value", "dynamic_thresholding_ratio"}, "these matter to thresholding alone"
    assert manifest.scheduler["thresholding"] is False
    assert manifest.scheduler["beta_start"] == 0.00085
    assert manifest.scheduler["set_alpha_to_one"] is False
    assert manifest.sampler.kind == entry.sampler


def test_whole_unet_manifest(run: Run, cheap: Any, tiny_repos: Path) -> None:
    """No LoRA and no scale; the UNet's weights are the Hyper-SD file; steps, timesteps and sampler are the card's."""
    manifest = run(UNET)[0].manifest
    file = tiny_repos / HYPER_SD_REPO / f"{UNET}.safetensors"
    assert manifest.origin.lora_scale is None
    assert "lora" not in manifest.origin.weights
    assert [record.sha256 for record in manifest.origin.weights["unet"]] == [sha256(file)]
    settings = manifest.sampler
    assert (settings.kind, settings.allowed_steps, settings.timesteps) == ("lcm", (1,), (800,))
    assert (settings.num_inference_steps, settings.eta, settings.guidance_scale) == (1, 0.0, 0.0)


def test_lora_scale_reaches_weights_and_manifest(run: Run, cheap: Any, tmp_path: Path) -> None:
    """The option is recorded, and the fused weights differ with it."""
    manifest = run(out="full")[0].manifest
    assert manifest.origin.lora_scale == 1.0
    scaled = run(out="scaled", lora_scale=0.75)[0].manifest
    assert scaled.origin.lora_scale == 0.75
    data = [(tmp_path / name / "unet/model.onnx_data").read_bytes() for name in ("full", "scaled")]
    assert data[0] != data[1]


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        (ONE, {}, (0.18215, 8, False)),
        ("Hyper-SDXL-1step-lora", {}, (0.13025, 8, False)),
        ("Hyper-SDXL-1step-lora", {"vae": "madebyollin/sdxl-vae-fp16-fix"}, (0.13025, 8, False)),
        (ONE, {"vae": "madebyollin/taesd"}, (1.0, 8, True)),
        ("Hyper-SDXL-1step-lora", {"vae": "madebyollin/taesdxl"}, (1.0, 8, True)),
    ],
)
def test_vae_settings(
    name: str, changes: dict[str, str], expected: tuple[float, int, bool], run: Run, cheap: Any, tiny_repos: Path
) -> None:
    """The scaling factor is the VAE's own, 1 for the tiny decoders; pixels per latent are 8."""
    manifest = run(name, **{key: str(tiny_repos / value) for key, value in changes.items()})[0].manifest
    assert (manifest.vae.scaling_factor, manifest.vae.spatial, manifest.vae.tiny) == expected


def test_tokenizers_are_each_their_own(sdxl_bundle: Path, tiny_repos: Path) -> None:
    """SDXL's second tokenizer pads with another token: both files give transformers' tokens, 77 of them."""
    from tokenizers import Tokenizer
    from transformers import CLIPTokenizer

    for name in ("tokenizer", "tokenizer_2"):
        ours = Tokenizer.from_file(str(sdxl_bundle / name / "tokenizer.json"))
        theirs = CLIPTokenizer.from_pretrained(tiny_repos / SDXL_REPO / name)
        for text in ("a photo of a cat", "", "cat " * 100, "naïve 猫 🐈"):
            expected = theirs(text, padding="max_length", max_length=77, truncation=True).input_ids
            assert ours.encode(text).ids == expected
    pads = [Tokenizer.from_file(str(sdxl_bundle / n / "tokenizer.json")).encode("").ids[-1]
            for n in ("tokenizer", "tokenizer_2")]  # fmt: skip
    assert pads[0] != pads[1]
