"""The contenders in this process: they generate hypersd's image, and every second has a stage."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hypersd.engines import Bundle
from hypersd.errors import DeviceError, RequestError
from hypersd.runtime.params import Params
from hypersd.tools.bench import diffusers_contender, hypersd_contender
from hypersd.tools.bench.contender import Context
from hypersd.tools.bench.contenders import CONTENDERS, find_contender
from hypersd.tools.bench.figures import compare_images
from hypersd.tools.bench.protocol import Settings, TimedImage, resolve_device
from hypersd.tools.bench.session import BenchOptions, image, make_requests
from hypersd.tools.bench.timed_pipeline import StageClock, TimedPipeline
from hypersd.tools.one_graph import add_one_graph
from hypersd.tools.reference import find_reference_sources, load_pipeline


def settings_of(bundle: Path, **options: Any) -> Settings:
    """The first image of a bundle."""
    return image(make_requests(Bundle.load(bundle).manifest, BenchOptions(**options))[0], 5, 0)


def ours(bundle: Path, settings: Settings) -> TimedImage:
    runner = hypersd_contender.Runner(str(bundle))
    runner.load()
    return runner.generate(settings)


@pytest.fixture
def diffusers_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts diffusers' noise back that a contender exchanged in its process, which here is that of all tests."""
    from diffusers import (
        DDIMScheduler,
        LCMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        TCDScheduler,
    )

    schedulers = [kind.step for kind in (DDIMScheduler, TCDScheduler, LCMScheduler)]
    for function in (StableDiffusionPipeline.prepare_latents, StableDiffusionXLPipeline.prepare_latents, *schedulers):
        names = inspect.unwrap(function).__globals__
        monkeypatch.setitem(names, "randn_tensor", names["randn_tensor"])


@pytest.mark.usefixtures("diffusers_noise")
@pytest.mark.parametrize("name", ["Hyper-SD15-1step-lora", "Hyper-SDXL-1step-lora", "Hyper-SDXL-1step-Unet"])
def test_diffusers_generates_the_same_image(name: str, export_tiny: Callable[[str], Path]) -> None:
    """In float32 level for level but for rounding, in bfloat16 close by."""
    bundle = export_tiny(name)
    settings = settings_of(bundle)
    expected = ours(bundle, settings)
    for precision, verdicts in (("bundle", {"same"}), ("bf16", {"same", "close"})):
        runner = diffusers_contender.Runner(str(bundle), "cpu", precision, "eager")
        facts = runner.load()
        assert facts.precision == {"bundle": "fp32", "bf16": "bf16"}[precision]
        made = runner.generate(settings)
        assert compare_images(expected.pixels, made.pixels, {"fp32", facts.precision}).verdict in verdicts


@pytest.mark.usefixtures("diffusers_noise")
def test_noise_is_that_of_the_bundles_precision(sd15_bundle: Path) -> None:
    """A seed is other noise in float16 than in float32: what is computed in float32 starts from the bundle's too."""
    manifest = Bundle.load(sd15_bundle).manifest
    pipe = load_pipeline(manifest, find_reference_sources(manifest))
    TimedPipeline(pipe, torch.device("cpu"), torch.float16)
    shape, expected = (1, 4, 8, 8), torch.randn(1, 4, 8, 8, generator=torch.manual_seed(5), dtype=torch.float16)
    for function in (
        type(pipe).prepare_latents,
        type(pipe.scheduler).step,
    ):  # first noise, steps
        draw = inspect.unwrap(function).__globals__["randn_tensor"]
        noise = draw(shape, generator=torch.manual_seed(5), device=torch.device("cpu"), dtype=torch.float32)
        assert noise.dtype == torch.float32
        assert torch.equal(noise, expected.float())


@pytest.mark.usefixtures("diffusers_noise")
def test_all_contenders_have_the_same_stages(export_tiny: Callable[[str], Path]) -> None:
    """Names are shared, each step has its own, all add up to no more than the whole, and each image has its own."""
    bundle = export_tiny("Hyper-SD15-1step-lora")
    settings = settings_of(bundle, steps=[3])
    runner = diffusers_contender.Runner(str(bundle), "cpu", "bundle", "eager")
    runner.load()
    runner.generate(settings)
    for made in (ours(bundle, settings), runner.generate(settings)):
        steps = {"step 1", "step 2", "step 3"}
        assert set(made.stages) == {"tokens", "text encoders", *steps, "decode", "conversion"}
        assert all(seconds > 0 for seconds in made.stages.values())
        assert sum(made.stages.values()) <= made.seconds
        assert made.pixels.dtype == np.uint8
        assert made.pixels.shape == (64, 64, 3)


class EventStandIn:
    """A CUDA event of a device that takes a millisecond from each to the next."""

    recorded = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: object) -> None:
        EventStandIn.recorded += 1
        self.milliseconds = EventStandIn.recorded

    def elapsed_time(self, later: EventStandIn) -> float:
        return float(later.milliseconds - self.milliseconds)


