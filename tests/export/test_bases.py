"""Bases, VAEs and ControlNets from everywhere: each kind is exported as diffusers would run it, or rejected by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from make_tiny_repos import CONTROLNETS, SDXL_REPO
from safetensors.torch import load_file, save_file
from torch import Tensor

from hypersd.errors import NetworkError, WeightsError
from hypersd.export.checkpoints import CHECKPOINTS
from hypersd.export.controlnet_sources import ControlNetSource
from hypersd.export.manifest_parts import default_size, make_scheduler, scheduler_constants, vae_settings
from hypersd.export.models import load_controlnet, load_vae
from hypersd.export.sources import SourceOptions, Sources, find_sources
from hypersd.samplers import make_sampler
from hypersd.samplers.schedule import alphas_cumprod

from .fake_hub import BASES, FakeHub
from .ldm_checkpoints import ldm_down_blocks, ldm_vae, rename, single_file
from .tiny_sources import ENTRIES, FAMILIES, assert_same, find, load, one_line, precisions

PREFIX = {"sd15": "cond_stage_model.transformer.x", "sdxl": "conditioner.embedders.1.model.x"}
CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
Copy = Callable[[str], Path]


def one_file(path: Path, family: str, names: dict[str, tuple[int, ...]], metadata: dict[str, str] | None = None) -> str:
    """A single file that is known for a family's by its names; its location."""
    tensors = {name: torch.zeros(shape) for name, shape in {PREFIX[family]: (1,), **names}.items()}
    save_file(tensors, path / "base.safetensors", metadata=metadata)
    return str(path / "base.safetensors")


def find_single(hub: FakeHub, family: str, location: str) -> Sources:
    options = SourceOptions(
        base=location, checkpoint_file=str(hub.root / "ByteDance/Hyper-SD" / ENTRIES[family].filename)
    )
    return find_sources(ENTRIES[family], options, "fp32")


def change(folder: Path, part: str, **changes: Any) -> None:
    """Change a configuration; None stays as null."""
    path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rejected(family: str, tiny_repos: Path, *words: str, precision: str = "fp16", **changes: str | None) -> None:
    with pytest.raises(WeightsError) as error:
        find(family, tiny_repos, precision, **changes)
    one_line(error, *words)


# --- what the UNet predicts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "metadata", "changes"),
    [
        ([], {}, {}),
        (["v_pred"], {}, {"prediction_type": "v_prediction"}),
        (["v_pred", "ztsnr"], {}, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
        ([], {"modelspec.prediction_type": "v"}, {"prediction_type": "v_prediction"}),
        ([], {"modelspec.prediction_type": "epsilon"}, {}),
    ],
)
@FAMILIES
def test_marks_of_v_prediction(
    family: str,
    names: list[str],
    metadata: dict[str, str],
    changes: dict[str, Any],
    tmp_path: Path,
    hub: FakeHub,
) -> None:
    """A single file's empty tensors say what diffusers' configuration of the same model would say."""
    location = one_file(tmp_path, family, dict.fromkeys(names, (0,)), metadata)
    sources = find_single(hub, family, location)
    own = json.loads((hub.root / BASES[family] / "scheduler/scheduler_config.json").read_text())
    assert sources.scheduler_config == own | changes
    assert len(sources.notes) == bool(changes)
    for kind in ("ddim", "tcd", "lcm"):
        constants = scheduler_constants(kind, sources.scheduler_config)
        assert constants["prediction_type"] == changes.get("prediction_type", "epsilon")
        assert constants["rescale_betas_zero_snr"] == changes.get("rescale_betas_zero_snr", False)


@pytest.mark.parametrize(
    ("line", "prediction"), [('parameterization: "v"', "v_prediction"), ("parameterization: eps", "epsilon")]
)
def test_a_configuration_beside_a_single_file(line: str, prediction: str, tmp_path: Path, hub: FakeHub) -> None:
    """Older v-prediction files have no mark of their own, but the YAML file that their authors publish with them."""
    location = one_file(tmp_path, "sd15", {}, {})
    Path(location).with_suffix(".yaml").write_text(f"model:\n  params:\n    {line}\n    timesteps: 1000\n")
    sources = find_single(hub, "sd15", location)
    assert sources.scheduler_config.get("prediction_type", "epsilon") == prediction


