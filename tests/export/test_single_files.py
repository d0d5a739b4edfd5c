"""Bases in a single file under the original names: the same weights as in folders, or a refusal in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from make_tiny_repos import SD15_INPAINT_REPO, SDXL_INPAINT_REPO, SDXL_REPO
from safetensors.torch import load_file, save_file

from hypersd.errors import WeightsError
from hypersd.export.layout import DiffusersBase
from hypersd.export.models import check_sources, load_unet
from hypersd.export.repositories import LocalFolder
from hypersd.weights.lora_file import Fusion

from .fake_hub import BASES, FakeHub
from .ldm_checkpoints import ldm_unet, single_file
from .tiny_sources import FAMILIES, assert_same, find, load, load_all, one_line

INPAINT_BASES = {"sd15": SD15_INPAINT_REPO, "sdxl": SDXL_INPAINT_REPO}


@pytest.fixture(scope="module")
def wide_repos(tiny_repos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bases, SDXL's second text encoder wider than its first: diffusers tells the two apart by their width."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    root = tmp_path_factory.mktemp("wide")
    for repo in BASES.values():
        shutil.copytree(tiny_repos / repo, root / repo)
    folder = root / SDXL_REPO / "text_encoder_2"
    config = json.loads((folder / "config.json").read_text()) | {"hidden_size": 48, "projection_dim": 40}
    shutil.rmtree(folder)
    torch.manual_seed(2)
    CLIPTextModelWithProjection(CLIPTextConfig.from_dict(config)).save_pretrained(folder)
    return root


@pytest.fixture(scope="module")
def single_files(wide_repos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A single-file checkpoint of each family's base. Do not write there."""
    folder = tmp_path_factory.mktemp("single")
    paths = {}
    for family in BASES:
        paths[family] = folder / f"{family}.safetensors"
        save_file(single_file(wide_repos, family), paths[family])
    return paths


@pytest.fixture
def wide_hub(hub: FakeHub, wide_repos: Path) -> FakeHub:
    hub.root = wide_repos
    return hub


@FAMILIES
def test_a_single_file_holds_the_same_model(
    family: str, single_files: dict[str, Path], tiny_repos: Path, wide_hub: FakeHub
) -> None:
    """--base FILE: every component gets the weights that the same model has in diffusers layout, in both precisions.

    Configuration and tokenizers come from the family's base repository, weights do not.
    """
    sources = find(family, tiny_repos, base=str(single_files[family]))
    assert wide_hub.repos() == {BASES[family]}
    assert not [file for _, file, _ in wide_hub.asked if file.endswith(".safetensors")]
    assert sources.base == str(single_files[family].resolve())
    check_sources(sources, family)
    plain = find(family, tiny_repos, base=str(wide_hub.root / BASES[family]))
    for name, part in sources.parts.items():
        assert [found.path for found in part.weights] == [single_files[family]]
        for dtype in (torch.float32, torch.float16):
            assert_same(load(part, family, dtype), load(plain.parts[name], family, dtype))


@FAMILIES
def test_a_single_file_for_inpainting(
    family: str, single_files: dict[str, Path], tiny_repos: Path, wide_hub: FakeHub, tmp_path: Path
) -> None:
    """The header tells the nine channels, in the configuration of the published base; the rest is as ever."""
    folder = tiny_repos / INPAINT_BASES[family]
    unet = load(DiffusersBase(LocalFolder(folder)).part("unet"), family)
    tensors = load_file(single_files[family]) | ldm_unet(unet)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "base.safetensors")
    sources = find(family, tiny_repos, base=str(tmp_path / "base.safetensors"))
    check_sources(sources, family)
    assert sources.parts["unet"].config["in_channels"] == 9
    assert_same(load(sources.parts["unet"], family), unet)


@FAMILIES
def test_a_lora_is_fused_into_a_single_file(
    family: str, single_files: dict[str, Path], tiny_repos: Path, wide_hub: FakeHub
) -> None:
    """The converted UNet takes the LoRA like any other."""
    folder = wide_hub.root / BASES[family]
    single, plain = (find(family, tiny_repos, base=str(base)) for base in (single_files[family], folder))
    fusions = [Fusion("unet", tuple(check_sources(s, family, 0.75).loras.values())) for s in (single, plain)]
    unets = [s.parts["unet"] for s in (single, plain)]
    assert_same(*(load_unet(part, torch.float16, fusion) for part, fusion in zip(unets, fusions, strict=True)))


def single_file_refusal(family: str, base: Path, tiny_repos: Path) -> str:
    """The one line that a single file is refused with, while it is opened or when its components are loaded."""
    with pytest.raises(WeightsError) as error:
        load_all(family, base, tiny_repos)
    return one_line(error, base.name)


@pytest.mark.parametrize(("family", "other"), [("sd15", "sdxl"), ("sdxl", "sd15")])
def test_a_single_file_of_the_other_family(
    family: str, other: str, single_files: dict[str, Path], tiny_repos: Path, wide_hub: FakeHub
) -> None:
    """It says what the file holds and what was needed, as for a folder."""
    message = single_file_refusal(family, single_files[other], tiny_repos)
    names = {"sd15": "SD1.5", "sdxl": "SDXL"}
    assert names[family] in message
    assert names[other] in message


@FAMILIES
def test_a_lora_given_as_a_single_file_base(family: str, tiny_repos: Path, wide_hub: FakeHub) -> None:
    """A safetensors file that holds no model at all."""
    single_file_refusal(family, tiny_repos / "ByteDance/Hyper-SD/Hyper-SD15-4steps-lora.safetensors", tiny_repos)


@pytest.mark.parametrize(
    ("family", "lost"),
    [
        ("sd15", "model.diffusion_model.middle_block.0.in_layers.2.weight"),
        ("sd15", "model.diffusion_model.time_embed.0.bias"),
        ("sd15", "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight"),
        ("sd15", "cond_stage_model.transformer.text_model.final_layer_norm.bias"),
        ("sd15", "first_stage_model.decoder.mid.attn_1.q.weight"),
        ("sd15", "first_stage_model.decoder.conv_in.weight"),
        ("sdxl", "conditioner.embedders.0.transformer.text_model.encoder.layers.0.layer_norm1.weight"),
        ("sdxl", "conditioner.embedders.1.model.transformer.resblocks.1.mlp.c_fc.weight"),
        ("sdxl", "conditioner.embedders.1.model.text_projection"),
        ("sdxl", "model.diffusion_model.label_emb.0.0.weight"),
    ],
)
def test_a_single_file_that_lacks_a_weight(
    family: str, lost: str, single_files: dict[str, Path], tiny_repos: Path, tmp_path: Path, wide_hub: FakeHub
) -> None:
    """A weight that is not there is never made up: the component it belongs to is refused."""
    tensors = load_file(single_files[family])
    del tensors[lost]
    save_file(tensors, tmp_path / "base.safetensors")
    single_file_refusal(family, tmp_path / "base.safetensors", tiny_repos)
