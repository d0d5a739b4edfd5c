"""The files that an export takes: from the Hub, local folders and the clone, in every layout and variant they have."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from make_tiny_repos import SD15_REPO, SDXL_REPO
from safetensors.torch import load_file, save_file

from hypersd.errors import RequestError, WeightsError
from hypersd.export.checkpoints import CHECKPOINTS, DEMO_CHECKPOINTS, Checkpoint, find_checkpoint
from hypersd.export.component_exports import component_exports
from hypersd.export.layout import DiffusersBase
from hypersd.export.models import check_sources, check_unet_sources
from hypersd.export.repositories import Found, LocalFolder
from hypersd.export.shapes import ShapeOptions, image_shapes
from hypersd.export.sources import SourceOptions, find_sources

from .fake_hub import BASES, COMMIT, FakeHub
from .tiny_sources import DEMO15, DEMOXL, FAMILIES, SD15, SDXL, assert_same, find, load, one_line, precisions

WHOLE_UNET = find_checkpoint("Hyper-SDXL-1step-Unet")
DEMO_ROOT = Path(__file__).parents[1] / "assets/demo"


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


# --- demonstration weights, in the clone -----------------------------------------------------------------------------


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