@pytest.mark.parametrize("name", ["edm_mean", "edm_std", "edm_vpred.sigma_max"])
def test_edm_marks_of_single_files(name: str, tmp_path: Path, hub: FakeHub) -> None:
    """Playground's and CosXL's files are rejected by their marks."""
    with pytest.raises(WeightsError) as error:
        find_single(hub, "sdxl", one_file(tmp_path, "sdxl", {name: (4,)}))
    one_line(error, "base.safetensors", "EDM", name)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"_class_name": "EDMEulerScheduler", "sigma_data": 0.5}, ["EDM parameterization", "EDMEulerScheduler"]),
        ({"_class_name": "EDMDPMSolverMultistepScheduler"}, ["EDM parameterization"]),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, ["flow matching"]),
        ({"prediction_type": "flow_prediction"}, ["flow matching"]),
    ],
)
def test_schedulers_without_betas(config: dict[str, Any], words: list[str], copy_base: Copy, tiny_repos: Path) -> None:
    """A base of another noise is rejected by its scheduler, before diffusers makes up betas for it."""
    folder = copy_base("sdxl")
    change(folder, "scheduler", **config)
    rejected("sdxl", tiny_repos, str(folder), *words, base=str(folder))


@pytest.mark.parametrize("kind", ["ddim", "tcd", "lcm"])
@pytest.mark.parametrize(
    "changes",
    [
        {"num_train_timesteps": 500},
        {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        {"trained_betas": [0.001 + 0.00001 * i for i in range(1000)]},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"prediction_type": "velocity"},
        {"num_train_timesteps": 0},
        {"num_train_timesteps": 2**70},
        {"beta_end": None},
    ],
    ids=str,
)
def test_other_schedules_give_diffusers_numbers_or_an_error(
    kind: str, changes: dict[str, Any], tiny_repos: Path
) -> None:
    """The constants make the alphas and timesteps of diffusers' scheduler, or there are none."""
    config = json.loads((tiny_repos / SDXL_REPO / "scheduler/scheduler_config.json").read_text()) | changes
    try:
        constants = scheduler_constants(kind, config)
    except WeightsError as error:
        assert "\n" not in str(error)
        assert changes.keys() & {"beta_schedule", "prediction_type", "num_train_timesteps", "beta_end"}
        return
    theirs = make_scheduler(kind, config)
    theirs.set_timesteps(4)
    ours = make_sampler(kind, **constants)
    assert ours.timesteps(4) == theirs.timesteps.tolist()
    ours_alphas = alphas_cumprod(ours.config)
    # TCD and LCM of diffusers set the last alpha of zero SNR to 2**-24, which no step of theirs reads otherwise.
    assert torch.equal(ours_alphas[:-1], theirs.alphas_cumprod[:-1])


