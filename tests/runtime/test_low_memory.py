"""Pipelines whose components are loaded when they are needed: the same images, and never two stages in memory."""

from __future__ import annotations

import asyncio
import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lora_writers import write_slot_lora
from PIL import Image

from hypersd import Pipeline
from hypersd.cli import main
from hypersd.engines.component_names import cond_embedding, controlnet
from hypersd.engines.onnx_runtime import OnnxRuntimeEngine
from hypersd.engines.openvino.library import is_installed
from hypersd.errors import EngineError, RequestError
from hypersd.runtime.params import Params
from hypersd.serve.service import LocalService
from hypersd.serve.service_request import ServiceRequest

PROMPT, OTHER = "a photo of a cat", "blue dog"
SD15 = "Hyper-SD15-1step-lora"
CANNY, SCRIBBLE = controlnet("canny"), controlnet("scribble")
TOGETHER = [{"text_encoder", "text_encoder_2"}, {"unet", CANNY, SCRIBBLE}]  # all others are loaded alone


class Loads:
    """The engines that were loaded, and that exist: what is released is gone, and its memory with it."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.alive: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()

    def saw(self, name: str, engine: Any) -> None:
        beside = set(self.alive)
        assert name not in beside, f"{name} is loaded twice"
        assert not beside or any(beside | {name} <= stage for stage in TOGETHER), (name, beside)
        self.names.append(name)
        self.alive[name] = engine

    def counted(self) -> Counter[str]:
        """The loads since the last call of this; between calls no engine exists."""
        assert not self.alive, set(self.alive)
        counts, self.names = Counter(self.names), []
        return counts


@pytest.fixture
def load_both(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Pipeline, Pipeline, Loads]]:
    """``load_both(root)``: a pipeline as usual, one with low memory, and the loads of this one."""

    def load(root: Path, backend: str = "onnxruntime") -> tuple[Pipeline, Pipeline, Loads]:
        usual, loads = Pipeline.load(root, backend, "cpu"), Loads()
        if backend == "openvino":
            from hypersd.engines.openvino import openvino_engine as module

            engine_class: type = module.OpenVinoEngine
        else:
            from hypersd.engines import onnx_runtime as module

            engine_class = OnnxRuntimeEngine

        class Watched(engine_class):
            def __init__(self, name: str, *args: Any, **options: Any) -> None:
                loads.saw(name, self)  # it takes the most while it is loaded
                super().__init__(name, *args, **options)

        monkeypatch.setattr(module, engine_class.__name__, Watched)
        low = Pipeline.load(root, backend, "cpu", low_memory=True)
        assert (low.is_low_memory, usual.is_low_memory) == (True, False)
        assert not loads.counted(), "nothing is loaded before it is needed"
        return usual, low, loads

    return load


def photo(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8))


def assert_same(usual: Pipeline, low: Pipeline, prompt: Any = PROMPT, **settings: Any) -> None:
    """The images are equal to the bit."""
    theirs, ours = (pipe(prompt, output_type="np", **settings).images for pipe in (usual, low))
    assert np.array_equal(ours, theirs)


def test_every_call_loads_what_it_runs_once(export_controlled: Callable[[str], Path], load_both: Any) -> None:
    """Known prompts load no text encoder, a ControlNet that does not act is not loaded, and images share a load."""
    usual, low, loads = load_both(export_controlled(SD15))
    assert_same(usual, low, seed=1, num_inference_steps=2)
    assert loads.counted() == Counter(["text_encoder", "unet", "vae_decoder"])
    assert_same(usual, low, [PROMPT] * 2, seed=2, num_inference_steps=4)
    assert loads.counted() == Counter(["unet", "vae_decoder"])
    given: dict[str, Any] = {"control_image": {"canny": photo(1)}, "image": photo(2), "strength": 0.5, "seed": 3}
    assert_same(usual, low, OTHER, num_inference_steps=4, **given)
    embedding = cond_embedding("canny")
    expected = ["text_encoder", embedding, "vae_encoder", "unet", CANNY, "vae_decoder"]
    assert loads.counted() == Counter(expected)
    assert_same(usual, low, seed=4, control_image={"canny": photo(1), "scribble": photo(3)})
    assert loads.counted() == Counter([embedding, cond_embedding("scribble"), "unet", CANNY, SCRIBBLE, "vae_decoder"])


@pytest.mark.skipif(not is_installed(), reason="needs OpenVINO")
def test_openvino_loads_what_it_runs_once(sd15_bundle: Path, load_both: Any) -> None:
    """A released engine does not wait for the rest in which it would give its activations back."""
    usual, low, loads = load_both(sd15_bundle, "openvino")
    assert_same(usual, low, seed=1)
    assert loads.counted() == Counter(["text_encoder", "unet", "vae_decoder"])
    assert_same(usual, low, seed=2)
    assert loads.counted() == Counter(["unet", "vae_decoder"])


def test_both_text_encoders_are_loaded_once_for_all_prompts(sdxl_bundle: Path, load_both: Any) -> None:
    """They run in turn for every prompt."""
    usual, low, loads = load_both(sdxl_bundle)
    assert_same(usual, low, [PROMPT, OTHER, "red"], seed=1)
    assert loads.counted() == Counter(["text_encoder", "text_encoder_2", "unet", "vae_decoder"])
    rows = [pipe.encode_prompt([PROMPT, "green"]) for pipe in (usual, low)]
    assert torch.equal(rows[0].hidden_states, rows[1].hidden_states)
    assert loads.counted() == Counter(["text_encoder", "text_encoder_2"])
    latents = low(PROMPT, seed=1, output_type="latent").images
    assert loads.counted() == Counter(["unet"])
    assert torch.equal(low.decode(latents), usual.decode(latents))
    assert loads.counted() == Counter(["vae_decoder"])


def test_adapters_act_in_every_load(export_slotted: Callable[[str], Path], tmp_path: Path, load_both: Any) -> None:
    """LoRAs are inputs of the components: they need no load of their own."""
    usual, low, loads = load_both(export_slotted(SD15))
    assert usual.manifest.lora_slot is not None
    file = write_slot_lora(usual.manifest.lora_slot, tmp_path / "style.safetensors")
    for pipe in (usual, low):
        pipe.load_lora_weights(file)
    plain = low(PROMPT, seed=1, output_type="np").images
    for strength in (1.0, 0.5):
        assert_same(usual, low, seed=1, adapters={"style": strength})
        assert not np.array_equal(low(PROMPT, seed=1, adapters={"style": strength}, output_type="np").images, plain)
    assert_same(usual, low, seed=1)
    loads.counted()


def test_threads_take_turns(sd15_bundle: Path, load_both: Any) -> None:
    """No load is shared or lost: a thread's loads are those of its own call, and the images are the same."""
    usual, low, loads = load_both(sd15_bundle)
    expected = [usual(f"{PROMPT} {i}", seed=i, output_type="np").images for i in range(6)]
    with ThreadPoolExecutor(6) as pool:
        images = list(pool.map(lambda i: low(f"{PROMPT} {i}", seed=i, output_type="np").images, range(6)))
    assert all(np.array_equal(*pair) for pair in zip(images, expected, strict=True))
    assert loads.counted() == Counter({"text_encoder": 6, "unet": 6, "vae_decoder": 6})


