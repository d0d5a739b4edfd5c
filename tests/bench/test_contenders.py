"""The contenders themselves, in this process: they draw hypersd's picture, and every second has a stage."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hypersd.bench.contenders import CONTENDERS, find_contender
from hypersd.bench.contenders import diffusers as diffusers_contender
from hypersd.bench.contenders import hypersd as hypersd_contender
from hypersd.bench.drawing import Drawn, Settings
from hypersd.bench.options import BenchOptions
from hypersd.bench.pictures import make_requests, picture
from hypersd.bench.sameness import compare_pictures
from hypersd.engines import Bundle
from hypersd.errors import RequestError


def settings_of(bundle: Path, **options: Any) -> Settings:
    """The first picture of a bundle."""
    return picture(make_requests(Bundle.load(bundle).manifest, BenchOptions(**options))[0], 5, 0)


def ours(bundle: Path, settings: Settings) -> Drawn:
    drawer = hypersd_contender.Drawer(str(bundle))
    drawer.load()
    return drawer.draw(settings)


@pytest.fixture
def diffusers_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts diffusers' noise back that a contender exchanged in its process, which here is that of all tests."""
    import inspect

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
def test_diffusers_draws_the_same_picture(name: str, export_tiny: Callable[[str], Path]) -> None:
    """In float32 level for level but for rounding, in bfloat16 close by."""
    bundle = export_tiny(name)
    settings = settings_of(bundle)
    expected = ours(bundle, settings)
    for precision, verdicts in (("bundle", {"same"}), ("bf16", {"same", "close"})):
        drawer = diffusers_contender.Drawer(str(bundle), "cpu", precision, "eager")
        facts = drawer.load()
        assert facts.precision == {"bundle": "fp32", "bf16": "bf16"}[precision]
        drawn = drawer.draw(settings)
        assert compare_pictures(expected.pixels, drawn.pixels, {"fp32", facts.precision}).verdict in verdicts


@pytest.mark.usefixtures("diffusers_noise")
def test_noise_is_that_of_the_bundles_precision(sdxl_dynamic_bundle: Path) -> None:
    """A seed is other noise in float16 than in float32: diffusers, in float32 on a CPU, starts from float16 noise."""
    settings = settings_of(sdxl_dynamic_bundle)
    drawer = diffusers_contender.Drawer(str(sdxl_dynamic_bundle), "cpu", "bundle", "eager")
    assert drawer.load().precision == "fp32"
    theirs, expected = drawer.draw(settings), ours(sdxl_dynamic_bundle, settings)
    assert compare_pictures(expected.pixels, theirs.pixels, {"fp16", "fp32"}).verdict == "same"


@pytest.mark.usefixtures("diffusers_noise")
def test_all_contenders_have_the_same_stages(export_tiny: Callable[[str], Path]) -> None:
    """Names are shared, each step has its own, all add up to no more than the whole, and each picture has its own."""
    bundle = export_tiny("Hyper-SD15-1step-lora")
    settings = settings_of(bundle, steps=[3])
    drawer = diffusers_contender.Drawer(str(bundle), "cpu", "bundle", "eager")
    drawer.load()
    drawer.draw(settings)
    for drawn in (ours(bundle, settings), drawer.draw(settings)):
        steps = {"step 1", "step 2", "step 3"}
        assert set(drawn.stages) == {"tokens", "text encoders", *steps, "decode", "conversion"}
        assert all(seconds > 0 for seconds in drawn.stages.values())
        assert sum(drawn.stages.values()) <= drawn.seconds
        assert drawn.pixels.dtype == np.uint8
        assert drawn.pixels.shape == (64, 64, 3)


@pytest.mark.usefixtures("diffusers_noise")
def test_compiled_means_the_unet_and_the_decoder(sd15_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both go through torch.compile and nothing else does; the compiler itself is torch's to test."""
    compiled = []

    def remember(function: Any, **_: Any) -> Any:
        compiled.append(getattr(function, "__name__", type(function).__name__))
        return function

    monkeypatch.setattr(torch, "compile", remember)
    drawer = diffusers_contender.Drawer(str(sd15_bundle), "cpu", "bf16", "compiled")
    assert drawer.load().how == "compiled, channels_last"
    assert compiled == ["UNet2DConditionModel", "decode"]
    assert drawer.draw(settings_of(sd15_bundle)).stages["step 1"] > 0


def test_a_compiled_contender_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without one the reason is told and not found out after minutes."""
    from hypersd.bench.contenders import Context

    monkeypatch.setattr("shutil.which", lambda name: None)
    context = Context(None, "cpu", Path())  # pyright: ignore[reportArgumentType]
    assert "install g++" in (find_contender("diffusers-compiled").why_not_here(context, False) or "")
    assert find_contender("diffusers").why_not_here(context, False) is None


def test_an_unknown_contender_is_refused_with_all_names() -> None:
    """A misspelt name is answered with those that there are."""
    with pytest.raises(RequestError, match=r"hypersd, .*optimum") as error:
        find_contender("difusers")
    assert "\n" not in str(error.value)


def test_contenders_are_told_apart() -> None:
    """No name twice; every module that can be imported here has the class that the worker asks for."""
    names = [contender.name for contender in CONTENDERS]
    assert len(set(names)) == len(names)
    for module in {contender.module for contender in CONTENDERS} - {"hypersd.bench.contenders.optimum"}:
        assert hasattr(importlib.import_module(module), "Drawer")