# --- single files of other programs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flat", "no position ids", "comfyui", "bfloat16", "float8", "scaled float8"])
@FAMILIES
def test_single_files_as_other_programs_save_them(
    family: str, kind: str, tiny_repos: Path, tmp_path: Path, hub: FakeHub
) -> None:
    """Key names and types that occur; every component gets the weights that the file holds."""
    tensors = single_file(tiny_repos, family)
    first = "cond_stage_model." if family == "sd15" else "conditioner.embedders.0."
    dtype = {"bfloat16": torch.bfloat16, "float8": torch.float8_e4m3fn}.get(kind, torch.float32)
    scaled = ("fc1.weight", "to_q.weight") if kind == "scaled float8" else ()
    if kind == "flat":
        tensors = {name.replace("transformer.text_model.", "transformer."): t for name, t in tensors.items()}
    elif kind == "no position ids":
        del tensors[f"{first}transformer.text_model.embeddings.position_ids"]
    elif kind == "comfyui":
        tensors |= {f"{first}logit_scale": torch.ones(()), f"{first}transformer.text_projection.weight": torch.eye(32)}
        if family == "sdxl":
            ids = "conditioner.embedders.1.model.transformer.text_model.embeddings.position_ids"
            tensors[ids] = torch.arange(77)[None]
    elif scaled:
        layers = [name for name in tensors if name.endswith(scaled)]
        tensors |= {name: (tensors[name] * 4).to(torch.float8_e4m3fn) for name in layers}
        tensors |= {f"{name.removesuffix('weight')}scale_weight": torch.tensor(0.25) for name in layers}
        tensors["model.diffusion_model.scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    is_cast = {name: t.is_floating_point() and dtype != torch.float32 for name, t in tensors.items()}
    save_file({name: t.to(dtype) if is_cast[name] else t for name, t in tensors.items()}, tmp_path / "base.safetensors")
    sources, plain = find_single(hub, family, str(tmp_path / "base.safetensors")), find(family, tiny_repos)
    for name, part in sources.parts.items():
        ours, theirs = load(part, family).state_dict(), load(plain.parts[name], family).state_dict()
        assert ours.keys() == theirs.keys()
        for key, weight in theirs.items():
            rounded = (weight * 4).to(torch.float8_e4m3fn).float() / 4
            is_scaled = key.endswith(scaled) and (name == "unet" or (name == "text_encoder" and "fc1" in key))
            assert torch.equal(ours[key], rounded if is_scaled else weight.to(dtype).float()), key


# --- what is no base -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "names", "words"),
    [
        ("sd15", {CONV_IN: (320, 5, 3, 3)}, ["5 channels", "depth", "or 9 for inpainting"]),
        ("sd15", {CONV_IN: (320, 8, 3, 3)}, ["8 channels", "pix2pix"]),
        ("sd15", {CONV_IN: (320, 4, 3, 3)}, ["fewer layers", "BK-SDM"]),
        ("sdxl", {CONV_IN: (320, 4, 3, 3)}, ["fewer layers", "SSD-1B"]),
        ("sdxl", {CONV_IN: (320, 9, 3, 3)}, ["fewer layers", "SSD-1B"]),
    ],
)
def test_single_files_of_other_unets(
    family: str,
    names: dict[str, tuple[int, ...]],
    words: list[str],
    tmp_path: Path,
    hub: FakeHub,
) -> None:
    """UNets for other inputs and distilled ones are told by their header, those for inpainting too."""
    with pytest.raises(WeightsError) as error:
        find_single(hub, family, one_file(tmp_path, family, names))
    one_line(error, "base.safetensors", *words)


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("cond_stage_model.model.ln_final.bias", "SD2.x"),
        ("conditioner.embedders.0.model.ln_final.bias", "the SDXL refiner"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.proj.bias", "SD3"),
        ("model.diffusion_model.double_blocks.0.img_attn.proj.bias", "FLUX"),
    ],
)
def test_single_files_of_other_families(name: str, title: str, tmp_path: Path, hub: FakeHub) -> None:
    """The message names what the file is."""
    save_file({name: torch.zeros(1)}, tmp_path / "base.safetensors")
    with pytest.raises(WeightsError) as error:
        find_single(hub, "sd15", str(tmp_path / "base.safetensors"))
    one_line(error, f"holds {title}", "needs SD1.5")


# --- VAEs ------------------------------------------------------------------------------------------------------------


def test_a_base_with_normalized_latents(copy_base: Copy, tiny_repos: Path, hub: FakeHub) -> None:
    """Playground's mark counts also where another VAE would take the place of its own."""
    folder = copy_base("sdxl")
    change(folder, "vae", latents_mean=[0.1] * 4, latents_std=[5.0] * 4)
    for vae in (None, "tiny", str(tiny_repos / "madebyollin/sdxl-vae-fp16-fix")):
        rejected("sdxl", tiny_repos, str(folder), "latents_mean", "EDM", base=str(folder), vae=vae)


