"""The sources of weights (Hub names, folders, shards, variants, single files), and the errors of wrong ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from make_tiny_repos import SD15_INPAINT_REPO, SD15_REPO, SDXL_INPAINT_REPO, SDXL_REPO
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hypersd import families
from hypersd.errors import HyperSDError, RequestError, WeightsError
from hypersd.export.checkpoints import CHECKPOINTS, DEMO_CHECKPOINTS, Checkpoint, find_checkpoint
from hypersd.export.component_exports import component_exports
from hypersd.export.layout import DiffusersBase, Part
from hypersd.export.models import check_sources, check_unet_sources, load_text_encoder, load_unet, load_vae
from hypersd.export.repositories import Found, LocalFolder
from hypersd.export.shapes import ShapeOptions, image_shapes
from hypersd.export.sources import SourceOptions, Sources, find_sources
from hypersd.export.tokenizer import write_tokenizer
from hypersd.weights.lora_file import Fusion

from .fake_hub import BASES, COMMIT, FakeHub

SD15, SDXL = find_checkpoint("Hyper-SD15-4steps-lora"), find_checkpoint("Hyper-SDXL-4steps-lora")
WHOLE_UNET = find_checkpoint("Hyper-SDXL-1step-Unet")
DEMO15, DEMOXL = find_checkpoint("Hyper-Demo15-4steps-lora"), find_checkpoint("Hyper-DemoXL-1step-Unet")
ENTRIES = {"sd15": SD15, "sdxl": SDXL}
FAMILIES = pytest.mark.parametrize("family", BASES)
INPAINT_BASES = {"sd15": SD15_INPAINT_REPO, "sdxl": SDXL_INPAINT_REPO}
DEMO_ROOT = Path(__file__).parents[1] / "assets/demo"


def find(family: str, tiny_repos: Path, precision: str = "fp32", **changes: str | None) -> Sources:
    """The sources of a checkpoint whose LoRA and base are local."""
    entry = ENTRIES[family]
    local = {
        "base": str(tiny_repos / BASES[family]),
        "checkpoint_file": str(tiny_repos / "ByteDance/Hyper-SD" / entry.filename),
    }
    return find_sources(entry, SourceOptions(**{**local, **changes}), precision)


ENCODER_CLASSES = {encoder.component: encoder.class_name for encoder in families.SDXL.text_encoders}


def load(part: Part, family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    if part.name == "unet":
        return load_unet(part, dtype)
    return load_vae(part, dtype) if part.name == "vae" else load_text_encoder(part, ENCODER_CLASSES[part.name], dtype)


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    """The two modules have the same class, the same weights under the same names, none on the meta device."""
    assert type(ours) is type(theirs)
    expected, found = theirs.state_dict(), ours.state_dict()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def one_line(error: pytest.ExceptionInfo[HyperSDError], *words: str) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert error.value.exit_code == 2
    for word in words:
        assert word in message
    return message


# --- what is asked of the Hub ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=lambda c: c.name)
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_defaults_come_from_the_published_repositories(checkpoint, precision: str, hub: FakeHub) -> None:
    """With nothing said: the family's base, ByteDance/Hyper-SD's file and, for SDXL in fp16 only, the repaired VAE."""
    sources = find_sources(checkpoint, SourceOptions(), precision)
    fixed = checkpoint.family == "sdxl" and precision == "fp16"
    vae = "madebyollin/sdxl-vae-fp16-fix" if fixed else BASES[checkpoint.family]
    assert hub.repos() == {BASES[checkpoint.family], "ByteDance/Hyper-SD", vae}
    assert {repo for repo, file, _ in hub.asked if file == f"{checkpoint.name}.safetensors"} == {"ByteDance/Hyper-SD"}
    weights = {name: {f.repo for f in files} for name, files in sources.weights.items()}
    assert weights["vae"] == {vae}
    assert weights["text_encoder"] == {BASES[checkpoint.family]}
    assert weights.get("lora", weights["unet"]) == {"ByteDance/Hyper-SD"}
    assert sources.vae == ("madebyollin/sdxl-vae-fp16-fix" if fixed else None)
    assert (sources.lora is None) == (checkpoint.kind == "unet")
    if checkpoint.kind == "unet":
        assert not any("unet/diffusion" in file for _, file, _ in hub.asked), "the base's UNet is not needed"


@pytest.mark.parametrize(("family", "repo"), [("sd15", "madebyollin/taesd"), ("sdxl", "madebyollin/taesdxl")])
def test_tiny_vae(family: str, repo: str, hub: FakeHub, tiny_repos: Path) -> None:
    """``--vae tiny`` is the family's TAESD, of the class AutoencoderTiny, with its own weights."""
    from diffusers import AutoencoderTiny

    sources = find(family, tiny_repos, "fp16", vae="tiny")
    assert hub.repos() == {repo}
    assert (sources.vae, sources.vae_revision) == (repo, COMMIT)
    assert_same(load(sources.parts["vae"], family), AutoencoderTiny.from_pretrained(str(tiny_repos / repo)))


