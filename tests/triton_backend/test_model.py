"""The Python model that Triton runs, on a stand-in for Triton's module: every request is answered for itself."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import triton_stand_in
from lora_writers import write_slot_lora
from PIL import Image, ImageDraw
from triton_stand_in import InferenceRequest, InferenceResponse
from waiting import wait_until

from hypersd import Pipeline
from hypersd.engines import Bundle
from hypersd.errors import EngineError, RequestError
from hypersd.runtime.control_images import preprocess
from hypersd.runtime.image_files import fit
from hypersd.runtime.params import Params
from hypersd.triton_backend import model as triton_model
from hypersd.triton_backend.model import Model
from hypersd.triton_backend.repository import write_repository
from hypersd.triton_backend.rows import read_requests


class TritonPythonModel(Model):
    """The class in the repository's model.py."""

    utils = triton_stand_in


def arguments(folder: Path, parameters: Mapping[str, str], kind: str = "CPU", device: str = "0") -> dict[str, str]:
    """Triton's arguments of an instance."""
    config = {"parameters": {name: {"string_value": value} for name, value in parameters.items()}}
    return {
        "model_config": json.dumps(config),
        "model_repository": str(folder),
        "model_name": folder.name,
        "model_version": "1",
        "model_instance_kind": kind,
        "model_instance_device_id": device,
    }


@pytest.fixture(scope="session")
def load() -> Callable[[Path], TritonPythonModel]:
    def load(bundle: Path) -> TritonPythonModel:
        model = TritonPythonModel()
        model.initialize(arguments(bundle, {"bundle": str(bundle)}))
        return model

    return load


@pytest.fixture(scope="session")
def model(load, sd15_bundle: Path) -> TritonPythonModel:
    return load(sd15_bundle)


def image(response: InferenceResponse) -> np.ndarray:
    """The one image of an answer, [H, W, 3]."""
    assert not response.has_error(), response.error().message()  # type: ignore[union-attr]
    (pixels,) = tensors(response)["image"]
    return pixels


def tensors(response: InferenceResponse) -> dict[str, np.ndarray]:
    return {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}


def failure(response: InferenceResponse) -> tuple[str, str]:
    error = response.error()
    assert error is not None
    assert response.output_tensors() == []
    return error.code(), error.message()


def generated(model: Model, prompt: str, **call: Any) -> np.ndarray:
    """The pipeline's own image."""
    return np.asarray(model.pipe(prompt, **call).images[0])


def test_answers_are_the_pipelines_images(model: TritonPythonModel) -> None:
    """Prompts, seeds and settings reach the pipeline."""
    requests = [
        InferenceRequest(prompt="a cat", seed=3),
        InferenceRequest(prompt="ein Küken", seed=4, steps=2, eta=0.3, guidance_scale=2.0, negative_prompt="a dog"),
    ]
    first, second = model.execute(requests)
    assert np.array_equal(image(first), generated(model, "a cat", seed=3))
    call = {"num_inference_steps": 2, "eta": 0.3, "guidance_scale": 2.0, "negative_prompt": "a dog"}
    assert np.array_equal(image(second), generated(model, "ein Küken", seed=4, **call))
    assert tensors(first)["image"].dtype == np.uint8
    assert (tensors(first)["image"].shape, tensors(first)["seed"].tolist()) == ((1, 64, 64, 3), [[3]])


def test_float32_inputs_give_the_intended_numbers(model: TritonPythonModel) -> None:
    """0.3 in float32 is another number than 0.3, which the HTTP service would use."""
    inputs = {tensor.name(): tensor.as_numpy() for tensor in InferenceRequest(prompt="x", eta=0.3, steps=2).inputs()}
    (request,) = read_requests("demo", model.pipe.manifest, inputs)
    assert (request.params.eta, request.params.num_inference_steps) == (0.3, 2)


def test_a_missing_seed_is_chosen_and_returned(model: TritonPythonModel) -> None:
    first, second = model.execute([InferenceRequest(prompt="a cat"), InferenceRequest(prompt="a cat")])
    seeds = [int(tensors(response)["seed"][0, 0]) for response in (first, second)]
    assert seeds[0] != seeds[1]
    assert np.array_equal(image(first), generated(model, "a cat", seed=seeds[0]))


