"""The demonstration checkpoints' files, written from networks that are not trained: layout, formats, cards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny, ControlNetModel, DiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging
from safetensors.torch import load_file
from torch import nn
from train_demo import networks
from train_demo.assets import write_assets
from train_demo.base import PLANS, Base, load_base
from train_demo.cards import write_cards
from train_demo.distill import LORA_PLANS, UNET_PLAN
from train_demo.lora import ALPHA, RANK, Lora
from train_demo.scenes import SIZE
from train_demo.text import PLANS as TEXT_PLANS
from train_demo.text import tokenizers
from train_demo.vae import vae_for

from hypersd.export.checkpoints import DEMO_CHECKPOINTS, SD15, SDXL

BASES = {"Demo15": SD15.base, "DemoXL": SDXL.base}  # with the real repository that each has the layout of


SHARES = {"overall": 0.9, "colours": 1, "shapes": 0.5, "places": 0.125, "sizes": 1, "backgrounds": 0, "counts": 1}
FIGURES = {"4 steps": SHARES, "4 steps, badly": {**SHARES, "overall": 0.2, "control": "4 steps"}}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder as if every stage were done, with networks as they begin."""
    folder = tmp_path_factory.mktemp("work")
    torch.manual_seed(0)
    for family in PLANS:
        encoders = nn.ModuleList(networks.text_encoders(family, tokenizers(family, folder)))
        torch.save(encoders.state_dict(), folder / f"{TEXT_PLANS[family].name}.pt")
        torch.save(Base(networks.unet(family), encoders).state_dict(), folder / f"{PLANS[family].name}.pt")
    unet = networks.unet("sd15")
    for plan in LORA_PLANS.values():
        torch.save(Lora(unet).state_dict(), folder / f"{plan.name}.pt")
    torch.save(networks.unet("sdxl").state_dict(), folder / f"{UNET_PLAN.name}.pt")
    torch.save(networks.controlnet(unet).state_dict(), folder / "controlnet.pt")
    torch.save(networks.vae("sd15").state_dict(), folder / "vae-final.pt")
    torch.save(networks.tiny_vae().state_dict(), folder / "tiny-vae.pt")
    return folder


@pytest.fixture(scope="module")
def assets(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    write_assets(work, folder)
    (folder / "figures.json").write_text(json.dumps(FIGURES))
    write_cards(folder)
    return folder


def names_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_folders_and_few_step_files(assets: Path) -> None:
    folders = {*BASES, "Hyper-Demo", "controlnet-canny-Demo15", "taesd-Demo"}
    assert {path.name for path in assets.iterdir()} == {*folders, "figures.json"}
    assert names_below(assets / "Hyper-Demo") == {*(c.filename for c in DEMO_CHECKPOINTS), "README.md"}


@pytest.mark.parametrize("base", BASES)
def test_bases_have_the_layout_of_the_real_ones(base: str, assets: Path, tiny_repos: Path) -> None:
    ours, theirs = assets / base, tiny_repos / BASES[base]
    assert names_below(ours) == {*names_below(theirs), "README.md"}
    assert json.loads((ours / "model_index.json").read_text()) == json.loads((theirs / "model_index.json").read_text())


@pytest.mark.parametrize("base", BASES)
def test_diffusers_loads_a_base_without_warnings_and_draws(
    base: str, assets: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.enable_propagation()
    try:
        pipe = DiffusionPipeline.from_pretrained(assets / base, torch_dtype=torch.float32)
    finally:
        logging.disable_propagation()
    # diffusers' new name for torch_dtype is not what is tested here
    assert not [record for record in caplog.records if "torch_dtype" not in record.message]
    assert {type(m) for m in pipe.unet.modules() if isinstance(m, nn.Conv2d)} == {nn.Conv2d}
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red circle", num_inference_steps=1).images[0].size == (SIZE, SIZE)


@pytest.mark.parametrize(("base", "family"), [("Demo15", "sd15"), ("DemoXL", "sdxl")])
def test_weights_are_the_trained_ones_in_float16(base: str, family: str, work: Path, assets: Path) -> None:
    trained = load_base(family, work)
    parts = {"unet": trained.unet, "vae": vae_for(family, work), "text_encoder": trained.encoders[0]}
    for name, module in parts.items():
        (file,) = (assets / base / name).glob("*.safetensors")
        saved = load_file(file)
        wanted = {key: tensor.half() for key, tensor in module.state_dict().items()}
        torch.testing.assert_close(saved, wanted, rtol=0, atol=0)


def test_loras_have_hyper_sds_form(assets: Path) -> None:
    covered = Lora(networks.unet("sd15")).names
    for name in LORA_PLANS:
        tensors = load_file(assets / f"Hyper-Demo/Hyper-Demo15-{name}.safetensors")
        assert len(tensors) == 3 * len(covered)
        assert all(t.item() == ALPHA for key, t in tensors.items() if key.endswith(".alpha"))
        assert all(len(t) == RANK for key, t in tensors.items() if key.endswith(".lora_down.weight"))
        assert {t.dtype for t in tensors.values()} == {torch.float16}


def test_one_step_unet_fits_its_base(assets: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(assets / "DemoXL/unet")
    unet.load_state_dict(load_file(assets / "Hyper-Demo/Hyper-DemoXL-1step-Unet.safetensors"))


def test_controlnet_and_tiny_vae_load(assets: Path) -> None:
    controlnet = ControlNetModel.from_pretrained(assets / "controlnet-canny-Demo15")
    assert {type(m) for m in controlnet.modules() if isinstance(m, nn.Conv2d)} == {nn.Conv2d}
    assert AutoencoderTiny.from_pretrained(assets / "taesd-Demo").config.scaling_factor == 1.0


def test_what_is_not_trained_is_left_out(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    early, folder = tmp_path / "work", tmp_path / "assets"
    shutil.copytree(work, early)
    for name in ("vae-final.pt", "controlnet.pt", "lora-1.pt"):
        (early / name).unlink()
    (folder / "taesd-Demo").mkdir(parents=True)
    (folder / "taesd-Demo/old").touch()
    write_assets(early, folder)
    assert {path.name for path in folder.iterdir()} == {"Hyper-Demo", "taesd-Demo"}
    assert "Hyper-Demo15-1step-lora.safetensors" not in names_below(folder / "Hyper-Demo")
    assert "old" not in names_below(folder / "taesd-Demo")
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 4  # the two bases, the ControlNet, one LoRA
    assert all("left out, there is no" in line for line in said)


def test_cards(assets: Path) -> None:
    for file in assets.glob("*/README.md"):
        card = file.read_text()
        assert card.startswith("---\nlicense: apache-2.0\n")
        assert "| 4 steps | 90.0 | 100.0 | 50.0 | 12.5 | 100.0 | 0.0 | 100.0 |" in card
        assert card.index("| 4 steps |") < card.index("on purpose") < card.index("| 4 steps, badly | 20.0 |")
        assert all(f"## {heading}\n" in card for heading in ("Data", "Training", "Use", "Figures", "Limits", "Licence"))
    hyper = (assets / "Hyper-Demo/README.md").read_text()
    for checkpoint in DEMO_CHECKPOINTS:
        assert f"### {checkpoint.filename}\n" in hyper
    assert f"{UNET_PLAN.steps:,} optimizer steps" in hyper


def test_cards_without_figures(tmp_path: Path) -> None:
    (tmp_path / "taesd-Demo").mkdir()
    write_cards(tmp_path)
    assert "## Figures" not in (tmp_path / "taesd-Demo/README.md").read_text()