def test_revision_is_the_bases_and_stays_pinned(hub: FakeHub) -> None:
    """--revision goes to the base alone; after the first file, the rest is asked of the commit it was found at."""
    sources = find_sources(SDXL, SourceOptions(revision="v9"), "fp16")
    revisions = {repo: [r for name, _, r in hub.asked if name == repo] for repo in hub.repos()}
    assert revisions[SDXL_REPO][0] == "v9"
    assert set(revisions[SDXL_REPO][1:]) == {COMMIT}
    assert revisions["ByteDance/Hyper-SD"] == [None]
    assert revisions["madebyollin/sdxl-vae-fp16-fix"][0] is None
    assert (sources.base_revision, sources.vae_revision) == (COMMIT, COMMIT)


def test_a_missing_lora_is_reported_before_gigabytes_are_downloaded(hub: FakeHub) -> None:
    """A mistyped --lora must not cost a download of the base's weights first."""
    with pytest.raises(WeightsError, match=r"nowhere\.safetensors"):
        find_sources(SDXL, SourceOptions(checkpoint_file="nowhere.safetensors"), "fp16")
    assert not [file for _, file, _ in hub.asked if file.endswith(".safetensors")]


# --- local folders ---------------------------------------------------------------------------------------------------


@FAMILIES
def test_a_local_folder_needs_no_hub(family: str, tiny_repos: Path) -> None:
    """--base and --lora local: everything loads as diffusers loads it (the tests run with HF_HUB_OFFLINE)."""
    from diffusers import DiffusionPipeline

    sources = find(family, tiny_repos)
    pipe: Any = DiffusionPipeline.from_pretrained(str(tiny_repos / BASES[family]))
    for name, part in sources.parts.items():
        assert_same(load(part, family), getattr(pipe, name))
    assert sources.base == str((tiny_repos / BASES[family]).resolve())
    assert sources.base_revision is None
    assert set(sources.tokenizers) == {"sd15": {"tokenizer"}, "sdxl": {"tokenizer", "tokenizer_2"}}[family]


@pytest.mark.parametrize("below", ["", "vae"])
def test_vae_folder(below: str, tiny_repos: Path, tmp_path: Path) -> None:
    """--vae takes a VAE's own folder, and a whole model's, whose vae/ it takes."""
    from diffusers import AutoencoderKL

    fixed = tiny_repos / "madebyollin/sdxl-vae-fp16-fix"
    shutil.copytree(fixed, tmp_path / "model" / below, dirs_exist_ok=True)
    sources = find("sdxl", tiny_repos, "fp16", vae=str(tmp_path / "model"))
    assert sources.vae == str((tmp_path / "model").resolve())
    assert_same(load(sources.parts["vae"], "sdxl"), AutoencoderKL.from_pretrained(str(fixed)))