def test_a_request_of_several_rows_has_several_images(model: TritonPythonModel) -> None:
    prompts = np.array([[b"a cat"], [b"a dog"]], np.object_)
    (response,) = model.execute([InferenceRequest(prompt=prompts, seed=np.array([[5], [6]], np.int64))])
    images = tensors(response)["image"]
    assert images.shape == (2, 64, 64, 3)
    assert np.array_equal(images[1], generated(model, "a dog", seed=6))
    assert tensors(response)["seed"].tolist() == [[5], [6]]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "steps": ({"prompt": "x", "steps": 700}, "was not distilled for 700 steps"),
    "seed": ({"prompt": "x", "seed": -1}, "seed -1 is out of range"),
    "eta": ({"prompt": "x", "eta": float("nan")}, "eta nan"),
    "width": ({"prompt": "x", "width": 128}, "width 128 is outside"),
    "text": ({"prompt": b"\xff\xfe"}, "prompt is not UTF-8"),
    "control": ({"prompt": "x", "control_scale": 0.5}, "control_scale is about a control image"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_fails_alone(name: str, model: TritonPythonModel) -> None:
    inputs, message = BAD[name]
    good, bad, other = model.execute(
        [InferenceRequest(prompt="a cat", seed=1), InferenceRequest(**inputs), InferenceRequest(prompt="a dog", seed=2)]
    )
    code, words = failure(bad)
    assert code == "INVALID_ARG"
    assert message in words
    assert np.array_equal(image(good), generated(model, "a cat", seed=1))
    assert np.array_equal(image(other), generated(model, "a dog", seed=2))


class Counting:
    """A pipeline whose calls are noted, and that fails where a prompt asks for it."""

    def __init__(self, pipe: Pipeline) -> None:
        self.pipe, self.calls = pipe, []
        self.manifest, self.device, self.decide = pipe.manifest, pipe.device, pipe.decide

    def generate(self, params: Params) -> Any:
        self.calls.append([*params.prompt])
        if "fail" in params.prompt:
            raise EngineError("the engine failed")
        if "break" in params.prompt:
            raise KeyError("a bug")
        return self.pipe.generate(params)


@pytest.fixture
def counting(model: TritonPythonModel, monkeypatch: pytest.MonkeyPatch) -> Counting:
    counting = Counting(model.pipe)
    monkeypatch.setattr(model, "pipe", counting)
    return counting


def test_cancelled_requests_are_not_generated(model: TritonPythonModel, counting: Counting) -> None:
    requests = [InferenceRequest(prompt="a cat", is_cancelled=True), InferenceRequest(prompt="a dog")]
    cancelled, other = model.execute(requests)
    assert failure(cancelled)[0] == "CANCELLED"
    image(other)
    assert counting.calls == [["a dog"]]


@pytest.fixture(scope="session")
def batched(load, batch_of_three_bundle: Path) -> TritonPythonModel:
    return load(batch_of_three_bundle)


def test_requests_share_calls_and_images_do_not_change(batched: TritonPythonModel, monkeypatch) -> None:
    """Four alike are two calls, one with other settings is a third; each image is that of its own request."""
    counting = Counting(batched.pipe)
    asked = [{"prompt": f"a {i}", "seed": i} for i in range(4)]
    requests = [
        InferenceRequest(**inputs) for inputs in [*asked[:2], {"prompt": "b", "seed": 9, "steps": 2}, *asked[2:]]
    ]
    with monkeypatch.context() as patch:
        patch.setattr(batched, "pipe", counting)
        responses = batched.execute(requests)
    assert sorted(counting.calls) == [["a 0", "a 1", "a 2"], ["a 3"], ["b"]]
    alone = [image(batched.execute([request])[0]) for request in requests]
    assert all(np.array_equal(image(one), other) for one, other in zip(responses, alone, strict=True))


@pytest.mark.parametrize(("prompt", "words"), [("fail", "the engine failed"), ("break", "KeyError")])
def test_an_engine_that_fails_fails_one_request(
    prompt: str, words: str, batched: TritonPythonModel, monkeypatch
) -> None:
    """Both share a call, and get one each when it fails."""
    counting = Counting(batched.pipe)
    monkeypatch.setattr(batched, "pipe", counting)
    good, bad = batched.execute([InferenceRequest(prompt="a cat", seed=1), InferenceRequest(prompt=prompt)])
    code, message = failure(bad)
    assert code == "INTERNAL"
    assert words in message
    assert np.array_equal(image(good), np.asarray(counting.pipe("a cat", seed=1).images[0]))
    assert counting.calls == [["a cat", prompt], ["a cat"], [prompt]]


def sketch_of_a_ring() -> Image.Image:
    image = Image.new("RGB", (80, 100), "white")
    ImageDraw.Draw(image).ellipse((10, 20, 60, 70), outline="black", width=6)
    return image


def test_control_images(load, export_controlled) -> None:
    """One for each ControlNet in the bundle's order, an empty one for none; each is preprocessed for its ControlNet."""
    model = load(export_controlled("Hyper-SD15-1step-lora"))
    names = list(model.pipe.manifest.controlnets)
    file = io.BytesIO()
    sketch_of_a_ring().save(file, "PNG")
    files = [file.getvalue() if name == "scribble" else b"" for name in names]
    requests = [
        InferenceRequest(prompt="a ring", seed=1, control_image=files, control_scale=0.5),
        InferenceRequest(prompt="a ring", seed=1, control_image=[b"no image"] * 2),
        InferenceRequest(prompt="a ring", seed=1),
    ]
    followed, bad, plain = model.execute(requests)
    kind = model.pipe.manifest.controlnets["scribble"].preprocess
    control = {"scribble": preprocess(fit(sketch_of_a_ring(), 64, 64), kind)}
    expected = generated(model, "a ring", seed=1, control_image=control, controlnet_conditioning_scale=0.5)
    assert np.array_equal(image(followed), expected)
    assert failure(bad)[0] == "INVALID_ARG"
    assert not np.array_equal(image(plain), image(followed))


@pytest.fixture(scope="session")
def demo(load, demo_bundle: Path) -> TritonPythonModel:
    return load(demo_bundle)


def file_of(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_init_images_and_masks(demo: TritonPythonModel) -> None:
    """Files as for control images, an empty one for none; the settings are the pipeline's, and all steps run."""
    ring, mask = sketch_of_a_ring(), Image.new("L", (80, 100))
    mask.paste(255, (40, 20, 70, 80))
    files = {"image": file_of(ring), "mask_image": file_of(mask)}
    asked: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"image": files["image"]}, {"image": ring, "keep_steps": True}),
        ({"image": files["image"], "strength": 0.3}, {"image": ring, "keep_steps": True, "strength": 0.3}),
        (
            {"image": files["image"], "strength": 0.5, "keep_steps": np.array([[False]])},
            {"image": ring, "strength": 0.5},
        ),
        (files, {"image": ring, "mask_image": mask, "keep_steps": True}),
        (
            {**files, "padding_mask_crop": 4},
            {"image": ring, "mask_image": mask, "keep_steps": True, "padding_mask_crop": 4},
        ),
        ({"image": b"", "mask_image": b""}, {}),
    ]
    responses = demo.execute([InferenceRequest(prompt="a ring", seed=1, steps=4, **inputs) for inputs, _ in asked])
    images = [image(response) for response in responses]
    for got, (_, call) in zip(images, asked, strict=True):
        assert np.array_equal(got, generated(demo, "a ring", seed=1, num_inference_steps=4, **call))
    assert len({got.tobytes() for got in images}) == len(asked)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"image": b"no image"}, "image is not an image"),
        ({"mask_image": b"no image"}, "mask_image is about an init image: expected image with it"),
        ({"strength": 0.5}, "strength is about an init image"),
        ({"image": "ring", "mask_image": b"no image"}, "mask_image is not an image"),
        ({"image": "ring", "strength": 0.0}, "strength 0 would give the image back"),
        ({"image": "ring", "mask_blur": 3}, "mask_blur: expected a mask with it"),
        ({"image": "ring", "strength": 0.1, "keep_steps": np.array([[False]])}, "leaves none"),
    ],
)
def test_bad_init_images_fail_alone(inputs: dict[str, Any], message: str, demo: TritonPythonModel) -> None:
    inputs = {name: file_of(sketch_of_a_ring()) if isinstance(value, str) else value for name, value in inputs.items()}
    bad, good = demo.execute([InferenceRequest(prompt="x", **inputs), InferenceRequest(prompt="a cat", seed=1)])
    assert failure(bad)[0] == "INVALID_ARG"
    assert message in failure(bad)[1]
    assert np.array_equal(image(good), generated(demo, "a cat", seed=1))