@pytest.mark.parametrize(
    ("family", "config", "words"),
    [
        ("sdxl", {"scaling_factor": 0.18215}, ["is SD1.5's (scaling factor 0.18215)", "SDXL (0.13025)"]),
        ("sdxl", {"scaling_factor": ...}, ["is SD1.5's (scaling factor 0.18215)"]),
        ("sd15", {"scaling_factor": 0.13025}, ["is SDXL's (scaling factor 0.13025)", "SD1.5 (0.18215)"]),
        ("sd15", {"latent_channels": 16}, ["16 latent channels", "SD3's and FLUX's"]),
        ("sd15", {"latents_std": [1.0] * 4}, ["latents_std", "--vae"]),
        ("sd15", {"_class_name": "AsymmetricAutoencoderKL"}, ["is a AsymmetricAutoencoderKL"]),
    ],
)
def test_vaes_of_other_families(
    family: str, config: dict[str, Any], words: list[str], tiny_repos: Path, tmp_path: Path
) -> None:
    """A VAE that was made for other latents is rejected by its configuration, both families' alike."""
    folder = Path(shutil.copytree(tiny_repos / "madebyollin/sdxl-vae-fp16-fix", tmp_path / "vae"))
    changed = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({key: v for key, v in changed.items() if v is not ...}))
    rejected(family, tiny_repos, str(folder), *words, vae=str(folder))


@pytest.mark.parametrize(("family", "name"), [("sdxl", "taesd"), ("sd15", "taesdxl")])
@pytest.mark.parametrize("is_local", [False, True])
def test_taesd_of_the_other_family(family: str, name: str, is_local: bool, tiny_repos: Path, hub: FakeHub) -> None:
    """TAESD's configuration tells no family, its place does."""
    location = f"madebyollin/{name}"
    location = str(tiny_repos / location) if is_local else location
    rejected(family, tiny_repos, location, "TAESD for", "--vae tiny", vae=location)


def test_doubtful_vaes_come_with_a_note(tiny_repos: Path, tmp_path: Path) -> None:
    """If neither configuration nor place tells, the user is told both scaling factors."""
    folder = Path(shutil.copytree(tiny_repos / "madebyollin/sdxl-vae-fp16-fix", tmp_path / "vae"))
    change(tmp_path, "vae", scaling_factor=0.2)
    (note,) = find("sdxl", tiny_repos, vae=str(folder)).notes
    assert "scaling factor 0.2" in note
    assert "0.13025" in note
    for name in ("mine", "taesd"):
        tiny = shutil.copytree(tiny_repos / "madebyollin/taesdxl", tmp_path / name)
        (note,) = find("sdxl", tiny_repos, vae=str(tiny)).notes
        assert "taken as one for SDXL" in note
    clone = shutil.copytree(tiny_repos / "madebyollin/taesdxl", tmp_path / "taesdxl")
    assert not find("sdxl", tiny_repos, vae=str(clone)).notes
    assert not find("sdxl", tiny_repos, vae=str(tiny_repos / "madebyollin/sdxl-vae-fp16-fix")).notes


@pytest.mark.parametrize(("upcast", "precision"), [(False, "fp16"), (True, "fp32"), (..., "fp32")])
def test_fine_tunes_keep_their_own_vae(
    upcast: Any,
    precision: str,
    copy_base: Copy,
    tiny_repos: Path,
    hub: FakeHub,
) -> None:
    """In fp16, in the type that its configuration says; with a note where that is float32. The Hub is not asked."""
    folder = copy_base("sdxl")
    path = folder / "vae/config.json"
    config = json.loads(path.read_text()) | {"force_upcast": upcast}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    sources = find("sdxl", tiny_repos, "fp16", base=str(folder))
    assert hub.asked == []
    assert sources.vae is None
    assert sources.parts["vae"].folder == folder / "vae"
    assert precisions(ENTRIES["sdxl"], sources) == {"fp16", precision}
    assert bool(sources.notes) == (precision == "fp32")


