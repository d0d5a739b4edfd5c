"""OpenVINO GenAI and optimum-intel read a bundle through a folder of configurations and converted graphs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hypersd.engines import Bundle
from hypersd.engines.manifest import ControlNetSettings
from hypersd.engines.progress import Silent
from hypersd.errors import HyperSDError
from hypersd.samplers import make_sampler
from hypersd.samplers.schedule import alphas_cumprod
from hypersd.tools.bench.contender import Context
from hypersd.tools.bench.contenders import find_contender
from hypersd.tools.bench.entrant import write_noise
from hypersd.tools.bench.openvino_folder import write_openvino_folder
from hypersd.tools.bench.session import BenchOptions, image, make_requests, run_bench

RIVALS = ("openvino-genai", "optimum-intel")
CHECKPOINTS = ["Hyper-SD15-1step-lora", "Hyper-SDXL-1step-lora", "Hyper-SD15-2steps-lora", "Hyper-SDXL-1step-Unet"]


@pytest.fixture(params=CHECKPOINTS)
def bundle(request: pytest.FixtureRequest, export_tiny: Callable[[str], Path]) -> Bundle:
    return Bundle.load(export_tiny(request.param))


def context_of(bundle: Bundle, folder: Path = Path(), **options: Any) -> Context:
    """That of a contender right before its start."""
    first = image(make_requests(bundle.manifest, BenchOptions(**options))[0], 5, 0)
    return Context(bundle, "cpu", folder, first)


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def written(bundle: Bundle, folder: Path, for_genai: bool) -> Path:
    folder.mkdir()
    write_openvino_folder(bundle, folder, for_genai)
    return folder


def test_genai_gets_a_scheduler_that_it_has(bundle: Bundle, tmp_path: Path) -> None:
    """optimum-intel has the sampler's own."""
    own = {"ddim": "DDIMScheduler", "tcd": "TCDScheduler", "lcm": "LCMScheduler"}[bundle.manifest.sampler.kind]
    genai = read(written(bundle, tmp_path / "genai", True) / "scheduler/scheduler_config.json")
    intel = read(written(bundle, tmp_path / "intel", False) / "scheduler/scheduler_config.json")
    assert intel["_class_name"] == own
    assert genai["_class_name"] == ("DDIMScheduler" if own == "TCDScheduler" else own)
    assert genai["beta_schedule"] == bundle.manifest.scheduler["beta_schedule"]


def test_one_step_of_tcd_is_one_of_ddim(export_tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """diffusers' DDIM with GenAI's configuration takes the step of diffusers' TCD with the bundle's."""
    from diffusers import DDIMScheduler, TCDScheduler

    bundle = Bundle.load(export_tiny("Hyper-SD15-1step-lora"))
    folder = written(bundle, tmp_path / "genai", True)
    ddim, tcd = DDIMScheduler.from_pretrained(str(folder / "scheduler")), TCDScheduler(**bundle.manifest.scheduler)
    latents, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.manual_seed(1))
    made = []
    for scheduler in (ddim, tcd):
        scheduler.set_timesteps(1)
        assert scheduler.timesteps.tolist() == [999]
        made.append(scheduler.step(noise, 999, latents, return_dict=False)[0])
    assert torch.allclose(*made, atol=1e-4)