def test_given_vae_wins_over_the_fixed_one(tiny_repos: Path, hub: FakeHub) -> None:
    """--vae with the base's own folder takes SDXL's own VAE in fp16, too, and it then stays float32."""
    sources = find("sdxl", tiny_repos, "fp16", vae=str(tiny_repos / SDXL_REPO))
    assert hub.asked == []
    assert sources.parts["vae"].weights[0].path == tiny_repos / SDXL_REPO / "vae/diffusion_pytorch_model.safetensors"
    records = {name: tuple(f.record() for f in files) for name, files in sources.weights.items()}
    shapes = image_shapes(ShapeOptions(), 64)
    exports = component_exports(SDXL, sources, records, shapes, "fp16")
    assert {export.name: export.precision.name for export in exports} == {
        "text_encoder": "fp16", "text_encoder_2": "fp16", "vae_encoder": "fp32", "vae_decoder": "fp32",
        "unet": "fp16",
    }  # fmt: skip


def test_whole_unet_takes_the_place_of_the_bases(tiny_repos: Path) -> None:
    """Hyper-SDXL-1step-Unet: --lora is that UNet's file; its weights, the base's configuration, nothing fused."""
    file = tiny_repos / "ByteDance/Hyper-SD/Hyper-SDXL-1step-Unet.safetensors"
    options = SourceOptions(base=str(tiny_repos / SDXL_REPO), checkpoint_file=str(file))
    sources = find_sources(WHOLE_UNET, options, "fp32")
    assert sources.lora is None
    check_unet_sources(sources.parts["unet"], "sdxl")
    loaded, stored = load(sources.parts["unet"], "sdxl").state_dict(), load_file(file)
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[name], weight) for name, weight in stored.items())
    assert not torch.equal(
        loaded["conv_in.weight"], load(find("sdxl", tiny_repos).parts["unet"], "sdxl").state_dict()["conv_in.weight"]
    )


@pytest.mark.parametrize("name", ["Hyper-SDXL-4steps-lora", "Hyper-SD15-4steps-lora"])
def test_a_lora_in_place_of_the_whole_unet(name: str, tiny_repos: Path) -> None:
    """A LoRA given where a whole UNet is wanted is refused from its header, keys listed."""
    options = SourceOptions(
        base=str(tiny_repos / SDXL_REPO), checkpoint_file=str(tiny_repos / f"ByteDance/Hyper-SD/{name}.safetensors")
    )
    sources = find_sources(WHOLE_UNET, options, "fp32")
    with pytest.raises(WeightsError) as error:
        check_unet_sources(sources.parts["unet"], "sdxl")
    one_line(error, name, "left over: lora_unet_", "missing: add_embedding")


# --- the published files' own layouts --------------------------------------------------------------------------------


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize(("name", "max_shard"), [("unet", "500KB"), ("text_encoder", "50KB"), ("vae", "100KB")])
def test_shards_and_variants_as_the_libraries_write_them(
    name: str, max_shard: str, variant: str | None, sharded: bool, tiny_repos: Path, tmp_path: Path
) -> None:
    """Whole or in shards, plain or fp16 files: what save_pretrained writes is found, every shard recorded, and loaded.

    An fp16 variant is taken without asking where there is nothing else.
    """
    base = DiffusersBase(LocalFolder(tiny_repos / SD15_REPO))
    model: Any = load(base.part(name), "sd15")
    if variant:
        model = model.half()
    model.save_pretrained(tmp_path / name, max_shard_size=max_shard if sharded else "10GB", variant=variant)
    files = sorted(path.name for path in (tmp_path / name).glob("*.safetensors"))
    assert (len(files) > 1) == sharded, files
    part = DiffusersBase(LocalFolder(tmp_path)).part(name)
    assert sorted(found.path.name for found in part.weights) == files
    assert part.variant == variant
    assert_same(load(part, "sd15", model.dtype), model)


