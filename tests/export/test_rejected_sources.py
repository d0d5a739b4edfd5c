"""Sources that are damaged, incomplete or another model's: each is rejected in one line that names it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hypersd.errors import WeightsError
from hypersd.export.tokenizer import write_tokenizer

from .fake_hub import BASES, FakeHub
from .tiny_sources import SDXL, find, load, load_all, one_line

# --- locations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("location", ["no/such/folder", "./missing", "missing", "", "/nowhere/model", "a b/c", "über"])
@pytest.mark.parametrize("option", ["base", "vae"])
def test_locations_that_do_not_exist(option: str, location: str, tiny_repos: Path) -> None:
    """Neither a folder nor a repository's name: the option and what was given are repeated."""
    with pytest.raises(WeightsError) as error:
        find("sd15", tiny_repos, **{option: location})
    one_line(error, f"--{option}", repr(location))


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_a_lora_that_is_no_file(kind: str, tiny_repos: Path, tmp_path: Path) -> None:
    """--lora takes a file: a folder and a name of nothing are refused, with what was expected."""
    path = tmp_path / "lora.safetensors"
    if kind == "folder":
        path.mkdir()
    with pytest.raises(WeightsError) as error:
        find("sd15", tiny_repos, checkpoint_file=str(path))
    one_line(error, str(path), ".safetensors file")


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["base.ckpt", "base.bin", "base.pt", "base"])
def test_pickled_checkpoints_are_refused(name: str, tmp_path: Path, tiny_repos: Path) -> None:
    """Pickled files can run code: they are not opened, and the message says to convert them."""
    (tmp_path / name).write_bytes(b"\x80\x02not opened")
    with pytest.raises(WeightsError) as error:
        find("sd15", tiny_repos, base=str(tmp_path / name))
    one_line(error, name, "only .safetensors", "convert")


@pytest.mark.parametrize("name", ["unet", "text_encoder", "vae"])
def test_a_folder_with_pickled_weights_only(name: str, copy_base: Callable[[str], Path], tiny_repos: Path) -> None:
    """The same in diffusers layout: .bin files do not count as weights."""
    folder = copy_base("sd15")
    weights = next((folder / name).glob("*.safetensors"))
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(WeightsError) as error:
        find("sd15", tiny_repos, base=str(folder))
    one_line(error, f"{name}/", "only .safetensors", "convert")


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _cut_in_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:50])