def test_a_rival_on_a_gpu_is_not_waited_for_between_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """hypersd's stages are not either: a wait after each would cost the rival the overlap of host and device."""
    device, waits = torch.device("cuda:0"), []
    monkeypatch.setattr(torch.cuda, "Event", EventStandIn)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    clock = StageClock(device)
    with clock.stage("text encoders"):
        pass
    for _ in range(2):
        with clock.step_begins():
            pass
        with clock.step_ends():
            pass
    with clock.stage("decode"):
        pass
    assert not waits
    assert clock.stages() == dict.fromkeys(["text encoders", "step 1", "step 2", "decode"], 0.001)
    assert waits == [device]


def test_devices_that_a_rival_cannot_use_are_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """As hypersd tells them: torch's own words would come after minutes, from the first kernel on the device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda", 0)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(DeviceError, match=r"^no CUDA device 7: this machine has 2, counted from 0$"):
        resolve_device("cuda:7")
    with pytest.raises(RequestError, match=r"^device 'gpu' is not known: expected auto, cpu, cuda or cuda:N$"):
        resolve_device("gpu")


@pytest.mark.usefixtures("diffusers_noise")
def test_compiled_means_the_unet_and_the_decoder(sd15_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both go through torch.compile and nothing else does; the compiler itself is torch's to test."""
    compiled = []

    def remember(function: Any, **_: Any) -> Any:
        compiled.append(getattr(function, "__name__", type(function).__name__))
        return function

    monkeypatch.setattr(torch, "compile", remember)
    runner = diffusers_contender.Runner(str(sd15_bundle), "cpu", "bf16", "compiled")
    assert runner.load().how == "compiled, channels_last"
    assert compiled == ["UNet2DConditionModel", "decode"]
    assert runner.generate(settings_of(sd15_bundle)).stages["step 1"] > 0


def test_a_compiled_contender_needs_a_compiler(monkeypatch: pytest.MonkeyPatch, sd15_bundle: Path) -> None:
    """On a machine without one the reason is told and not found out after minutes."""
    monkeypatch.setattr("shutil.which", lambda name: None)
    context = Context(Bundle.load(sd15_bundle), "cpu", Path())
    assert "install g++" in (find_contender("diffusers-compiled").why_not_here(context, False) or "")
    assert find_contender("diffusers").why_not_here(context, False) is None


def test_a_base_for_inpainting_is_timed_alone(export_inpainting: Callable[[str], Path]) -> None:
    """The others' UNets would get latents alone."""
    context = Context(Bundle.load(export_inpainting("Hyper-SD15-1step-lora")), "cpu", Path())
    assert find_contender("hypersd").why_not(context) is None
    for name in ("diffusers", "diffusers-compiled", "optimum", "openvino-genai", "optimum-intel"):
        assert "for inpainting" in (find_contender(name).why_not(context) or "")


def test_an_unknown_contender_is_rejected_with_all_names() -> None:
    """A misspelt name is answered with those that there are."""
    with pytest.raises(RequestError, match=r"hypersd, .*optimum, openvino-genai, optimum-intel") as error:
        find_contender("difusers")
    assert "\n" not in str(error.value)


def test_contenders_are_told_apart() -> None:
    """No name twice; every module that can be imported here has the class that the worker asks for."""
    names = [contender.name for contender in CONTENDERS]
    assert len(set(names)) == len(names)
    elsewhere = {f"hypersd.tools.bench.{name}_contender" for name in ("optimum", "optimum_intel", "openvino_genai")}
    for module in {contender.module for contender in CONTENDERS} - elsewhere:
        assert hasattr(importlib.import_module(module), "Runner")


def test_a_one_graph_has_its_own_steps(sd15_bundle: Path, copy_bundle: Callable[..., Bundle], tmp_path: Path) -> None:
    """The same image from another graph for each number of steps; a bundle without one is told what to do."""
    contender = find_contender("hypersd-one-graph")
    why = contender.why_not_here(Context(Bundle.load(sd15_bundle), "cpu", tmp_path), has_own_python=False)
    assert why is not None
    assert "--one-graph" in why
    root = copy_bundle(sd15_bundle).root
    for steps in (1, 2):
        bundle = add_one_graph(root, Params(prompt="", num_inference_steps=steps))
    assert contender.why_not_here(Context(bundle, "cpu", tmp_path), has_own_python=False) is None
    runner = hypersd_contender.Runner(str(root), True, device="cpu")
    runner.load()
    for steps in (1, 2, 1):
        settings = settings_of(root, steps=(steps,))
        made = runner.generate(settings)
        assert compare_images(ours(root, settings).pixels, made.pixels, {"fp32"}).verdict == "same"
        assert sum(made.stages.values()) <= made.seconds
    with pytest.raises(RequestError, match="no one-graph of this bundle fits"):
        runner.generate(settings_of(root, steps=(4,)))
