"""LoRAs in a bundle's slot against diffusers' own pipelines with ``load_lora_weights`` and ``set_adapters``."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lora_writers import kohya, layer_shapes, pairs, random_lora
from safetensors.torch import save_file

from hypersd import Pipeline
from hypersd.engines.lora_slot import LoraSlot
from hypersd.export import ExportOptions, export_bundle
from hypersd.export.lora_sources import LoraSource

TOLERANCE = 2e-3  # of full scale
SEED = 7
PROMPT = "a photo of a cat"
CALLS: dict[str, dict[str, Any]] = {  # every sampler, both families, with and without guidance
    "Hyper-SD15-1step-lora": {"num_inference_steps": 2, "guidance_scale": 0.0, "eta": 1.0},
    "Hyper-SD15-4steps-lora": {"num_inference_steps": 4, "guidance_scale": 0.0, "eta": 0.0},
    "Hyper-SDXL-1step-Unet": {"num_inference_steps": 1, "timesteps": [800], "guidance_scale": 0.0},
    "Hyper-SDXL-8steps-CFG-lora": {"num_inference_steps": 8, "guidance_scale": 5.0, "eta": 0.0},
}
NAMES = ("one", "two", "three")
EACH_CHECKPOINT = pytest.mark.parametrize("name", CALLS)


@pytest.fixture(scope="module")
def judge(reference: Callable[[str], Any]) -> Callable[[str], Any]:
    """``judge(name)``: diffusers' pipeline of a checkpoint, of this module's own."""
    return functools.cache(lambda name: copy.deepcopy(reference(name)))


@pytest.fixture(scope="module")
def lora_files(judge: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Path]]:
    """``lora_files(name)``: three LoRAs for a checkpoint's base, of ranks 2 to 4, in two layouts, with alphas."""

    @functools.cache
    def write(name: str) -> list[Path]:
        folder, pipe, files = tmp_path_factory.mktemp(name), judge(name), []
        pipe.unload_lora_weights()
        for seed, adapter in enumerate(NAMES):
            lora = random_lora(places(layer_shapes(pipe)), alpha=1.5 if seed else None)
            lora = {place: (down.roll(seed, 0) * 0.6, up.flip(0), a) for place, (down, up, a) in lora.items()}
            layout = kohya(lora) if seed else pairs(lora, ".lora_A.weight", ".lora_B.weight")
            files.append(folder / f"{adapter}.safetensors")
            save_file({key: tensor.contiguous() for key, tensor in layout.items()}, files[-1])
        return files

    return write


def places(shapes: dict[str, dict[str, tuple[int, ...]]]) -> dict[str, dict[str, tuple[int, ...]]]:
    """The layers that have a place in a slot."""
    return {
        component: {
            path: shape
            for path, shape in paths.items()
            if (".attentions." in path if component == "unet" else "layers." in path)
        }
        for component, paths in shapes.items()
    }


def ours(pipe: Pipeline, name: str, adapters: dict[str, float] | None = None, **more: Any) -> np.ndarray:
    return pipe(PROMPT, **{**CALLS[name], **more}, seed=SEED, adapters=adapters, output_type="np").images


def theirs(pipe: Any, name: str, files: list[Path], strengths: dict[str, float], **more: Any) -> np.ndarray:
    for file in files:
        pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=file.stem)
    try:
        pipe.set_adapters(list(strengths), list(strengths.values()))
        generator = torch.Generator().manual_seed(SEED)
        return pipe(PROMPT, **{**CALLS[name], **more}, generator=generator, output_type="np").images
    finally:
        pipe.unload_lora_weights()


def load(bundle: Path, files: list[Path]) -> Pipeline:
    pipe = Pipeline.load(bundle)
    for file in files:
        pipe.load_lora_weights(file, strict=True)
    return pipe