def test_the_repositorys_own_file_and_path(sd15_bundle: Path, tmp_path: Path) -> None:
    """model.py as written finds the bundle by the written path, also after both were moved."""
    shutil.copytree(sd15_bundle, tmp_path / "here/bundles/demo")
    written = write_repository(Bundle.load(tmp_path / "here/bundles/demo"), tmp_path / "here/models")
    (tmp_path / "here").rename(tmp_path / "there")
    folder = tmp_path / "there/models" / written.name
    program = (folder / "1/model.py").read_text()
    namespace: dict[str, Any] = {}
    imported = "import triton_python_backend_utils\n"
    assert imported in program
    exec(program.replace(imported, "import triton_stand_in as triton_python_backend_utils\n"), namespace)
    model = namespace["TritonPythonModel"]()
    model.initialize(arguments(folder, {"bundle": "../../bundles/demo", "backend": "auto"}))
    (response,) = model.execute([InferenceRequest(prompt="a cat", seed=1)])
    assert image(response).shape == (64, 64, 3)
    model.finalize()


def test_an_instance_is_loaded_on_its_own_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    loaded = []
    monkeypatch.setattr(triton_model.Pipeline, "load", lambda *args: loaded.append(args))
    monkeypatch.setattr(triton_model, "warm_up", lambda pipe: None)
    for kind, device in (("GPU", "1"), ("CPU", "0")):
        TritonPythonModel().initialize(arguments(tmp_path, {"bundle": "b", "backend": "tensorrt"}, kind, device))
    assert loaded == [(tmp_path / "b", "tensorrt", "cuda:1"), (tmp_path / "b", "tensorrt", "cpu")]