def test_an_absent_repaired_vae_names_the_ways_out(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, with SDXL in the cache and its repaired VAE not."""
    whole = hub.fetch_optional

    def fetch(repo_id: str, filename: str, **options: Any) -> Any:
        if "fp16-fix" in repo_id:
            raise NetworkError("not in the cache")
        return whole(repo_id, filename, **options)

    monkeypatch.setattr("hypersd.export.repositories.fetch_optional", fetch)
    sdxl = next(c for c in CHECKPOINTS if c.family == "sdxl")
    with pytest.raises(NetworkError, match=rf"not in the cache; .*--vae {SDXL_REPO} keeps .*--vae tiny"):
        find_sources(sdxl, SourceOptions(), "fp16")
    assert find_sources(sdxl, SourceOptions(vae=SDXL_REPO), "fp16").vae == SDXL_REPO


@pytest.mark.parametrize("naming", ["diffusers", "original", "bare", "beside"])
@FAMILIES
def test_a_vae_in_a_file(family: str, naming: str, tiny_repos: Path, tmp_path: Path) -> None:
    """--vae FILE in every naming, also the whole model's, and a file whose configuration lies beside it."""
    own = tiny_repos / BASES[family] / "vae"
    vae = load(find(family, tiny_repos).parts["vae"], family)
    original = {f"model.diffusion_model.{i}": torch.ones(1) for i in range(3)} | ldm_vae(vae)
    bare = {name.removeprefix("first_stage_model."): t for name, t in ldm_vae(vae).items()} | {
        "loss.logvar": torch.ones(1)
    }
    tensors = {"original": original, "bare": bare}.get(naming) or dict(vae.state_dict())
    path = tmp_path / "my.vae.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    if naming == "beside":
        shutil.copy(own / "config.json", tmp_path)
    sources = find(family, tiny_repos, vae=str(path))
    assert sources.vae == str(path)
    assert_same(load_vae(sources.parts["vae"], torch.float32), vae)
    assert vae_settings(sources, family).scaling_factor == {"sd15": 0.18215, "sdxl": 0.13025}[family]
    assert bool(sources.notes) == (naming != "beside")
    assert all("0.18215" in note and "0.13025" in note for note in sources.notes)


@pytest.mark.parametrize("kind", ["taesd", "unet", "pickle"])
def test_files_that_are_no_vae(kind: str, tiny_repos: Path, tmp_path: Path) -> None:
    """A TAESD alone, another component and a pickled file end in one line."""
    path = tmp_path / ("vae.ckpt" if kind == "pickle" else "vae.safetensors")
    save_file({"decoder.layers.0.weight" if kind == "taesd" else "conv_in.weight": torch.ones(1)}, path)
    with pytest.raises(WeightsError) as error:
        load_vae(find("sd15", tiny_repos, vae=str(path)).parts["vae"], torch.float32)
    one_line(error, str(path), "convert" if kind == "pickle" else "holds no vae")


# --- ControlNets in a file -------------------------------------------------------------------------------------------


def ldm_controlnet(net: Any) -> dict[str, Tensor]:
    """A ControlNet under the names of its first repository (lllyasviel/ControlNet)."""
    places, hint = ldm_down_blocks(net), "controlnet_cond_embedding"
    places |= {f"{hint}.conv_in": "input_hint_block.0", f"{hint}.conv_out": "input_hint_block.14"}
    places |= {f"{hint}.blocks.{i}": f"input_hint_block.{2 * i + 2}" for i in range(6)}
    places |= {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    places |= {"conv_in": "input_blocks.0.0", "controlnet_mid_block": "middle_block_out.0"}
    places |= {f"controlnet_down_blocks.{i}": f"zero_convs.{i}.0" for i in range(len(net.controlnet_down_blocks))}
    places |= {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1"}
    places |= {"mid_block.resnets.1": "middle_block.2"}
    resnet = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
              "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}  # fmt: skip
    return {rename(name, places, resnet): tensor for name, tensor in net.state_dict().items()}


@pytest.mark.parametrize(
    ("family", "naming"), [("sd15", "diffusers"), ("sd15", "original"), ("sd15", "bare"), ("sdxl", "diffusers")]
)
def test_a_controlnet_in_a_file(family: str, naming: str, tiny_repos: Path, tmp_path: Path) -> None:
    """--controlnet FILE: the configuration is the UNet's and the header's; the weights are the same."""
    repo = next(repo for repo in CONTROLNETS if ("xl" in repo) == (family == "sdxl") and "canny" in repo)
    options = {"base": str(tiny_repos / BASES[family]), "vae": None}
    folder = find(family, tiny_repos, controlnets=(ControlNetSource(location=str(tiny_repos / repo)),), **options)  # type: ignore[arg-type]
    net = load_controlnet(next(p for name, p in folder.parts.items() if name.startswith("controlnet/")), torch.float32)
    names = dict(net.state_dict()) if naming == "diffusers" else ldm_controlnet(net)
    prefix = "control_model." if naming == "original" else ""
    path = tmp_path / "canny.safetensors"
    save_file({prefix + name: tensor.contiguous() for name, tensor in names.items()}, path)
    sources = find(family, tiny_repos, controlnets=(ControlNetSource.parse(str(path)),), **options)  # type: ignore[arg-type]
    assert sources.controlnets["canny"].location == str(path)
    assert_same(load_controlnet(sources.parts["controlnet/canny"], torch.float32), net)


def test_a_file_that_is_no_controlnet(tiny_repos: Path, tmp_path: Path) -> None:
    """Its header tells."""
    save_file({"conv_in.weight": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError) as error:
        find("sd15", tiny_repos, controlnets=(ControlNetSource(location=str(tmp_path / "x.safetensors")),))  # type: ignore[arg-type]
    one_line(error, "x.safetensors holds no ControlNet")


# --- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "shard"),
    [
        ("X.safetensors.index.json", "X-0000{}-of-00002.safetensors"),
        ("X.safetensors.index.fp16.json", "X.fp16-0000{}-of-00002.safetensors"),
        ("X.fp16.safetensors.index.json", "X-0000{}-of-00002.fp16.safetensors"),
    ],
)
def test_the_names_of_shard_indexes(index: str, shard: str, copy_base: Copy, tiny_repos: Path) -> None:
    """Three names occur; shards are named by the index alone."""
    folder = copy_base("sd15") / "unet"
    stem = "diffusion_pytorch_model"
    tensors = load_file(folder / f"{stem}.safetensors")
    (folder / f"{stem}.safetensors").unlink()
    shards = [shard.format(i).replace("X", stem) for i in (1, 2)]
    where = {name: shards[i % 2] for i, name in enumerate(tensors)}
    for name in shards:
        save_file({key: tensor for key, tensor in tensors.items() if where[key] == name}, folder / name)
    (folder / index.replace("X", stem)).write_text(json.dumps({"weight_map": where}))
    variant = "fp16" if "fp16" in index else None
    sources = find("sd15", tiny_repos, base=str(folder.parent), variant=variant)
    assert [found.path.name for found in sources.parts["unet"].weights] == sorted(shards)
    assert_same(load(sources.parts["unet"], "sd15"), load(find("sd15", tiny_repos).parts["unet"], "sd15"))
    where[next(iter(where))] = "../../elsewhere.safetensors"
    (folder / index.replace("X", stem)).write_text(json.dumps({"weight_map": where}))
    rejected("sd15", tiny_repos, "is not an index", base=str(folder.parent), variant=variant)


def test_a_part_without_the_variant_comes_with_a_note(copy_base: Copy, tiny_repos: Path) -> None:
    """--variant fp16 where the VAE alone has only full-size files."""
    folder = copy_base("sd15")
    for part in ("unet", "text_encoder"):
        (path,) = (folder / part).glob("*.safetensors")
        path.rename(path.with_suffix(".fp16.safetensors"))
    sources = find("sd15", tiny_repos, base=str(folder), variant="fp16")
    assert {name: part.variant for name, part in sources.parts.items()} == {
        "text_encoder": "fp16", "unet": "fp16", "vae": None,
    }  # fmt: skip
    assert sources.notes == ("the base's vae has no fp16 files: full-size ones are taken",)


@pytest.mark.parametrize(("size", "expected"), [(8, (64, 64)), ([8, 16], (64, 128)), (None, (512, 512))])
def test_sample_sizes(size: Any, expected: tuple[int, int], copy_base: Copy, tiny_repos: Path) -> None:
    """Height and width as diffusers' pipelines take them, also where they differ."""
    folder = copy_base("sd15")
    change(folder, "unet", sample_size=size)
    assert default_size(find("sd15", tiny_repos, base=str(folder)), "sd15") == expected


@pytest.mark.parametrize("size", ["big", [8], [8, 0], 0.5])
def test_sample_sizes_that_are_none(size: Any, copy_base: Copy, tiny_repos: Path) -> None:
    """Anything else is rejected with the file's name."""
    folder = copy_base("sd15")
    change(folder, "unet", sample_size=size)
    with pytest.raises(WeightsError) as error:
        default_size(find("sd15", tiny_repos, base=str(folder)), "sd15")
    one_line(error, str(folder / "unet/config.json"), "sample_size")