@EACH_CHECKPOINT
def test_images_are_those_of_diffusers_with_adapters(
    name: str, export_slotted: Callable[[str], Path], judge: Callable[[str], Any], lora_files
) -> None:
    """One, two and three LoRAs at once, in both layouts, at every strength that people use, text encoders included."""
    files = lora_files(name)
    pipe = load(export_slotted(name), files)
    plain = ours(pipe, name)
    for strengths in [
        {"one": -1.0}, {"one": 0.0}, {"two": 0.5}, {"one": 1.0}, {"two": 2.0},
        {"one": 0.8, "two": -0.4}, {"one": 0.5, "two": 1.0, "three": -0.7},
    ]:  # fmt: skip
        image, expected = ours(pipe, name, strengths), theirs(judge(name), name, files, strengths)
        assert np.abs(image - expected).max() < TOLERANCE, strengths
        if any(strengths.values()):
            assert np.abs(image - plain).max() > 10 * TOLERANCE, "the LoRA changes nothing: equality proves nothing"
        else:
            assert np.array_equal(image, plain)


@EACH_CHECKPOINT
def test_an_empty_slot_is_the_plain_bundle(
    name: str, export_slotted: Callable[[str], Path], export_tiny: Callable[[str], Path]
) -> None:
    """Nobody pays with another image for a slot that is not used."""
    slotted, plain = Pipeline.load(export_slotted(name)), Pipeline.load(export_tiny(name))
    assert np.abs(ours(slotted, name) - ours(plain, name)).max() < 1e-5


@pytest.mark.parametrize("name", ["Hyper-SD15-1step-lora", "Hyper-SDXL-1step-Unet"])
def test_a_lora_in_the_slot_is_the_same_fused_at_export(
    name: str, export_slotted: Callable[[str], Path], lora_files, source_options, bundles_folder: Path
) -> None:
    """What a user tries at run time is what an export with it gives."""
    file = lora_files(name)[1]
    sources = source_options(name, added_loras=(LoraSource(location=str(file), scale=0.7),))
    options = ExportOptions(sources=sources, precision="fp32")
    fused = Pipeline.load(export_bundle(name, bundles_folder / f"{name}-fused", options))
    image = ours(load(export_slotted(name), [file]), name, {"two": 0.7})
    assert np.abs(image - ours(fused, name)).max() < TOLERANCE


def test_prompts_are_encoded_anew_under_other_adapters(
    export_slotted: Callable[[str], Path], judge: Callable[[str], Any], lora_files
) -> None:
    """Embeddings of a known prompt belong to the adapters that they were computed with."""
    name = "Hyper-SD15-1step-lora"
    files = lora_files(name)
    pipe = load(export_slotted(name), files)
    first = ours(pipe, name, {"one": 1.0})
    ours(pipe, name, {"two": 1.0})
    ours(pipe, name)
    assert np.array_equal(ours(pipe, name, {"one": 1.0}), first)
    assert np.abs(first - theirs(judge(name), name, files, {"one": 1.0})).max() < TOLERANCE


def test_several_images_and_steps_share_the_slot(
    export_slotted: Callable[[str], Path], judge: Callable[[str], Any], lora_files
) -> None:
    """The slot has no row per image: a batch that takes several runs gets it whole each time."""
    name, more = "Hyper-SDXL-8steps-CFG-lora", {"num_images_per_prompt": 3, "negative_prompt": "red dog"}
    files = lora_files(name)
    image = ours(load(export_slotted(name), files), name, {"one": 1.0}, **more)
    assert image.shape[0] == 3
    assert np.abs(image - theirs(judge(name), name, files, {"one": 1.0}, **more)).max() < TOLERANCE


def test_every_layer_of_attention_has_a_place(
    export_slotted: Callable[[str], Path], judge: Callable[[str], Any]
) -> None:
    """The common LoRA files, which change attention blocks and text encoders, fit as a whole."""
    for name in ("Hyper-SD15-1step-lora", "Hyper-SDXL-1step-Unet"):
        slot = Pipeline.load(export_slotted(name)).manifest.lora_slot
        assert isinstance(slot, LoraSlot)
        wanted = places(layer_shapes(judge(name)))
        for component, paths in wanted.items():
            placed = {path for path, layer in slot.layers[component].items() if layer.has_place}
            assert placed == {path.removeprefix("text_model.") for path in paths}
