"""Which engines a bundle is run with: the best that can run here, what was asked for, or a reason."""

from __future__ import annotations

import itertools
import shutil
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from counting import load_engines, null_pipe

from hypersd import Pipeline
from hypersd.engines import Bundle, load
from hypersd.engines.bundle import write_manifest
from hypersd.engines.engine import NullEngine
from hypersd.engines.late_engine import LateEngine
from hypersd.engines.load import Choice, choose
from hypersd.engines.manifest import FileRecord, Manifest
from hypersd.engines.onnx_runtime import OnnxRuntimeEngine
from hypersd.engines.openvino.library import is_installed
from hypersd.engines.specs import Component, EngineTarget
from hypersd.engines.tensorrt.machine import Machine
from hypersd.engines.tensorrt.targets import target_name
from hypersd.errors import BundleError, DeviceError, RequestError

from .made_by_hand import gpu, machine, manifest, refusal, shapes, target, with_plans

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.fixture
def on_machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[Machine], None]:
    """``on_machine(machine)``: a machine with a GPU, which none of ours may have, or another."""
    api = types.SimpleNamespace(why_invalid=lambda plan: None)  # whatever is installed here
    monkeypatch.setattr(load, "load_api", lambda backend: api)

    def use(here: Machine) -> None:
        monkeypatch.setattr(load, "this_machine", lambda device="auto": here)

    return use


def with_targets(manifest: Manifest, root: Path, targets: list[EngineTarget]) -> Bundle:
    """A bundle with targets whose plans are files of one byte: nothing here looks inside."""
    engines = {name: with_plans(t, manifest, f"engines/{name}") for t in targets for name in [target_name(t, manifest)]}
    files = {plan.file: FileRecord(size=1, sha256="0" * 64) for t in engines.values() for plan in t.plans.values()}
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(b"p")
    return Bundle(root, msgspec.structs.replace(manifest, engines=engines, files={**manifest.files, **files}))


# auto


HALVES_ON_CPU = "openvino" if is_installed() else "onnxruntime"  # runs an fp16 bundle on a CPU


def test_without_engines_auto_is_onnx_runtime(sd15_bundle: Path, on_machine: Any) -> None:
    """On any machine, and nothing was passed over."""
    on_machine(machine())
    bundle = Bundle.load(sd15_bundle)
    for device in ("auto", "cpu", "cuda", "cuda:1", torch.device("cpu")):
        expected = Choice(backend="onnxruntime", target=None, manifest=bundle.manifest, passed_over={})
        assert choose(bundle, device=device) == expected


@needs_no_gpu
def test_real_engines_without_a_gpu_are_passed_over_with_the_reason(rtx_bundle: Path) -> None:
    """The bundle still generates images, and reports why not with its engines."""
    bundle = Bundle.load(rtx_bundle)
    choice = choose(bundle)
    assert (choice.backend, choice.target, choice.manifest) == (HALVES_ON_CPU, None, bundle.manifest)
    (name,) = bundle.manifest.engines
    assert choice.passed_over.keys() == {name}
    assert "CUDA" in choice.passed_over[name] or "driver" in choice.passed_over[name]
    engines = {type(engine) for engine in load_engines(bundle, "onnxruntime").values()}
    assert engines == {OnnxRuntimeEngine, LateEngine}
    assert choose(bundle, device="cpu").passed_over == {}, "who asks for the CPU does not ask why"


def test_real_engines_run_on_a_machine_that_fits(rtx_bundle: Path, on_machine: Any) -> None:
    """The same bundle on a machine like this one with a GPU, which is a fake."""
    bundle = Bundle.load(rtx_bundle)
    (name,), (made,) = bundle.manifest.engines, bundle.manifest.engines.values()
    on_machine(machine(versions={made.backend: made.version}, platforms={made.backend: made.platform}))
    for asked in ({}, {"backend": "tensorrt-rtx"}, {"target": name}, {"target": "portable"}, {"device": "cuda:0"}):
        choice = choose(bundle, **asked)
        assert (choice.backend, choice.target, choice.passed_over) == ("tensorrt-rtx", name, {})
        assert choice.manifest == bundle.manifest
    with pytest.raises(RequestError, match="only OpenVINO takes one, not tensorrt"):
        choose(bundle, precision="fp32")
    assert choose(bundle, device="cpu").backend == HALVES_ON_CPU
    assert choose(bundle, device=torch.device("cpu")).backend == HALVES_ON_CPU  # type: ignore[arg-type]


@pytest.mark.parametrize("damage", ["deleted", "shortened", "linked out"])
def test_a_damaged_plan_is_found_before_it_is_loaded(
    damage: str, rtx_bundle: Path, tmp_path: Path, on_machine: Any
) -> None:
    """Asked for it is an error that names the file; otherwise ONNX Runtime runs."""
    root = Path(shutil.copytree(rtx_bundle, tmp_path / "bundle"))
    (made,) = Bundle.load(root).manifest.engines.values()
    plan = root / made.plans["unet"].file
    content = plan.read_bytes()
    plan.unlink()
    if damage == "shortened":
        plan.write_bytes(content[:-1])
    elif damage == "linked out":
        (tmp_path / "elsewhere").write_bytes(content)
        plan.symlink_to(tmp_path / "elsewhere")
    on_machine(machine(versions={made.backend: made.version}, platforms={made.backend: made.platform}))
    bundle = Bundle.load(root)
    message = refusal(DeviceError, lambda: choose(bundle, "tensorrt-rtx"))
    assert "unet.engine is missing or shortened" in message
    assert "hypersd build" in message
    assert choose(bundle).backend == HALVES_ON_CPU