def test_a_call_inside_a_callback_goes_before_the_rest_of_the_image(sd15_bundle: Path, load_both: Any) -> None:
    """It takes the UNet's place; the outer call loads the UNet again for its next step."""
    usual, low, loads = load_both(sd15_bundle)
    inner = []

    def callback(pipe: Pipeline, i: int, t: int, tensors: Any) -> None:
        if i == 0:
            inner.append(pipe(OTHER, seed=5, output_type="np").images)

    settings: dict[str, Any] = {"seed": 1, "num_inference_steps": 2, "output_type": "np"}
    outer = low(PROMPT, callback_on_step_end=callback, **settings).images
    assert np.array_equal(outer, usual(PROMPT, **settings).images)
    assert np.array_equal(inner[0], usual(OTHER, seed=5, output_type="np").images)
    assert loads.counted() == Counter({"text_encoder": 2, "unet": 3, "vae_decoder": 2})


def test_a_stream_gives_the_same_images(sd15_bundle: Path, load_both: Any) -> None:
    """Its threads take turns like others."""
    usual, low, loads = load_both(sd15_bundle)
    frames, settings = [np.asarray(photo(i)) for i in range(3)], {"seed": 1, "strength": 0.5, "num_inference_steps": 2}
    images = [list(pipe.stream(frames, PROMPT, look_ahead=2, **settings)) for pipe in (usual, low)]
    assert all(np.array_equal(np.asarray(one), np.asarray(other)) for one, other in zip(*images, strict=True))
    assert loads.counted()["unet"] == 3


def test_after_an_error_the_next_call_loads_again(
    sd15_bundle: Path, load_both: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left behind by a component that fails to run."""
    usual, low, loads = load_both(sd15_bundle)
    with monkeypatch.context() as patched:

        def fail(*_: Any) -> None:
            raise EngineError("it broke")

        patched.setattr(OnnxRuntimeEngine, "run", fail)
        with pytest.raises(EngineError, match="it broke"):
            low(PROMPT, seed=1)
    assert_same(usual, low, seed=1)
    assert loads.counted()["text_encoder"] == 2


def test_a_service_holds_nothing_between_images(sd15_bundle: Path, load_both: Any) -> None:
    """Requests get the same images as without."""
    usual, _, loads = load_both(sd15_bundle)
    service = LocalService([sd15_bundle], devices=["cpu"], backend="onnxruntime", low_memory=True)
    service.start()
    try:
        service.wait_ready()
        request = ServiceRequest(
            model=sd15_bundle.name, params=Params(prompt=OTHER, seed=(3, 4), num_images_per_prompt=2)
        )
        images = asyncio.run(service.generate(request, 300))
    finally:
        service.stop()
        service.join()
    for seed, image in zip((3, 4), images, strict=True):
        assert np.array_equal(np.asarray(image.image), np.asarray(usual(OTHER, seed=seed).images[0]))
    assert loads.counted()["text_encoder"] == 2, "of the warm-up and of the request"


def test_the_command_line_generates_the_same_image(
    sd15_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line of the load says when components are loaded."""
    files = [tmp_path / "usual.png", tmp_path / "low.png"]
    for file, options in zip(files, ([], ["--low-memory"]), strict=True):
        assert main(["generate", str(sd15_bundle), PROMPT, "--seed", "3", "-o", str(file), *options]) == 0
        assert ("components are loaded when they are needed" in capsys.readouterr().err) == bool(options)
    usual, low = (np.asarray(Image.open(file)) for file in files)
    assert np.array_equal(usual, low)


def test_one_graph_holds_all_components(sd15_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It cannot be loaded in parts, and says so before anything else is looked at."""
    with pytest.raises(RequestError, match="one-graph holds all components at once: leave low_memory or one_graph out"):
        Pipeline.load(sd15_bundle, one_graph="one-graph-1step", low_memory=True)
    assert main(["generate", str(sd15_bundle), PROMPT, "--one-graph", "--low-memory"]) == 2
    assert "a one-graph has no --low-memory: leave it or --one-graph out" in capsys.readouterr().err
