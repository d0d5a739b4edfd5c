"""Optimum reads a bundle through a folder of links, which has all files that its pipelines need."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hypersd.engines import Bundle
from hypersd.engines.manifest import ControlNetSettings
from hypersd.engines.progress import Silent
from hypersd.runtime.text import ClipTokenizer
from hypersd.tools.bench.contender import Context
from hypersd.tools.bench.contenders import find_contender
from hypersd.tools.bench.optimum_folder import write_optimum_folder
from hypersd.tools.bench.session import BenchOptions, run_bench

CHECKPOINTS = ["Hyper-SD15-1step-lora", "Hyper-SDXL-1step-lora", "Hyper-SD15-2steps-lora", "Hyper-SDXL-1step-Unet"]
PROMPTS = ["a photo of a cat", "", "a very " + "long " * 100 + "prompt"]


@pytest.fixture(params=CHECKPOINTS)
def bundle(request: pytest.FixtureRequest, export_tiny: Callable[[str], Path]) -> Bundle:
    return Bundle.load(export_tiny(request.param))


@pytest.fixture
def folder(bundle: Bundle, tmp_path: Path) -> Path:
    """The layout of a bundle."""
    write_optimum_folder(bundle, tmp_path / "layout")
    return tmp_path / "layout"


def read(file: Path) -> dict:
    return json.loads(file.read_text())


def test_weights_are_linked_and_not_copied(bundle: Bundle, folder: Path) -> None:
    """The folder has every file of every component under optimum's name, as a link."""
    for component in bundle.manifest.components.values():
        for file in component.files:
            assert (folder / file).is_symlink()
            assert (folder / file).samefile(bundle.path(file))
    own = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
    assert own < 20_000


def test_the_index_names_every_component_with_its_class(bundle: Bundle, folder: Path) -> None:
    """The classes can be imported, the scheduler is the sampler's, and every named folder exists."""
    import diffusers
    import transformers

    index = read(folder / "model_index.json")
    libraries = {"diffusers": diffusers, "transformers": transformers}
    for name, value in index.items():
        if isinstance(value, list) and value[0] is not None:
            library, kind = value
            assert hasattr(libraries[library], kind)
            assert (folder / name).is_dir()
    assert index["scheduler"][1].lower().startswith(bundle.manifest.sampler.kind)
    assert issubclass(getattr(diffusers, index["_class_name"]), diffusers.DiffusionPipeline)


def test_the_scheduler_is_the_bundles(bundle: Bundle, folder: Path) -> None:
    """diffusers reads the configuration; its constants are the runtime's."""
    import diffusers

    kind = getattr(diffusers, read(folder / "model_index.json")["scheduler"][1])
    config = kind.from_pretrained(folder / "scheduler").config
    assert {name: config[name] for name in bundle.manifest.scheduler} == bundle.manifest.scheduler


def test_the_tokenizers_give_the_bundles_tokens(bundle: Bundle, folder: Path) -> None:
    """transformers reads them, and pads and cuts to the runtime's own tokens."""
    from transformers import CLIPTokenizerFast

    for file in folder.glob("tokenizer*/tokenizer.json"):
        tokenizer = CLIPTokenizerFast.from_pretrained(str(file.parent))
        theirs = tokenizer(PROMPTS, padding="max_length", max_length=77, truncation=True)["input_ids"]
        ours, _ = ClipTokenizer(file)(PROMPTS)
        assert theirs == ours.tolist()


def test_the_decoder_gives_the_pixels_per_latent(bundle: Bundle, folder: Path) -> None:
    """Pipelines count its blocks."""
    config = read(folder / "vae_decoder/config.json")
    assert 2 ** (len(config["block_out_channels"]) - 1) == bundle.manifest.vae.spatial
    assert config["scaling_factor"] == bundle.manifest.vae.scaling_factor


def test_a_bundle_with_controlnets_is_not_for_optimum(sd15_bundle: Path) -> None:
    """Its UNet has inputs that optimum does not feed."""
    optimum, canny = find_contender("optimum"), {"canny": ControlNetSettings()}
    controlled: Any = SimpleNamespace(manifest=SimpleNamespace(controlnets=canny, lora_slot=None))
    assert "ControlNets" in (optimum.why_not(Context(controlled, "cpu", Path())) or "")
    assert optimum.why_not(Context(Bundle.load(sd15_bundle), "cpu", Path())) is None


@pytest.mark.skipif("HYPERSD_OPTIMUM_PYTHON" not in os.environ, reason="HYPERSD_OPTIMUM_PYTHON names no interpreter")
def test_optimum_generates_the_same_image(bundle: Bundle) -> None:
    """A run with optimum-onnx in another environment gives equal pixels."""
    pythons = {"optimum": os.environ["HYPERSD_OPTIMUM_PYTHON"]}
    options = BenchOptions(contenders=["optimum"], rounds=1, pythons=pythons)
    report = run_bench(bundle, options, "", Silent())
    assert report.entry("optimum").failure is None
    sameness = report.comparisons[0].rows[1].sameness
    assert sameness is not None
    assert (sameness.verdict, sameness.psnr) == ("same", None)