# The best of several

BETTER_AND_WORSE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "static over ranged": ({"shapes": shapes(2, 512, 512)}, {}),
    "usual size over static": ({}, {"shapes": shapes(1, 256, 256)}),
    "usual size over TensorRT": ({}, {"backend": "tensorrt", "shapes": shapes(2, 256, 512)}),
    "TensorRT over RTX": ({"backend": "tensorrt"}, {"shapes": shapes(2, 512, 512)}),
    "capability over portable": ({"compute_capabilities": ("8.9",)}, {}),
    "static over capability": ({"shapes": shapes(2, 512, 512)}, {"compute_capabilities": ("8.9",)}),
    "whole over stripped": ({}, {"stripped": True}),
    "what runs over what does not": ({"stripped": True}, {"compute_capabilities": ("8.6",)}),
}


@pytest.mark.parametrize(("better", "worse"), BETTER_AND_WORSE.values(), ids=BETTER_AND_WORSE)
@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
def test_the_better_target_is_taken(
    better: dict[str, Any], worse: dict[str, Any], guided: bool, on_machine: Any, tmp_path: Path
) -> None:
    """In whatever order they were built, with guidance, whose UNet has two sizes always, and without."""
    on_machine(machine())
    bare = manifest(guided=guided)
    for order in itertools.permutations([target(**better), target(**worse)]):
        choice = choose(with_targets(bare, tmp_path, list(order)))
        assert choice.target == target_name(target(**better), bare)
        assert choice.manifest.shapes == target(**better).shapes


def test_targets_that_are_passed_over_are_told_apart(on_machine: Any, tmp_path: Path) -> None:
    """Each with its own reason, also where another one runs."""
    on_machine(machine())
    bare = manifest()
    old, foreign, good = target(version="1.0"), target(platform="aarch64"), target()
    choice = choose(with_targets(bare, tmp_path, [old, foreign, good]))
    assert choice.target == target_name(good, bare)
    reasons = choice.passed_over
    assert reasons.keys() == {target_name(old, bare), target_name(foreign, bare)}
    assert "built with TensorRT-RTX 1.0" in reasons[target_name(old, bare)]
    assert "built for aarch64" in reasons[target_name(foreign, bare)]


# Targets asked for by name


def test_a_backend_without_engines_says_how_to_build_them(on_machine: Any, tmp_path: Path) -> None:
    """Never silently another backend."""
    on_machine(machine())
    bundle = with_targets(manifest(), tmp_path, [target()])
    message = refusal(BundleError, lambda: choose(bundle, "tensorrt"))
    assert f"hypersd build {tmp_path} --backend tensorrt" in message
    assert choose(bundle, "onnxruntime").target is None


def test_a_backend_that_cannot_run_says_why_of_each_target(on_machine: Any, tmp_path: Path) -> None:
    """Which bundle it was is said, and which target."""
    on_machine(machine(gpu=None, no_gpu="no CUDA device: it is a fake"))
    bundle = with_targets(manifest(), tmp_path, [target(), target(stripped=True)])
    message = refusal(DeviceError, lambda: choose(bundle, "tensorrt-rtx"))
    told = "; ".join(f"{name}: no CUDA device: it is a fake" for name in bundle.manifest.engines)
    assert message == f"{tmp_path} cannot run here: {told}"
    assert "it is a fake" in refusal(DeviceError, lambda: choose(bundle, target="stripped")), "no fall-back"


def test_targets_are_found_by_name_or_by_a_part_of_it(on_machine: Any, tmp_path: Path) -> None:
    """A part that several names hold is rejected with the names, unless it is one of them, whole."""
    on_machine(machine())
    bare = manifest()
    ranged, small, stripped = target(), target(shapes=shapes(1, 256, 256)), target(stripped=True)
    bundle = with_targets(bare, tmp_path, [ranged, small, stripped])
    names = [target_name(t, bare) for t in (ranged, small, stripped)]
    assert choose(bundle, target="w256_").target == names[1]
    assert choose(bundle, target="stripped").target == names[2]
    for name in names:
        assert choose(bundle, target=name).target == name
    for part in ("portable", "w256-512-768", ""):
        message = refusal(RequestError, lambda part=part: choose(bundle, target=part))
        assert "more than one of" in message
        assert all(name in message for name in names)
    message = refusal(RequestError, lambda: choose(bundle, target="sm99"))
    assert "'sm99' is none of" in message
    assert names[0] in message
    assert "none" in refusal(RequestError, lambda: choose(Bundle(tmp_path, bare), target="sm99"))


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_target_for_a_backend_that_has_none_is_rejected(backend: str, on_machine: Any, tmp_path: Path) -> None:
    """It would be ignored."""
    bundle = with_targets(manifest(), tmp_path, [target()])
    assert backend in refusal(RequestError, lambda: choose(bundle, backend, target="portable"))


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "mps"])
def test_tensorrt_on_other_devices_is_rejected(device: Any, on_machine: Any, tmp_path: Path) -> None:
    """Asked for by backend or by target; where the choice is ours it is the other backends' to say what they know."""
    on_machine(machine())
    bundle = with_targets(manifest(), tmp_path, [target()])
    for asked in ({"backend": "tensorrt-rtx"}, {"target": "portable"}):
        message = refusal(RequestError, lambda asked=asked: choose(bundle, device=device, **asked))
        assert str(device) in message
        assert "CUDA" in message
    assert choose(bundle, device=device).backend == ("onnxruntime" if device == "mps" else HALVES_ON_CPU)