def _randomize(path: Path) -> None:
    path.write_bytes(torch.randint(256, (5000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
                     .numpy().tobytes())  # fmt: skip


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _web_page(path: Path) -> None:
    path.write_text("<!DOCTYPE html>\n<html>\n<title>Access denied</title>\n</html>\n" * 20)


def _git_lfs_pointer(path: Path) -> None:
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 10300000000\n")


def _pickle(path: Path) -> None:
    torch.save({"a": torch.ones(100)}, path)


@pytest.mark.parametrize(
    "damage",
    [_truncate, _cut_in_header, _randomize, _empty, _web_page, _git_lfs_pointer, _pickle],
    ids=lambda f: f.__name__[1:],
)
@pytest.mark.parametrize("which", ["unet", "text_encoder", "text_encoder_2", "vae", "lora", "single"])
def test_damaged_weight_files(
    damage: Callable[[Path], None], which: str, copy_base: Callable[[str], Path], tiny_repos: Path, tmp_path: Path,
    hub: FakeHub,
) -> None:  # fmt: skip
    """Cut, random, empty, a web page, a git-lfs pointer, a pickle: found before any work, the file named."""
    changes = {}
    if which == "lora":
        path = Path(shutil.copy(tiny_repos / "ByteDance/Hyper-SD" / SDXL.filename, tmp_path / "lora.safetensors"))
        changes["checkpoint_file"] = str(path)
    elif which == "single":
        path = tmp_path / "base.safetensors"
        save_file({"model.diffusion_model.out.0.weight": torch.ones(1000)}, path)
        changes["base"] = str(path)
    else:
        folder = copy_base("sdxl")
        path = next((folder / which).glob("*.safetensors"))
        changes["base"] = str(folder)
    damage(path)
    with pytest.raises(WeightsError) as error:
        find("sdxl", tiny_repos, **changes)
    one_line(error, str(path), "not a whole safetensors file")


@pytest.mark.parametrize("index", ["{}", '{"weight_map": null}', '{"weight_map": []}', "["])
def test_a_broken_index_of_shards(index: str, copy_base: Callable[[str], Path], tiny_repos: Path) -> None:
    """A damaged index of shards ends like any other damaged configuration."""
    folder = copy_base("sd15")
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.unlink()
    Path(f"{weights}.index.json").write_text(index)
    with pytest.raises(WeightsError) as error:
        find("sd15", tiny_repos, base=str(folder))
    one_line(error, str(folder), "index.json")


def test_a_missing_shard_is_named(copy_base: Callable[[str], Path], tiny_repos: Path) -> None:
    """The index says which shards there are: one that is not there is an error that names it."""
    folder = copy_base("sd15")
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    weights.unlink()
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    save_file(dict(list(tensors.items())[:10]), folder / "unet" / names[0])
    weight_map = {name: names[i >= 10] for i, name in enumerate(tensors)}
    Path(f"{weights}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(WeightsError) as error:
        find("sd15", tiny_repos, base=str(folder))
    one_line(error, names[1])


@pytest.mark.parametrize("name", ["unet", "text_encoder", "text_encoder_2", "vae"])
@pytest.mark.parametrize("change", ["lost", "reshaped", "renamed"])
def test_weights_are_never_made_up(name: str, change: str, copy_base: Callable[[str], Path], tiny_repos: Path) -> None:
    """A weight that is missing, renamed or of another shape would be random: it is refused, its folder named."""
    folder = copy_base("sdxl")
    path = next((folder / name).glob("*.safetensors"))
    tensors = load_file(path)
    key = next(key for key in sorted(tensors) if "mid_block" in key or "encoder.layers" in key)
    tensor = tensors.pop(key)
    if change == "reshaped":
        tensors[key] = torch.cat([tensor, tensor])
    elif change == "renamed":
        tensors[f"{key}x"] = tensor
    save_file(tensors, path, metadata={"format": "pt"})
    sources = find("sdxl", tiny_repos, base=str(folder))
    with pytest.raises(WeightsError) as error:
        load(sources.parts[name], "sdxl")
    one_line(error, str(folder / name))


# --- configurations and tokenizers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "missing",
    ["model_index.json", "unet", "unet/config.json", "text_encoder", "text_encoder_2", "text_encoder_2/config.json",
     "vae", "vae/config.json", "tokenizer", "tokenizer_2/vocab.json", "scheduler/scheduler_config.json"],
)  # fmt: skip
def test_a_base_that_lacks_a_part(missing: str, copy_base: Callable[[str], Path], tiny_repos: Path) -> None:
    """A missing file is named, with its folder."""
    folder = copy_base("sdxl")
    path = folder / missing
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    with pytest.raises(WeightsError) as error:
        find("sdxl", tiny_repos, base=str(folder))
    one_line(error, str(folder), missing, "diffusers layout")


@pytest.mark.parametrize(
    "garbage", [b"", b"{", b"[1, 2]", b'"text"', b"\xff\xfe\x00garbage", b"<html>\n<body>\n"], ids=repr
)
@pytest.mark.parametrize(
    "which",
    ["model_index.json", "unet/config.json", "text_encoder/config.json", "vae/config.json",
     "scheduler/scheduler_config.json"],
)  # fmt: skip
def test_configurations_that_are_not_json_objects(
    garbage: bytes, which: str, copy_base: Callable[[str], Path], tiny_repos: Path
) -> None:
    """Empty, cut, another JSON value, not UTF-8: the file is named in one line."""
    folder = copy_base("sd15")
    (folder / which).write_bytes(garbage)
    with pytest.raises(WeightsError) as error:
        find("sd15", tiny_repos, base=str(folder))
    one_line(error, str(folder / which), "JSON")


@pytest.mark.parametrize(
    ("which", "changes"),
    [
        ("unet", {"block_out_channels": [32]}),
        ("unet", {"down_block_types": ["NoSuchBlock", "DownBlock2D"]}),
        ("unet", {"block_out_channels": "wide"}),
        ("unet", {"norm_num_groups": 7}),
        ("text_encoder", {"hidden_size": 48}),
        ("text_encoder", {"hidden_size": "wide"}),
        ("text_encoder", {"hidden_act": "no_such_activation"}),
        ("text_encoder", {"num_hidden_layers": 5}),
        ("vae", {"block_out_channels": [8]}),
        ("vae", {"norm_num_groups": 7}),
        ("vae", {"up_block_types": ["NoSuchBlock"] * 4}),
    ],
)
def test_configurations_of_other_components(
    which: str, changes: dict[str, Any], copy_base: Callable[[str], Path], tiny_repos: Path
) -> None:
    """A configuration that fits no component or other weights ends in one line, not in a library's traceback."""
    folder = copy_base("sd15")
    path = folder / which / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(WeightsError) as error:
        load_all("sd15", folder, tiny_repos)
    one_line(error, str(folder / which))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("vocab.json", "{"),
        ("vocab.json", "[]"),
        ("merges.txt", "#version: 0.2\nq\n"),
        ("merges.txt", "#version: 0.2\nno_such_token zz\n"),
        ("tokenizer_config.json", "garbage"),
    ],
)
def test_broken_tokenizers(
    file: str, content: str, copy_base: Callable[[str], Path], tiny_repos: Path, tmp_path: Path
) -> None:
    """A damaged tokenizer ends in one line that names its folder."""
    folder = copy_base("sd15")
    (folder / "tokenizer" / file).write_text(content)
    sources = find("sd15", tiny_repos, base=str(folder))
    with pytest.raises(WeightsError) as error:
        write_tokenizer(sources.tokenizers["tokenizer"], tmp_path / "out")
    one_line(error, str(folder / "tokenizer"))


