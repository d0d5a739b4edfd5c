"""A plan is checked before it is recorded: it is one, it is this network's, and it computes what the ONNX computes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from hypersd.engines import Bundle, Engine
from hypersd.engines.compare import TOLERANCES, differences
from hypersd.engines.engine import NullEngine
from hypersd.engines.onnx_runtime import OnnxRuntimeEngine, PlainEngine
from hypersd.engines.specs import Component, Range, TensorSpec
from hypersd.engines.tensorrt.api import TensorRTApi, load_api
from hypersd.engines.tensorrt.machine import this_machine
from hypersd.engines.tensorrt.validate import _check_file, compare_engines, validate_plan
from hypersd.errors import EngineError

from .made_by_hand import gpu, machine

CPU = torch.device("cpu")


def refusal(check: Callable[[], object]) -> str:
    with pytest.raises(EngineError) as caught:
        check()
    message = str(caught.value)
    assert "\n" not in message
    return message


# The file


@pytest.fixture(scope="module")
def api() -> TensorRTApi:
    return load_api("tensorrt-rtx")


@pytest.fixture(scope="module")
def plans(rtx_bundle: Path) -> dict[str, Path]:
    """The real plans, by network."""
    bundle = Bundle.load(rtx_bundle)
    (target,) = bundle.manifest.engines.values()
    return {name: bundle.path(plan.file) for name, plan in target.plans.items()}


def test_real_plans_pass(api: TensorRTApi, rtx_bundle: Path, plans: dict[str, Path]) -> None:
    """Without a GPU that is all there is to see, and there is no error to record."""
    bundle = Bundle.load(rtx_bundle)
    (target,) = bundle.manifest.engines.values()
    for name, plan in plans.items():
        specs = bundle.component(name)
        _check_file(api, plan, specs)
        error = validate_plan(api, this_machine(), bundle, name, specs, target, plan)
        assert (error is None) == (this_machine().gpu is None)


def test_plans_for_other_gpus_are_not_run_on_this_one(
    api: TensorRTApi, rtx_bundle: Path, plans: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built on a machine with a GPU, which is a fake, for others: nothing is loaded here, and they are recorded."""
    bundle = Bundle.load(rtx_bundle)
    (target,) = bundle.manifest.engines.values()
    specs, plan = bundle.component("unet"), plans["unet"]
    versions = {target.backend: target.version}
    named = msgspec.structs.replace(target, compute_capabilities=("12.0",))
    assert validate_plan(api, machine(versions=versions), bundle, "unet", specs, named, plan) is None
    old = machine(versions=versions, gpu=gpu(compute_capability="7.5"))
    assert validate_plan(api, old, bundle, "unet", specs, target, plan) is None
    monkeypatch.setattr(TensorRTApi, "invalidity", lambda *_: "UNSUPPORTED_CC")
    unknown = machine(versions=versions, gpu=gpu(compute_capability="9.0"))
    assert validate_plan(api, unknown, bundle, "unet", specs, target, plan) is None


def test_plans_of_other_networks_are_rejected_by_their_tensors(
    api: TensorRTApi, rtx_bundle: Path, plans: dict[str, Path]
) -> None:
    """Every plan under the name of every other network: the message names what the plan has not got."""
    components = Bundle.load(rtx_bundle).manifest.components
    absent = {"text_encoder": "input_ids", "vae_decoder": "latent_sample", "unet": "encoder_hidden_states"}
    absent["vae_encoder"] = "latent_parameters"
    for name, plan in plans.items():
        for other in components.keys() - {name}:
            message = refusal(lambda plan=plan, other=other: _check_file(api, plan, components[other]))
            assert str(plan) in message
            assert absent[other] in message


@pytest.mark.parametrize("content", [b"", b"x", b"garbage" * 10_000, b"ptrt" + bytes(1000)], ids=lambda c: str(len(c)))
def test_garbage_is_rejected(content: bytes, api: TensorRTApi, rtx_bundle: Path, tmp_path: Path) -> None:
    """A failed build may leave an empty file, too little for a header, or no plan."""
    (tmp_path / "unet.engine").write_bytes(content)
    unet = Bundle.load(rtx_bundle).component("unet")
    assert "unet.engine" in refusal(lambda: _check_file(api, tmp_path / "unet.engine", unet))


def test_a_file_of_another_kind_is_rejected(api: TensorRTApi, rtx_bundle: Path) -> None:
    """The ONNX has all the names, and still is no plan."""
    bundle = Bundle.load(rtx_bundle)
    unet = bundle.component("unet")
    assert "does not know" in refusal(lambda: _check_file(api, bundle.path(unet.onnx), unet))


# The numbers


def test_a_validated_plan_leaves_the_gpu_empty(
    api: TensorRTApi, rtx_bundle: Path, plans: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next component's kernels are timed there. The engine and the GPU are stand-ins, without an error."""
    bundle, name = Bundle.load(rtx_bundle), "text_encoder"
    (target,) = bundle.manifest.engines.values()
    specs, engines, alive = bundle.component(name), [], []

    def load(api: TensorRTApi, name: str, plan: Path, component: Component, *_: Any, **__: Any) -> PlainEngine:
        engine = PlainEngine(bundle.path(component.onnx), component)
        engines.append(weakref.ref(engine))
        return engine

    monkeypatch.setattr("hypersd.engines.tensorrt.tensorrt_engine.TensorRTEngine", load)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append(engines[0]()))
    here = machine(versions={target.backend: target.version}, platforms={target.backend: target.platform})
    assert validate_plan(api, here, bundle, name, specs, target, plans[name]) == 0.0
    assert alive == [None]