@pytest.mark.parametrize("device", ["tpu", "", "cuda:x", None, 2.5])
def test_unknown_devices_are_rejected_with_those_there_are(device: Any, on_machine: Any, tmp_path: Path) -> None:
    """Also where TensorRT would be taken, whose way to the device is another than ONNX Runtime's."""
    on_machine(machine())
    bundle = with_targets(manifest(), tmp_path, [target()])
    message = refusal(RequestError, lambda: choose(bundle, device=device))
    assert repr(device) in message
    assert "expected auto, cpu, cuda or cuda:N" in message


@needs_no_gpu
def test_a_pipeline_with_tensorrt_says_that_there_is_no_gpu(rtx_bundle: Path, sd15_bundle: Path) -> None:
    """The whole way, as a user on a laptop goes it; what the bundle lacks is said as well."""
    message = refusal(DeviceError, lambda: Pipeline.load(rtx_bundle, backend="tensorrt-rtx"))
    assert str(rtx_bundle) in message
    assert "CUDA" in message
    assert "engines: hypersd build" in refusal(BundleError, lambda: Pipeline.load(sd15_bundle, backend="tensorrt-rtx"))


# Engines of the pipeline


def test_a_pipeline_is_as_narrow_as_its_plans(
    sdxl_dynamic_bundle: Path, tmp_path: Path, on_machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A size that the bundle has and the plan has not is rejected with both, not handed to an engine.

    The engines are fakes: a plan runs on a GPU alone.
    """
    on_machine(machine())
    given: list[Mapping[str, Component]] = []

    def load_target(bundle: Bundle, name: str, components: Mapping[str, Component], *_: Any) -> dict[str, NullEngine]:
        given.append(components)
        return {name: NullEngine(name, component) for name, component in components.items()}

    monkeypatch.setattr("hypersd.engines.tensorrt.target_loader.load_target", load_target)
    root = Path(shutil.copytree(sdxl_dynamic_bundle, tmp_path / "bundle"))
    part = target(shapes=shapes(1, (64, 64, 72), 64))
    bundle = with_targets(Bundle.load(root).manifest, root, [part])
    write_manifest(root, bundle.manifest)
    pipe = Pipeline.load(root)
    assert pipe.choice is not None
    assert pipe.choice.target == target_name(part, bundle.manifest)
    assert pipe.manifest.shapes == part.shapes
    assert given[0]["vae_decoder"].outputs["sample"].shape[0] == 1
    images = pipe("a cat", num_inference_steps=8, height=72, output_type="latent").images
    assert images.shape == (1, 4, 9, 8)
    message = refusal(RequestError, lambda: pipe("a cat", height=104))
    assert "height 104 is outside" in message
    assert "64..72" in message
    assert "width 96" in refusal(RequestError, lambda: pipe("a cat", width=96))
    assert null_pipe(root)("a cat", num_inference_steps=8, height=104, width=96).images


def test_a_target_that_was_renamed_is_not_believed(on_machine: Any, tmp_path: Path) -> None:
    """A target's fields are in its name: somebody changed one of the two."""
    on_machine(machine())
    bundle = with_targets(manifest(), tmp_path, [target()])
    ((name, made),) = bundle.manifest.engines.items()
    other = msgspec.structs.replace(made, compute_capabilities=("8.9",))
    bundle = Bundle(tmp_path, msgspec.structs.replace(bundle.manifest, engines={name: other}))
    assert "changed by hand" in choose(bundle).passed_over[name]


def test_tensorrt_is_asked_whether_it_supports_the_gpu(
    on_machine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU that fits by our rules, and that TensorRT does not support, is no reason to fail: ONNX Runtime runs."""
    on_machine(machine(gpu=gpu(name="NVIDIA H100", compute_capability="9.0")))
    api = types.SimpleNamespace(why_invalid=lambda plan: "UNSUPPORTED_CC")
    monkeypatch.setattr(load, "load_api", lambda backend: api)
    bundle = with_targets(manifest(), tmp_path, [target()])
    choice = choose(bundle)
    assert choice.backend == HALVES_ON_CPU
    assert list(choice.passed_over.values()) == ["text_encoder: TensorRT says UNSUPPORTED_CC of NVIDIA H100"]