# --- bases of other models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"in_channels": 8}, ["8 channels", "pix2pix", "or 9 for inpainting"]),
        ({"cross_attention_dim": 1024}, ["holds SD2.x", "needs SD1.5"]),
        ({"cross_attention_dim": 1280}, ["holds the SDXL refiner"]),
        ({"mid_block_type": None}, ["fewer layers", "SSD-1B"]),
        ({"block_out_channels": [320, 640, 1280]}, ["fewer layers", "such as SSD-1B"]),
        ({"time_cond_proj_dim": 256}, ["time_cond_proj_dim"]),
        ({"class_embed_type": "timestep"}, ["class_embed_type"]),
    ],
)
def test_unets_of_other_uses(
    changes: dict[str, Any], words: list[str], copy_base: Callable[[str], Path], tiny_repos: Path
) -> None:
    """Editing UNets, latent consistency models and the like are told apart before their weights are read."""
    folder = copy_base("sd15")
    path = folder / "unet/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(WeightsError) as error:
        load_all("sd15", folder, tiny_repos)
    one_line(error, str(folder), *words)


@pytest.mark.parametrize(("family", "other"), [("sd15", "sdxl"), ("sdxl", "sd15")])
def test_a_base_of_the_other_family(family: str, other: str, tiny_repos: Path) -> None:
    """It says what the base holds, what the checkpoint needs, and names one that would do."""
    names = {"sd15": "SD1.5", "sdxl": "SDXL"}
    with pytest.raises(WeightsError) as error:
        find(family, tiny_repos, base=str(tiny_repos / BASES[other]))
    one_line(error, f"holds a {names[other]} model", f"needs {names[family]}", BASES[family])


@pytest.mark.parametrize("class_name", ["StableDiffusion3Pipeline", "FluxPipeline", None, 3])
def test_a_base_of_no_family(class_name: object, copy_base: Callable[[str], Path], tiny_repos: Path) -> None:
    """Another pipeline, or none: refused with what its index says."""
    folder = copy_base("sd15")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": class_name}))
    with pytest.raises(WeightsError) as error:
        find("sd15", tiny_repos, base=str(folder))
    one_line(error, f"holds a {class_name} model", "needs SD1.5")