@pytest.fixture
def encoder(rtx_bundle: Path) -> OnnxRuntimeEngine:
    bundle = Bundle.load(rtx_bundle)
    component = bundle.component("text_encoder")
    return OnnxRuntimeEngine("text_encoder", bundle.path(component.onnx), component, CPU)


def test_engines_of_one_graph_do_not_differ(encoder: OnnxRuntimeEngine, rtx_bundle: Path) -> None:
    """Every network against what plans are measured by: the graph as it is, nothing fused."""
    bundle = Bundle.load(rtx_bundle)
    for name, component in bundle.manifest.components.items():
        path = bundle.path(component.onnx)
        engine = OnnxRuntimeEngine(name, path, component, CPU)
        assert compare_engines(name, engine, PlainEngine(path, component)) <= 2e-3  # rounded at other places, in fp16
    assert compare_engines("text_encoder", encoder, encoder) == 0.0


def test_other_weights_show(encoder: OnnxRuntimeEngine, rtx_bundle: Path, tmp_path: Path) -> None:
    """The same graph with weights a tenth larger is rejected, with output, error and what is allowed."""
    model = onnx.load(rtx_bundle / "text_encoder/model.onnx")
    for weight in model.graph.initializer:
        if weight.data_type == onnx.TensorProto.FLOAT16 and len(weight.dims) == 2:
            larger = onnx.numpy_helper.to_array(weight) * np.float16(1.1)
            weight.CopyFrom(onnx.numpy_helper.from_array(larger, weight.name))
    onnx.save(model, tmp_path / "model.onnx")
    component = Bundle.load(rtx_bundle).component("text_encoder")
    other = OnnxRuntimeEngine("text_encoder", tmp_path / "model.onnx", component, CPU)
    message = refusal(lambda: compare_engines("text_encoder", other, encoder))
    assert "text_encoder: output hidden_states at [[1, 77]]" in message
    assert "allowed are 2e-02 and 5e-03" in message


class Broken:
    """An engine whose outputs are spoilt on the way out: a fake of a plan that was compiled wrong."""

    def __init__(self, engine: Engine, spoil: Callable[[Tensor], Tensor]) -> None:
        self.engine, self.spoil = engine, spoil
        self.inputs, self.outputs, self.device = engine.inputs, engine.outputs, engine.device
        self.capturable = False

    def run(self, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {name: self.spoil(tensor.clone()) for name, tensor in self.engine.run(feeds).items()}


def one_nan(tensor: Tensor) -> Tensor:
    tensor.flatten()[7] = float("nan")
    return tensor


@pytest.mark.parametrize(
    "spoil",
    [
        one_nan,
        lambda tensor: tensor / 0,
        lambda tensor: tensor * 0,
        lambda tensor: tensor.flip(-1),
        lambda tensor: tensor + 0.01 * tensor.abs().max(),  # small everywhere: the mean shows it
    ],
    ids=["one nan", "infinite", "zero", "mixed up", "biased"],
)
def test_spoilt_numbers_are_rejected(spoil: Callable[[Tensor], Tensor], encoder: OnnxRuntimeEngine) -> None:
    """NaN compares as neither larger nor smaller, on either side: it must not pass for small."""
    assert "hidden_states" in refusal(lambda: compare_engines("net", Broken(encoder, spoil), encoder))
    assert "hidden_states" in refusal(lambda: compare_engines("net", encoder, Broken(encoder, spoil)))


def test_the_worst_error_is_returned(encoder: OnnxRuntimeEngine) -> None:
    """The manifest records the largest error relative to the largest value."""

    def nudge(tensor: Tensor) -> Tensor:
        flat = tensor.flatten()
        flat[flat.abs().argmax()] *= 1.01
        return tensor

    assert compare_engines("net", Broken(encoder, nudge), encoder) == pytest.approx(0.01, rel=0.1)


def test_both_ends_of_every_range_are_run() -> None:
    """A plan with a profile may be right at one end alone; a static one is run once.

    No two ranges are largest at once: the memory of attention grows with the product.
    """
    seen: list[tuple[int, ...]] = []

    class Watched(NullEngine):
        def run(self, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            seen.append(tuple(feeds["sample"].shape))
            return super().run(feeds)

    rows, side = Range(name="batch", min=1, opt=2, max=4), Range(name="latent_width", min=8, opt=10, max=13)
    spec = TensorSpec(dtype="float32", shape=(rows, side, side.halved(2)))
    component = Component(inputs={"sample": spec}, outputs={"out": spec}, files=("x",), key="0" * 64)
    compare_engines("net", Watched("net", component), NullEngine("net", component))
    assert seen == [(1, 8, 2), (4, 10, 3), (2, 13, 4)]
    seen.clear()
    fixed = TensorSpec(dtype="float32", shape=(2, 4, 8))
    component = msgspec.structs.replace(component, inputs={"sample": fixed}, outputs={"out": fixed})
    compare_engines("net", Watched("net", component), NullEngine("net", component))
    assert seen == [(2, 4, 8)]


def test_differences_are_relative_to_the_reference() -> None:
    """Scaled alike, they stay the same; an output that is zero everywhere divides by nothing."""
    reference = np.linspace(-4, 2, 100, dtype=np.float32)
    actual = reference + np.float32(0.04)
    largest, rms = differences(actual, reference)
    assert largest == pytest.approx(0.01, rel=1e-3)
    assert rms == pytest.approx(0.04 / np.sqrt(np.mean(reference**2)), rel=1e-3)
    assert differences(1000 * actual, 1000 * reference) == pytest.approx((largest, rms), rel=1e-3)
    zeros = np.zeros(3, np.float16)
    assert differences(zeros, zeros) == (0.0, 0.0)
    assert differences(zeros + 1, zeros)[0] > max(TOLERANCES["float16"])
