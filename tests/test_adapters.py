"""LoRAs in a bundle's slot against diffusers' own pipelines with ``load_lora_weights`` and ``set_adapters``."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from capture_stand_in import Capturable, StandInCapture
from counting import load_engines
from diffusers_pipelines import make_pipeline
from lora_writers import kohya, layer_shapes, pairs, random_lora
from PIL import Image
from safetensors.torch import save_file

from hypersd import Pipeline
from hypersd.engines import Bundle, build_engines
from hypersd.engines.lora_slot import LoraSlot
from hypersd.engines.openvino.library import is_installed
from hypersd.export import ExportOptions, export_bundle
from hypersd.export.lora_slot import SlotOptions
from hypersd.export.lora_sources import LoraSource
from hypersd.runtime.params import Params
from hypersd.runtime.text import load_tokenizers
from hypersd.tools.one_graph import add_one_graph

TOLERANCE = 2e-3  # of full scale
SEED = 7
PROMPT = "a photo of a cat"
CALLS: dict[str, dict[str, Any]] = {  # every sampler, both families, with and without guidance
    "Hyper-SD15-1step-lora": {"num_inference_steps": 2, "guidance_scale": 0.0, "eta": 1.0},
    "Hyper-SD15-8steps-CFG-lora": {"num_inference_steps": 2, "guidance_scale": 5.0, "eta": 0.0},
    "Hyper-SDXL-1step-Unet": {"num_inference_steps": 1, "timesteps": [800], "guidance_scale": 0.0},
    "Hyper-SDXL-2steps-lora": {"num_inference_steps": 2, "guidance_scale": 0.0, "eta": 0.0},
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
    call = {**CALLS[name], **more, "force": True}  # two steps of a checkpoint for eight say as much of LoRAs
    return pipe(PROMPT, **call, seed=SEED, adapters=adapters, output_type="np").images


@contextlib.contextmanager
def with_loras(pipe: Any, files: list[Path]) -> Iterator[Any]:
    """Load LoRAs into diffusers' pipeline for a while."""
    for file in files:
        pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=file.stem)
    try:
        yield pipe
    finally:
        pipe.unload_lora_weights()


def theirs(pipe: Any, name: str, strengths: dict[str, float], **more: Any) -> np.ndarray:
    pipe.set_adapters(list(strengths), list(strengths.values()))
    generator = torch.Generator().manual_seed(SEED)
    return pipe(PROMPT, **{**CALLS[name], "output_type": "np", **more}, generator=generator).images


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
    combinations: list[dict[str, float]] = [
        {"one": -1.0}, {"one": 0.0}, {"two": 0.5}, {"one": 1.0}, {"two": 2.0},
        {"one": 0.8, "two": -0.4}, {"one": 0.5, "two": 1.0, "three": -0.7},
    ]  # fmt: skip
    with with_loras(judge(name), files) as reference:
        for strengths in combinations:
            image, expected = ours(pipe, name, strengths), theirs(reference, name, strengths)
            assert np.abs(image - expected).max() < TOLERANCE, strengths
            if any(strengths.values()):
                assert np.abs(image - plain).max() > 10 * TOLERANCE, "it changes nothing: equality proves nothing"
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
    expected = ours(Pipeline.load(fused(name, file, 0.7, source_options, bundles_folder / f"{name}-fused")), name)
    image = ours(load(export_slotted(name), [file]), name, {"two": 0.7})
    assert np.abs(image - expected).max() < TOLERANCE


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
    with with_loras(judge(name), files[:1]) as reference:
        assert np.abs(first - theirs(reference, name, {"one": 1.0})).max() < TOLERANCE


def test_several_images_and_steps_share_the_slot(
    export_slotted: Callable[[str], Path], judge: Callable[[str], Any], lora_files
) -> None:
    """The slot has no row per image: a batch that takes several runs gets it whole each time."""
    name, more = "Hyper-SD15-8steps-CFG-lora", {"num_images_per_prompt": 3, "negative_prompt": "red dog"}
    files = lora_files(name)
    image = ours(load(export_slotted(name), files), name, {"one": 1.0}, **more)
    assert image.shape[0] == 3
    with with_loras(judge(name), files[:1]) as reference:
        assert np.abs(image - theirs(reference, name, {"one": 1.0}, **more)).max() < TOLERANCE


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