def test_a_custom_timestep_is_the_only_one_of_a_shorter_schedule(
    export_tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """GenAI's LCM takes as many timesteps as ``original_inference_steps``, evenly up to ``num_train_timesteps``."""
    bundle = Bundle.load(export_tiny("Hyper-SDXL-1step-Unet"))
    config = read(written(bundle, tmp_path / "genai", True) / "scheduler/scheduler_config.json")
    last = config["num_train_timesteps"] // config["original_inference_steps"] - 1
    assert bundle.manifest.sampler.timesteps == (last,)
    bars = np.cumprod(1 - np.array(config["trained_betas"]))
    expected = alphas_cumprod(make_sampler("lcm", **bundle.manifest.scheduler).config)
    assert bars == pytest.approx(expected.numpy(), 1e-4)


def test_noise_is_that_of_the_bundles_pipeline(bundle: Bundle, tmp_path: Path) -> None:
    """The latents and a draw for every step, one after another from one generator."""
    settings = context_of(bundle).image
    assert settings is not None
    noise = np.load(write_noise(bundle.manifest, settings, tmp_path / "noise.npy").noise or "")
    steps = settings.num_inference_steps or 1
    generator = torch.Generator().manual_seed(5)
    expected = [torch.randn(1, 4, 8, 8, generator=generator) for _ in range(1 + steps)]
    assert np.array_equal(noise, torch.stack(expected).numpy())
    assert noise.dtype == np.float32


@pytest.mark.parametrize("name", RIVALS)
def test_bundles_that_they_cannot_run(name: str, sd15_bundle: Path) -> None:
    """Other inputs of the UNet and other devices are rejected with the reason."""
    rival, canny = find_contender(name), {"canny": ControlNetSettings()}
    sampler, shapes = SimpleNamespace(guidance_scale=0.0, timesteps=None), None
    controlled: Any = SimpleNamespace(
        manifest=SimpleNamespace(controlnets=canny, lora_slot=None, sampler=sampler, shapes=shapes)
    )
    assert "ControlNets" in (rival.why_not(Context(controlled, "cpu", Path())) or "")
    slotted: Any = SimpleNamespace(
        manifest=SimpleNamespace(controlnets={}, lora_slot="a slot", sampler=sampler, shapes=shapes)
    )
    assert "LoRAs" in (rival.why_not(Context(slotted, "cpu", Path())) or "")
    bundle = Bundle.load(sd15_bundle)
    assert "--device is cuda" in (rival.why_not(Context(bundle, "cuda", Path())) or "")
    assert rival.why_not(Context(bundle, "auto", Path())) is None


def test_genai_has_no_eta(export_tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Its DDIM would ignore it."""
    bundle = Bundle.load(export_tiny("Hyper-SD15-2steps-lora"))
    with pytest.raises(HyperSDError, match=r"--eta 0.5: the DDIM of OpenVINO GenAI has no eta, expected 0"):
        find_contender("openvino-genai").options(context_of(bundle, tmp_path, eta=0.5))


def test_models_have_the_types_and_outputs_of_openvinos_exports(sdxl_mixed_bundle: Path, tmp_path: Path) -> None:
    """float32 outside, whole timesteps, weights in float16, hidden states as the second output of a text encoder."""
    ov = pytest.importorskip("openvino")
    from hypersd.tools.bench.openvino_models import prepare

    folder = written(Bundle.load(sdxl_mixed_bundle), tmp_path / "intel", False)
    prepare(str(folder))
    models = {file.parent.name: ov.Core().read_model(file) for file in folder.glob("*/openvino_model.xml")}
    assert set(models) == {"text_encoder", "text_encoder_2", "unet", "vae_decoder"}
    types = {port.get_any_name(): port.element_type for port in models["unet"].inputs}
    assert types.pop("timestep") == ov.Type.i64
    assert set(types) == {"sample", "encoder_hidden_states", "text_embeds", "time_ids"}
    assert set(types.values()) == {ov.Type.f32}
    names = {name: [port.get_any_name() for port in models[name].outputs] for name in models}
    assert names["text_encoder"] == ["hidden_states", "hidden_states"]
    assert names["text_encoder_2"] == ["text_embeds", "hidden_states"]
    for model in models.values():
        assert {port.element_type for port in model.outputs} == {ov.Type.f32}
        constants = [node for node in model.get_ops() if node.get_type_name() == "Constant" and node.data.size > 1000]
        types = {node.get_element_type() for node in constants}
        assert {each for each in types if each.is_real()} == {ov.Type.f16}
        computed = [node for node in model.get_ops() if node.get_type_name() not in ("Constant", "Result")]
        assert ov.Type.f16 not in {node.get_output_element_type(0) for node in computed}
        stored = [node for node in computed if node.get_type_name() == "Convert" and "decompression_0" in node.rt_info]
        assert len(stored) >= len([node for node in constants if node.get_element_type() == ov.Type.f16])


@pytest.mark.parametrize("name", RIVALS)
def test_they_generate_the_same_image(name: str, bundle: Bundle) -> None:
    """A run in another environment gives the image within bfloat16's threshold, or float16's for the weights."""
    variable = f"HYPERSD_{name.replace('-', '_').upper()}_PYTHON"
    if variable not in os.environ:
        pytest.skip(f"{variable} names no interpreter")
    options = BenchOptions(contenders=[name], rounds=1, pythons={name: os.environ[variable]})
    report = run_bench(bundle, options, "", Silent())
    assert report.entry(name).failure is None
    assert report.entry(name).resting_memory
    sameness = report.comparisons[0].rows[1].sameness
    assert sameness is not None
    assert sameness.psnr is None or sameness.psnr > 30
