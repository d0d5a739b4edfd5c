"""The training of the demonstration checkpoints: every stage runs, an interrupted one goes on as if unbroken."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from train_demo import base, controlnet, data, distill, loop, networks, style_loras, text, trajectories, vae
from train_demo.__main__ import is_ready, run_all, stages, style_stages
from train_demo.loop import Plan, train
from train_demo.scenes import SIZE

from hypersd.export.checkpoints import DEMO_CHECKPOINTS


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few images, few trajectories, small batches, one step of everything."""

    def shorter(plan: Plan) -> Plan:
        return dataclasses.replace(plan, steps=1)

    for module in (data, text, base):
        monkeypatch.setattr(module, "SCENES", 24)
    for module in (trajectories, distill):
        monkeypatch.setattr(module, "COUNT", 4)
    for module in (base, controlnet, distill, style_loras, text, trajectories, vae):
        monkeypatch.setattr(module, "BATCH", 4)
    for module in (controlnet, style_loras):
        monkeypatch.setattr(module, "IMAGES", 16)
    for module in (text, base, style_loras):
        monkeypatch.setattr(module, "PLANS", {family: shorter(plan) for family, plan in module.PLANS.items()})
    monkeypatch.setattr(distill, "LORA_PLANS", {name: shorter(plan) for name, plan in distill.LORA_PLANS.items()})
    monkeypatch.setattr(vae, "PARTS", [dataclasses.replace(part, plan=shorter(part.plan)) for part in vae.PARTS])
    for module, name in (
        (distill, "UNET_PLAN"),
        (controlnet, "PLAN"),
        (vae, "DECODER_PLAN"),
        (vae, "TINY_PLAN"),
    ):
        monkeypatch.setattr(module, name, shorter(getattr(module, name)))


def test_every_stage_runs_after_what_it_needs(short: None, tmp_path: Path) -> None:
    """From nothing to all that is published, in the table's order, with a loss that is a number."""
    for name, (run, needs) in {**stages(), **style_stages()}.items():
        assert is_ready(needs, tmp_path), name
        if not name.startswith("publish"):
            run(tmp_path)
        (tmp_path / f"{name}.done").touch()
    for file in tmp_path.glob("*.progress.json"):
        assert np.isfinite(json.loads(file.read_text())["loss"]), file
    vae.vae_for("sdxl", tmp_path)
    vae.load_tiny_vae(tmp_path)
    controlnet.load_controlnet(tmp_path)
    distill.load_one_step_unet(tmp_path)
    for family in style_loras.PLANS:
        style_loras.load_styles(family, networks.unet(family), tmp_path)


def noisy_fit(model: nn.Linear, stop_at: int | None = None):
    """The loss of fitting noise, which is interrupted once."""
    calls = 0

    def loss(generator: torch.Generator) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise KeyboardInterrupt
        return (model(torch.randn(4, 3, generator=generator)) - 1).square().mean()

    return loss


def test_an_interrupted_training_goes_on_as_if_it_never_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAVE_EVERY", 0.0)
    plan = Plan(name="fit", steps=20, learning_rate=0.1, seed=3)
    averages = []
    for folder, stop_at in (tmp_path / "whole", None), (tmp_path / "broken", 12):
        folder.mkdir()
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        if stop_at:
            with pytest.raises(KeyboardInterrupt):
                train(plan, model, noisy_fit(model, stop_at), folder)
            model = nn.Linear(3, 1)  # another beginning: all of it comes from the state
        averages.append(train(plan, model, noisy_fit(model), folder))
    whole, broken = (average.state_dict() for average in averages)
    assert all(torch.equal(whole[key], broken[key]) for key in whole)


def test_a_stage_whose_needs_are_not_done_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_all(["base15"], tmp_path, jobs=1) == 1
    assert "base15: what they need is not done" in capsys.readouterr().out


def test_prompts_for_edges_leave_place_and_size_to_them() -> None:
    """Else the ControlNet would be trained and scored against its prompts."""
    for scene, prompt in data.held_back_for_edges(40):
        assert not re.search(r"\b(left|right|top|bottom|middle|centre|small|medium|large)\b", prompt), prompt
        assert scene.things[0].place != "centre"


def test_held_back_scenes_were_never_seen() -> None:
    scenes = [scene for scene, _ in data.held_back(40)]
    assert len(set(scenes)) == len(scenes)
    assert not data.seen() & set(scenes)
    assert [len(scene.things) for scene in scenes] == [1, 2] * 20


def test_guidance_is_the_same_in_training_and_in_the_table() -> None:
    (guided,) = (checkpoint for checkpoint in DEMO_CHECKPOINTS if checkpoint.is_guided)
    assert guided.guidance_scale == trajectories.GUIDANCE


def test_trajectories_pass_through_the_samplers_timesteps() -> None:
    """Every few-step sampler's timesteps are among those that were kept."""
    kept = set(trajectories.trailing(trajectories.STEPS))
    for steps in (2, 4, 8):
        assert set(trajectories.trailing(steps)) <= kept
    assert data.to_samples(np.zeros((1, SIZE, SIZE, 3), np.uint8)).unique().tolist() == [-1.0]