@pytest.mark.parametrize(
    ("there", "asked", "expected"),
    [
        ({None, "fp16"}, None, None),
        ({None, "fp16"}, "fp16", "fp16"),
        ({None}, None, None),
        ({"fp16"}, None, "fp16"),
        ({"fp16"}, "fp16", "fp16"),
        ({None}, "fp16", None),
        (set(), None, "refused"),
    ],
)
@pytest.mark.parametrize("name", ["unet", "text_encoder", "vae"])
def test_the_variant_that_is_taken(
    name: str, there: set[str | None], asked: str | None, expected: str | None, tiny_repos: Path, tmp_path: Path
) -> None:
    """The full files unless --variant fp16 is given or there are none; a part without it comes at full size."""
    base = DiffusersBase(LocalFolder(tiny_repos / SD15_REPO))
    model: Any = load(base.part(name), "sd15")
    model.save_pretrained(tmp_path / name)
    weights = next((tmp_path / name).glob("*.safetensors"))
    if "fp16" in there:
        tensors = {key: tensor.half() for key, tensor in load_file(weights).items()}
        save_file(tensors, weights.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
    if None not in there:
        weights.unlink()
    folder = DiffusersBase(LocalFolder(tmp_path))
    if expected == "refused":
        with pytest.raises(WeightsError) as error:
            folder.part(name, asked)
        one_line(error, "has no", ".safetensors", ".ckpt")
        return
    part = folder.part(name, asked)
    assert part.variant == expected
    first = next(weight for weight in load(part, "sd15").state_dict().values() if weight.is_floating_point())
    assert torch.equal(first, first.half().float()) == (expected == "fp16")


def test_text_encoder_with_the_published_key_names(tiny_repos: Path, copy_base: Callable[[str], Path]) -> None:
    """The files on the Hub were written by older libraries: keys under ``text_model.``, position ids stored."""
    folder = copy_base("sd15")
    path = folder / "text_encoder/model.safetensors"
    tensors = {f"text_model.{key.removeprefix('text_model.')}": tensor for key, tensor in load_file(path).items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, path, metadata={"format": "pt"})
    theirs = load(DiffusersBase(LocalFolder(tiny_repos / SD15_REPO)).part("text_encoder"), "sd15")
    assert_same(load(DiffusersBase(LocalFolder(folder)).part("text_encoder"), "sd15"), theirs)


def test_vae_with_the_published_key_names(tiny_repos: Path, copy_base: Callable[[str], Path]) -> None:
    """SD1.5's VAE on the Hub has diffusers' first names for the attention's layers."""
    folder = copy_base("sd15")
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(path)
    for name in [name for name in tensors if "attentions" in name]:
        for new, first in old.items():
            if f".{new}." in name:
                tensors[name.replace(f".{new}.", f".{first}.")] = tensors.pop(name)
    assert sum("proj_attn" in name for name in tensors) == 4
    save_file(tensors, path, metadata={"format": "pt"})
    theirs = load(DiffusersBase(LocalFolder(tiny_repos / SD15_REPO)).part("vae"), "sd15")
    assert_same(load(DiffusersBase(LocalFolder(folder)).part("vae"), "sd15"), theirs)


# --- demonstration weights, in the clone ------------------------------------------------------------------------------


def precisions(checkpoint: Checkpoint, sources: Sources) -> set[str]:
    """The types of an fp16 bundle's components."""
    records = {name: tuple(f.record() for f in files) for name, files in sources.weights.items()}
    exports = component_exports(checkpoint, sources, records, image_shapes(ShapeOptions(), 64), "fp16")
    return {export.precision.name for export in exports}


@pytest.mark.parametrize("checkpoint", DEMO_CHECKPOINTS, ids=lambda c: c.name)
def test_demonstration_checkpoints_come_from_the_clone(checkpoint: Checkpoint, hub: FakeHub) -> None:
    """With nothing said: its own base with that one's VAE, also in fp16, and its own file; the Hub is not asked.

    They are recorded by the folder's name, as Hub files are by their repository's: no path of this machine.
    """
    sources = find_sources(checkpoint, SourceOptions(), "fp16")
    assert hub.asked == []
    base = {"sd15": "Demo15", "sdxl": "DemoXL"}[checkpoint.family]
    assert (sources.base, sources.base_revision, sources.vae, sources.vae_revision) == (base, None, None, None)
    own = "lora" if checkpoint.kind == "lora" else "unet"
    for name, files in sources.weights.items():
        (record,) = [file.record() for file in files]
        assert (record.repo, record.revision, record.path) == ("Hyper-Demo" if name == own else base, None, None)
        assert files[0].path == DEMO_ROOT / str(record.repo) / record.filename
    assert sources.weights[own][0].filename == f"{checkpoint.name}.safetensors"
    assert precisions(checkpoint, sources) == {"fp16"}, "their VAE does not overflow"
    check_sources(sources, checkpoint.family)


@pytest.mark.parametrize("checkpoint", [DEMO15, DEMOXL], ids=lambda c: c.name)
def test_tiny_vae_of_the_demonstration(checkpoint: Checkpoint, hub: FakeHub) -> None:
    """``--vae tiny`` is the clone's own TAESD, one for both families."""
    from diffusers import AutoencoderTiny

    sources = find_sources(checkpoint, SourceOptions(vae="tiny"), "fp16")
    assert hub.asked == []
    assert (sources.vae, sources.vae_revision) == ("taesd-Demo", None)
    expected = AutoencoderTiny.from_pretrained(str(DEMO_ROOT / "taesd-Demo"))
    assert_same(load(sources.parts["vae"], checkpoint.family), expected)


def test_options_replace_what_the_demonstration_has(hub: FakeHub, tiny_repos: Path) -> None:
    """--base, --lora and --vae hold for these checkpoints as for others."""
    lora = tiny_repos / "ByteDance/Hyper-SD" / SD15.filename
    options = SourceOptions(base=str(tiny_repos / SD15_REPO), checkpoint_file=str(lora), vae="madebyollin/taesd")
    sources = find_sources(DEMO15, options, "fp32")
    assert sources.base == str((tiny_repos / SD15_REPO).resolve())
    assert sources.lora is not None
    assert sources.lora.path == lora
    assert (sources.vae, hub.repos()) == ("madebyollin/taesd", {"madebyollin/taesd"})


def test_demonstration_folders_by_name(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--base and --vae take their names for any checkpoint, whatever lies in the current folder: ./NAME is that."""
    (tmp_path / "Demo15/vae").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    sources = find_sources(SD15, SourceOptions(base="Demo15", vae="taesd-Demo"), "fp32")
    assert (sources.base, sources.vae) == ("Demo15", "taesd-Demo")
    assert hub.repos() == {"ByteDance/Hyper-SD"}
    with pytest.raises(WeightsError) as error:
        find_sources(SD15, SourceOptions(base="./Demo15"), "fp32")
    one_line(error, str(tmp_path / "Demo15"), "model_index.json")


def test_a_single_file_base_of_the_demonstration(hub: FakeHub, tiny_repos: Path, tmp_path: Path) -> None:
    """Configuration and tokenizer are those of the checkpoint's own base, in the clone."""
    file = tmp_path / "base.safetensors"
    save_file({"cond_stage_model.transformer.x": torch.ones(1)}, file)
    sources = find_sources(DEMO15, SourceOptions(base=str(file)), "fp32")
    assert hub.asked == []
    assert sources.parts["unet"].folder == DEMO_ROOT / "Demo15/unet"
    assert sources.tokenizers == {"tokenizer": DEMO_ROOT / "Demo15/tokenizer"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (SourceOptions(base="DemoXL"), ["DemoXL holds a SDXL model", "needs SD1.5", "such as Demo15"]),
        (SourceOptions(revision="main"), ["--base Demo15", "leave --revision out"]),
        (SourceOptions(base="Demo16"), ["--base 'Demo16'", "neither a folder"]),
    ],
    ids=["family", "revision", "name"],
)
def test_options_that_the_demonstration_rejects(options: SourceOptions, words: list[str]) -> None:
    """The proposed base is the demonstration's, not a repository that its LoRAs do not fit."""
    with pytest.raises(WeightsError) as error:
        find_sources(DEMO15, options, "fp32")
    one_line(error, *words)


@pytest.mark.parametrize("options", [SourceOptions(), SourceOptions(vae="tiny")], ids=["base", "tiny"])
def test_installed_without_the_clone(
    options: SourceOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: FakeHub
) -> None:
    """The demonstration weights are no part of the package: the error says where they are."""
    monkeypatch.setattr("hypersd.export.repositories.DEMO_ROOT", tmp_path / "site-packages/tests/assets/demo")
    with pytest.raises(WeightsError) as error:
        find_sources(DEMO15, options, "fp32")
    one_line(error, str(tmp_path), "demonstration weights lie in the clone only")
    assert hub.asked == []


def test_a_demonstration_file_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clone without the one file: it is named."""
    for folder in ("Demo15", "Hyper-Demo"):
        shutil.copytree(DEMO_ROOT / folder, tmp_path / folder)
    (tmp_path / "Hyper-Demo" / DEMO15.filename).unlink()
    monkeypatch.setattr("hypersd.export.repositories.DEMO_ROOT", tmp_path)
    with pytest.raises(WeightsError) as error:
        find_sources(DEMO15, SourceOptions(), "fp32")
    one_line(error, str(tmp_path / "Hyper-Demo" / DEMO15.filename), "git")


# --- single files ----------------------------------------------------------------------------------------------------

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0", "conv_out": "out.2", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
OPEN_CLIP = {
    "self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}  # fmt: skip


def ldm_unet(unet: Any) -> dict[str, Tensor]:
    """A diffusers UNet under the original Stable Diffusion's names."""
    layers = unet.config.layers_per_block
    places: dict[str, str] = dict(UNET_ENDS)
    for i, block in enumerate(unet.down_blocks):
        for j in range(layers):
            places[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{(layers + 1) * i + j + 1}.0"
            places[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{(layers + 1) * i + j + 1}.1"
        if block.downsamplers:
            places[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{(layers + 1) * (i + 1)}.0.op"
    for i, block in enumerate(unet.up_blocks):
        for j in range(layers + 1):
            places[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{(layers + 1) * i + j}.0"
            places[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{(layers + 1) * i + j}.1"
        slot = 2 if getattr(block, "has_cross_attention", False) else 1
        places[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{(layers + 1) * i + layers}.{slot}.conv"
    places |= {f"mid_block.{kind}.{i}": f"middle_block.{at}"
               for kind, i, at in [("resnets", 0, 0), ("attentions", 0, 1), ("resnets", 1, 2)]}  # fmt: skip
    return {f"model.diffusion_model.{_renamed(name, places, RESNET)}": t for name, t in unet.state_dict().items()}


def ldm_vae(vae: Any) -> dict[str, Tensor]:
    """A diffusers VAE under the original names; its attention's layers are 1x1 convolutions there."""
    count = len(vae.config.block_out_channels)
    places = {}
    for coder, side in (("encoder", "down"), ("decoder", "up")):
        for i in range(count):
            at = i if side == "down" else count - 1 - i
            for j in range(vae.config.layers_per_block + 1):
                places[f"{coder}.{side}_blocks.{i}.resnets.{j}"] = f"{coder}.{side}.{at}.block.{j}"
            places[f"{coder}.{side}_blocks.{i}.{side}samplers.0"] = f"{coder}.{side}.{at}.{side}sample"
        places |= {f"{coder}.mid_block.resnets.{i}": f"{coder}.mid.block_{i + 1}" for i in range(2)}
        places |= {f"{coder}.mid_block.attentions.0": f"{coder}.mid.attn_1", f"{coder}.conv_norm_out":
                   f"{coder}.norm_out"}  # fmt: skip
    leaves = {"conv_shortcut": "nin_shortcut", "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v",
              "to_out.0": "proj_out"}  # fmt: skip
    renamed = {}
    for name, tensor in vae.state_dict().items():
        is_projection = "attentions" in name and tensor.dim() == 2
        renamed[f"first_stage_model.{_renamed(name, places, leaves)}"] = (
            tensor[:, :, None, None].clone() if is_projection else tensor
        )
    return renamed


def _renamed(name: str, places: dict[str, str], leaves: dict[str, str]) -> str:
    """``PLACE.LEAF.weight`` with place and leaf in the other naming; inside attentions the names are the same."""
    place = max((p for p in places if name.startswith(f"{p}.")), key=len, default="")
    rest = name[len(place) + 1 :] if place else name
    leaf = max((old for old in leaves if rest.startswith(f"{old}.")), key=len, default=None)
    if leaf is not None:
        rest = leaves[leaf] + rest[len(leaf) :]
    return f"{places[place]}.{rest}" if place else rest


def clip_names(encoder: Any) -> dict[str, Tensor]:
    """A CLIP text encoder's weights as OpenAI's repository names them (``text_model.``)."""
    names = {}
    for name, tensor in encoder.state_dict().items():
        inside = name.startswith(("text_model.", "text_projection"))
        names[name if inside else f"text_model.{name}"] = tensor
    return names


def open_clip(encoder: Any) -> dict[str, Tensor]:
    """A CLIP text encoder under OpenCLIP's names: q, k and v in one, the projection transposed."""
    source = {name.removeprefix("text_model."): tensor for name, tensor in clip_names(encoder).items()}
    renamed = {
        "token_embedding.weight": source.pop("embeddings.token_embedding.weight"),
        "positional_embedding": source.pop("embeddings.position_embedding.weight"),
        "ln_final.weight": source.pop("final_layer_norm.weight"),
        "ln_final.bias": source.pop("final_layer_norm.bias"),
        "text_projection": source.pop("text_projection.weight").T.contiguous(),
        "logit_scale": torch.tensor(4.6),
    }
    for i in range(encoder.config.num_hidden_layers):
        there = f"transformer.resblocks.{i}"
        for leaf in ("weight", "bias"):
            split = [source.pop(f"encoder.layers.{i}.self_attn.{p}_proj.{leaf}") for p in "qkv"]
            renamed[f"{there}.attn.in_proj_{leaf}"] = torch.cat(split)
            for ours, theirs in OPEN_CLIP.items():
                renamed[f"{there}.{theirs}.{leaf}"] = source.pop(f"encoder.layers.{i}.{ours}.{leaf}")
    assert not source
    return renamed


def single_file(root: Path, family: str) -> dict[str, Tensor]:
    """A tiny base as the one-file checkpoints of CompVis and Stability AI hold it, with what else they hold."""
    base = DiffusersBase(LocalFolder(root / BASES[family]))
    tensors = ldm_unet(load(base.part("unet"), family)) | ldm_vae(load(base.part("vae"), family))
    first = {f"transformer.{name}": t for name, t in clip_names(load(base.part("text_encoder"), family)).items()}
    first["transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    prefix = "cond_stage_model." if family == "sd15" else "conditioner.embedders.0."
    tensors |= {prefix + name: tensor for name, tensor in first.items()}
    if family == "sdxl":
        second = open_clip(load(base.part("text_encoder_2"), family))
        tensors |= {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in second.items()}
    tensors |= {"alphas_cumprod": torch.linspace(1, 0, 1000), "denoiser.sigmas": torch.linspace(0, 14, 1000)}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


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


def load_all(family: str, base: Path, tiny_repos: Path) -> None:
    """Go through what an export does before it traces anything."""
    sources = find(family, tiny_repos, base=str(base))
    check_sources(sources, family)
    for part in sources.parts.values():
        load(part, family)


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


# --- what is wrong ---------------------------------------------------------------------------------------------------


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


def test_a_bad_size_is_reported_before_gigabytes_are_downloaded(hub: FakeHub, tmp_path: Path) -> None:
    """Errors of the command itself are reported before any weights are requested."""
    from hypersd.export import ExportOptions, export_bundle

    for shapes in (ShapeOptions(height=100), ShapeOptions(batch=0), ShapeOptions(dynamic={"width": (8, 8, 8)})):
        with pytest.raises(RequestError):
            export_bundle("Hyper-SDXL-1step-lora", tmp_path / "out", ExportOptions(shapes=shapes))
        assert not [file for _, file, _ in hub.asked if file.endswith(".safetensors")], shapes


def test_sources_are_recorded_with_their_origin(hub: FakeHub, tiny_repos: Path) -> None:
    """Hub files are recorded by repository and commit, local ones by path; both with size and hash of the contents."""
    from hashlib import sha256

    found = find_sources(SD15, SourceOptions(), "fp32").weights["lora"][0].record()
    path = tiny_repos / "ByteDance/Hyper-SD" / SD15.filename
    assert (found.repo, found.revision, found.path) == ("ByteDance/Hyper-SD", COMMIT, None)
    assert (found.size, found.sha256) == (path.stat().st_size, sha256(path.read_bytes()).hexdigest())
    local = Found(path, path.name).record()
    assert (local.repo, local.revision, local.path) == (None, None, str(path.resolve()))
    assert local.sha256 == found.sha256