def fused(name: str, file: Path, strength: float, source_options: Any, root: Path) -> Path:
    """The bundle of an export that fuses a LoRA: beside the others, whose graphs it takes."""
    sources = source_options(name, added_loras=(LoraSource(location=str(file), scale=strength),))
    return export_bundle(name, root, ExportOptions(sources=sources, precision="fp32")).root


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_kinds_without_thin_factors_are_decomposed(
    kind: str, export_slotted: Callable[[str], Path], bundles_folder: Path, tmp_path: Path, source_options
) -> None:
    """LoHa and LoKr of a low rank act in the slot as they do when they are fused."""
    name, generator = "Hyper-SD15-1step-lora", torch.Generator().manual_seed(3)
    pipe = Pipeline.load(export_slotted(name))
    assert pipe.manifest.lora_slot is not None
    tensors = {}
    for path, layer in pipe.manifest.lora_slot.layers["unet"].items():
        outputs, inputs = layer.weight[:2]
        if not layer.has_place or ".attn1." not in path or path.endswith("to_k"):
            continue
        shapes = {
            "hada_w1_a": (outputs, 2),
            "hada_w1_b": (2, inputs),
            "hada_w2_a": (outputs, 2),
            "hada_w2_b": (2, inputs),
        }
        if kind == "lokr":
            shapes = {"lokr_w1": (2, 2), "lokr_w2_a": (outputs // 2, 2), "lokr_w2_b": (2, inputs // 2)}
        for part, shape in shapes.items():
            tensors[f"lora_unet_{path.replace('.', '_')}.{part}"] = torch.randn(shape, generator=generator) * 0.5
    file = tmp_path / "style.safetensors"
    save_file(tensors, file)
    expected = ours(Pipeline.load(fused(name, file, 0.7, source_options, bundles_folder / f"{name}-{kind}")), name)
    plain = ours(pipe, name)
    pipe.load_lora_weights(file, strict=True)
    assert np.abs(ours(pipe, name, {"style": 0.7}) - expected).max() < TOLERANCE
    assert np.abs(plain - expected).max() > 10 * TOLERANCE


def test_controlnets_and_init_images_take_the_slot_too(
    lora_files, judge: Callable[[str], Any], controlled_reference, bundles_folder, source_options, controlnet_sources
) -> None:
    """Whatever else a call asks for, the image is that of diffusers with the same LoRA."""
    name = "Hyper-SD15-1step-lora"
    files = lora_files(name)[:1]
    options = ExportOptions(
        sources=source_options(name, controlnets=controlnet_sources(name, "canny")),
        precision="fp32",
        lora_slot=SlotOptions(rank=8, with_text=True),
    )
    pipe = load(export_bundle(name, bundles_folder / f"{name}-slotted-controlled", options).root, files)
    photo = Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 20).convert("RGB")
    started = {"image": photo, "strength": 0.6}
    controlled = {"control_image": photo, "controlnet_conditioning_scale": 0.8}
    calls: dict[str, dict[str, Any]] = {
        "ControlNet": controlled,
        "Img2Img": started,
        "ControlNetInpaint": {
            **started, **controlled, "mask_image": Image.linear_gradient("L").resize((64, 64)), "guidance_scale": 3.0,
        },
    }  # fmt: skip
    controlnet = controlled_reference(name, "canny").controlnet
    with with_loras(judge(name), files) as plain:
        for kind, call in calls.items():
            image = ours(pipe, name, {"one": 1.0}, **call)
            parts = {**plain.components, **({"controlnet": controlnet} if "ControlNet" in kind else {})}
            asked = dict(call)
            if kind == "ControlNet":  # which calls it so
                asked["image"] = asked.pop("control_image")
            expected = theirs(make_pipeline(name, kind, parts), name, {"one": 1.0}, **asked)
            assert np.abs(image - expected).max() < TOLERANCE, kind
            assert np.abs(image - ours(pipe, name, **call)).max() > 5 * TOLERANCE, kind


def test_sizes_and_batches_take_the_slot_too(
    sd15_tiny_vae_bundle: Path, judge: Callable[[str], Any], lora_files
) -> None:
    """A slot's extents are its own: none of them is taken for a size or a number of images."""
    name, more = "Hyper-SD15-1step-lora", {"height": 96, "width": 64, "num_images_per_prompt": 2}
    files = lora_files(name)[:1]
    noise = torch.randn(2, 4, 12, 8, generator=torch.Generator().manual_seed(SEED))
    call = {**CALLS[name], **more, "eta": 0.0, "latents": noise, "output_type": "latent"}
    image = load(sd15_tiny_vae_bundle, files)(PROMPT, **call, adapters={"one": 1.0}).images
    with with_loras(judge(name), files) as reference:
        expected = theirs(reference, name, {"one": 1.0}, **call)
    assert (image - expected).abs().max() < TOLERANCE * expected.abs().max()


def test_adapters_share_one_recorded_graph(export_slotted: Callable[[str], Path], lora_files) -> None:
    """Another adapter or strength is no new capture: the slot is an input of the whole image's graph."""
    name = "Hyper-SD15-1step-lora"
    bundle, capture = Bundle.load(export_slotted(name)), StandInCapture()
    engines, tokenizers = load_engines(bundle, "onnxruntime", "cpu"), load_tokenizers(bundle)
    capturable = {part: Capturable(engine) for part, engine in engines.items()}
    pipes = [
        Pipeline(bundle.manifest, capturable, tokenizers, capture=capture),
        Pipeline(bundle.manifest, engines, tokenizers),
    ]
    for pipe in pipes:
        for file in lora_files(name):
            pipe.load_lora_weights(file)
    for adapters in [{}, {"one": 1.0}, {"one": 0.5}, {"two": 0.5, "three": 1.0}, {}, {"one": 1.0}]:
        graphed, plain = (ours(pipe, name, adapters) for pipe in pipes)
        assert np.array_equal(graphed, plain), adapters
    assert (capture.image_captures, capture.image_replays) == (1, 4)


def test_a_one_graph_takes_the_slots_as_inputs(
    export_slotted: Callable[[str], Path], lora_files, copy_bundle: Callable[..., Bundle]
) -> None:
    """UNet's and text encoders' slots, by the graph's own input names."""
    name = "Hyper-SDXL-1step-Unet"
    bundle = add_one_graph(copy_bundle(export_slotted(name)), Params(prompt=""))
    (graph,) = bundle.manifest.one_graphs
    assert bundle.manifest.one_graphs[graph].network.inputs.keys() > {
        "lora",
        "lora_text_encoder",
        "lora_text_encoder_2",
    }
    whole, parts = Pipeline.load(bundle, one_graph=graph), load(bundle.root, lora_files(name)[:1])
    whole.load_lora_weights(lora_files(name)[0])
    for adapters in ({"one": 1.0}, {}, {"one": -0.5}):
        images = [np.asarray(pipe(PROMPT, seed=SEED, adapters=adapters).images[0], np.int16) for pipe in (whole, parts)]
        assert np.abs(images[0] - images[1]).max() <= 1


def test_tensorrt_rtx_builds_engines_with_a_slot(bundles_folder: Path, source_options) -> None:
    """Without a GPU: the parser and the builder take the graphs of every component."""
    pytest.importorskip("tensorrt_rtx")
    name = "Hyper-SD15-1step-lora"
    options = ExportOptions(sources=source_options(name), lora_slot=SlotOptions(rank=4, with_text=True), text_only=True)
    bundle = build_engines(export_bundle(name, bundles_folder / f"{name}-slotted-rtx", options), "tensorrt-rtx")
    (target,) = bundle.manifest.engines.values()
    assert target.plans.keys() == bundle.manifest.components.keys()
    assert bundle.manifest.lora_slot is not None
    assert bundle.manifest.lora_slot.components == ["unet", "text_encoder"]


@pytest.mark.skipif(not is_installed(), reason="OpenVINO is not installed")
def test_openvino_takes_the_slot(export_slotted: Callable[[str], Path], lora_files) -> None:
    """The other engine of the CPU, in float32: the same image within its rounding."""
    name = "Hyper-SDXL-2steps-lora"
    file = lora_files(name)[0]
    pipe = Pipeline.load(export_slotted(name), backend="openvino", precision="fp32")
    pipe.load_lora_weights(file)
    image, expected = ours(pipe, name, {"one": 1.0}), ours(load(export_slotted(name), [file]), name, {"one": 1.0})
    assert np.abs(image - expected).max() < TOLERANCE