def test_a_configuration_without_a_bundle_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no parameter `bundle`"):
        TritonPythonModel().initialize(arguments(tmp_path, {}))


def test_the_base_install_is_enough() -> None:
    """Triton's container needs neither a web framework nor anything of an export."""
    absent = ("fastapi", "pydantic", "prometheus_client", "starlette", "diffusers", "transformers", "onnx")
    program = f"import sys; sys.modules |= dict.fromkeys({absent!r}); import hypersd.triton_backend.model"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Beside the model's folder, to which the parameter is relative."""
    return tmp_path_factory.mktemp("loras")


@pytest.fixture(scope="module")
def slotted(export_slotted: Callable[[str], Path], loras: Path) -> Iterator[TritonPythonModel]:
    """A bundle with a LoRA slot, and a folder with one LoRA, ``style``."""
    bundle, model = export_slotted("Hyper-SD15-1step-lora"), TritonPythonModel()
    slot = Bundle.load(bundle).manifest.lora_slot
    assert slot is not None
    write_slot_lora(slot, loras / "style.safetensors")
    relative = os.path.relpath(loras, bundle)
    model.initialize(arguments(bundle, {"bundle": str(bundle), "lora_folder": relative}))
    yield model
    model.finalize()


def test_adapters_are_strengths_in_json(slotted: TritonPythonModel, loras: Path) -> None:
    """Each row of a request has its own; a file that comes later is found."""
    prompts, seeds = np.array([[b"a cat"], [b"a cat"]], np.object_), np.array([[3], [3]], np.int64)
    both = np.array([[b'{"style": 0.5}'], [b""]], np.object_)
    (response,) = slotted.execute([InferenceRequest(prompt=prompts, seed=seeds, adapters=both)])
    images = tensors(response)["image"]
    assert np.array_equal(images[0], generated(slotted, "a cat", seed=3, adapters={"style": 0.5}))
    assert np.array_equal(images[1], generated(slotted, "a cat", seed=3))
    assert not np.array_equal(images[0], images[1])
    shutil.copy(loras / "style.safetensors", loras / "later.safetensors")
    request = InferenceRequest(prompt="a cat", seed=3, adapters='{"later": 0.5}')
    wait_until(lambda: not slotted.execute([request])[0].has_error())
    assert np.array_equal(image(slotted.execute([request])[0]), images[0])


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ('{"other": 1}', "adapter 'other' is not loaded: expected some of:"),
        ('{"style": 11}', "adapters 'style' 11"),
        ('{"style": NaN}', "adapters 'style' nan"),
        ('{"style": "1"}', "adapters 'style' '1'"),
        ("[1]", "expected strengths by name in JSON"),
        ("style", "expected strengths by name in JSON"),
        (b"\xff", "adapters is not UTF-8"),
    ],
)
def test_wrong_adapters_fail_alone(adapters: str | bytes, message: str, slotted: TritonPythonModel) -> None:
    bad, good = slotted.execute(
        [InferenceRequest(prompt="a cat", adapters=adapters), InferenceRequest(prompt="a cat", seed=1)]
    )
    code, words = failure(bad)
    assert code == "INVALID_ARG"
    assert message in words
    image(good)


def test_a_folder_of_loras_needs_a_slot(sd15_bundle: Path, tmp_path: Path) -> None:
    for folder, words in ((tmp_path, "no LoRA slot"), (tmp_path / "nothing", "is not there")):
        given = arguments(sd15_bundle, {"bundle": str(sd15_bundle), "lora_folder": str(folder)})
        with pytest.raises(RequestError, match=words):
            TritonPythonModel().initialize(given)
