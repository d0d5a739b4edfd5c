"""Repeated exports: a finished bundle stays or is replaced on request, and finished components are used again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from make_tiny_repos import SD15_REPO
from safetensors.torch import load_file, save_file

from hypersd.engines.bundle import Bundle
from hypersd.errors import UserError
from hypersd.export import ExportOptions, export_bundle
from hypersd.export.checkpoints import HYPER_SD_REPO, find_checkpoint
from hypersd.export.component_exports import component_exports, tool_versions
from hypersd.export.shapes import ShapeOptions, image_shapes
from hypersd.export.sources import SourceOptions, find_sources

from .export_runs import ONE, PARTS, TWO, Run, left_in, state

# --- outputs that are there already ----------------------------------------------------------------------------------


OTHERS: dict[str, dict[str, Any]] = {
    "lora scale": {"lora_scale": 0.75},
    "precision": {"precision": "fp16"},
    "checkpoint": {"name": TWO},
    "size": {"shapes": ShapeOptions(height=128)},
    "ranges": {"shapes": ShapeOptions(dynamic={"batch": (1, 1, 2)})},
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_inputs_need_replace(what: str, run: Run, cheap: Any, tmp_path: Path) -> None:
    """A bundle of other inputs is never overwritten unasked: the refusal names --replace, which then works."""
    run()
    before = state(tmp_path / "out")
    with pytest.raises(UserError, match="--replace") as error:
        run(**OTHERS[what])
    assert "\n" not in str(error.value)
    assert state(tmp_path / "out") == before
    assert left_in(tmp_path) == ["out"]
    bundle, _ = run(**OTHERS[what], replace=True)
    assert state(tmp_path / "out") != before
    assert Bundle.load(tmp_path / "out", hashes=True).manifest == bundle.manifest
    assert left_in(tmp_path) == ["out"]
    _, again = run(**OTHERS[what])
    assert "is done already" in again.notes[0]


def test_replace_of_the_same_inputs_changes_nothing(run: Run, cheap: Any, tmp_path: Path) -> None:
    """--replace replaces a bundle of other inputs; one that is right already stays."""
    run()
    before = state(tmp_path / "out")
    _, again = run(replace=True)
    assert again.started == ["hash the weight files"]
    assert state(tmp_path / "out") == before


@pytest.mark.parametrize("weights", ["base", "lora", "config"])
def test_changed_source_files_are_seen(weights: str, run: Run, cheap: Any, tiny_repos: Path, tmp_path: Path) -> None:
    """The same paths with other contents are other inputs."""
    base = Path(shutil.copytree(tiny_repos / SD15_REPO, tmp_path / "base"))
    lora = Path(shutil.copy(tiny_repos / HYPER_SD_REPO / f"{ONE}.safetensors", tmp_path / "lora.safetensors"))
    run(base=str(base), lora=str(lora))
    if weights == "config":
        path = base / "vae/config.json"
        path.write_text(path.read_text().replace("0.18215", "0.5"))
    else:
        path = lora if weights == "lora" else base / "unet/diffusion_pytorch_model.safetensors"
        tensors = load_file(path)
        name = next(name for name in sorted(tensors) if name.endswith("conv1.weight") or "lora_up" in name)
        tensors[name] = tensors[name] + 1
        save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="--replace"):
        run(base=str(base), lora=str(lora))


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_other_folders_and_files_are_not_touched(
    kind: str, replace: bool, run: Run, cheap: Any, tmp_path: Path
) -> None:
    """A folder with someone's files, or a file: refused in one line, --replace or not, and left as it was."""
    out = tmp_path / "out"
    if kind == "folder":
        (out / "holidays").mkdir(parents=True)
        (out / "holidays/image.png").write_bytes(b"precious")
    else:
        out.write_bytes(b"precious")
    before = state(tmp_path)
    with pytest.raises(UserError, match="is not a bundle: choose another --out") as error:
        run(replace=replace)
    assert "\n" not in str(error.value)
    after = state(tmp_path)
    assert {name: after[name] for name in before if name != "."} == {n: s for n, s in before.items() if n != "."}
    assert left_in(tmp_path) == ["out"]


def test_an_empty_folder_may_be_the_output(run: Run, cheap: Any, tmp_path: Path) -> None:
    """mkdir out; export --out out."""
    (tmp_path / "out").mkdir()
    run()
    Bundle.load(tmp_path / "out", hashes=True)


def test_the_current_folder_may_be_the_output(
    cheap: Any, source_options: Callable[..., SourceOptions], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mkdir out; cd out; export --out . works as --out ../out does."""
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    export_bundle(ONE, ".", ExportOptions(sources=source_options(ONE), precision="fp32"))
    Bundle.load(tmp_path / "out", hashes=True)
    assert left_in(tmp_path) == ["out"]


@pytest.mark.parametrize("damage", ["shortened", "missing", "manifest"])
def test_a_damaged_bundle_is_not_taken_for_done(damage: str, run: Run, cheap: Any, tmp_path: Path) -> None:
    """It is refused with the reason, and --replace makes it anew."""
    run()
    if damage == "manifest":
        (tmp_path / "out/bundle.json").write_text("{")
    else:
        path = tmp_path / "out/unet/model.onnx"
        path.unlink() if damage == "missing" else path.write_bytes(b"x")
    with pytest.raises(UserError) as error:
        run()
    assert "\n" not in str(error.value)
    run(replace=True)
    Bundle.load(tmp_path / "out", hashes=True)


def test_the_default_output_is_named_after_the_checkpoint(
    cheap: Any, source_options: Callable[..., SourceOptions], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bundles/NAME in the current folder, with the table's spelling."""
    monkeypatch.chdir(tmp_path)
    export_bundle(ONE.lower(), None, ExportOptions(sources=source_options(ONE), precision="fp32"))
    Bundle.load(tmp_path / "bundles" / ONE, hashes=True)


# --- components that are there already -------------------------------------------------------------------------------


def test_components_of_a_neighbour_are_linked(run: Run, cheap: Any, tmp_path: Path) -> None:
    """Beside another checkpoint of the same base only the UNet differs: the rest is linked, with a message."""
    run(ONE, "one")
    _, second = run(TWO, "two")
    assert second.traced == ["unet"]
    assert [note.split()[0] for note in second.notes] == PARTS[:3]
    for name in PARTS:
        pairs = [tmp_path / bundle / name / "model.onnx_data" for bundle in ("one", "two")]
        assert os.path.samefile(*pairs) == (name != "unet")
    Bundle.load(tmp_path / "two", hashes=True)


def test_a_bundle_for_text_alone_lacks_one_component(run: Run, cheap: Any, tmp_path: Path) -> None:
    """With --text-only the rest is that of a whole bundle; one does not pass for the other."""
    whole, _ = run(out="whole")
    bundle, second = run(out="text", text_only=True)
    assert second.traced == []
    assert set(whole.manifest.components) - set(bundle.manifest.components) == {"vae_encoder"}
    assert not (bundle.root / "vae_encoder").exists()
    with pytest.raises(UserError, match="--replace"):
        run(out="text")
    replaced, third = run(out="text", replace=True)
    assert third.traced == []
    assert replaced.manifest == whole.manifest


def test_an_interrupted_export_takes_components_of_a_neighbour(run: Run, cheap: Any, tmp_path: Path) -> None:
    """Reuse and resume together: a half-finished bundle is completed with components of its neighbour."""

    def fail(name: str) -> None:
        if name == "vae_decoder":
            raise KeyboardInterrupt

    cheap(fail)
    with pytest.raises(KeyboardInterrupt):
        run(TWO, "two")
    cheap(lambda name: None)
    run(ONE, "one")
    _, again = run(TWO, "two")
    assert again.traced == ["unet"]
    Bundle.load(tmp_path / "two", hashes=True)


def _other_text_weights(base: Path) -> None:
    path = base / "text_encoder/model.safetensors"
    tensors = {name: tensor + 0.5 for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def _other_text_config(base: Path) -> None:
    path = base / "text_encoder/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": "gelu"}))


NOT_REUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "precision": ({"precision": "fp16"}, PARTS),
    "batch": ({"shapes": ShapeOptions(batch=2)}, PARTS),
    "height": ({"shapes": ShapeOptions(height=72)}, ["vae_encoder", "vae_decoder", "unet"]),
    "range": ({"shapes": ShapeOptions(dynamic={"width": (64, 64, 128)})}, ["vae_encoder", "vae_decoder", "unet"]),
    "lora scale": ({"lora_scale": 0.5}, ["unet"]),
    "lora": ({"name": TWO}, ["unet"]),
    "guidance": ({"name": "Hyper-SD15-8steps-CFG-lora"}, ["unet"]),
}


@pytest.mark.parametrize("what", NOT_REUSED)
def test_components_of_other_inputs_are_not_reused(what: str, run: Run, cheap: Any) -> None:
    """Only the components that depend on the difference are made again."""
    changes, remade = NOT_REUSED[what]
    first, _ = run(out="first")
    bundle, second = run(out="second", **changes)
    assert second.traced == remade
    pairs = {name: (first.manifest.components[name], bundle.manifest.components[name]) for name in remade}
    differs = {one.graph != other.graph for one, other in pairs.values()}
    assert differs == {"lora" not in what}, "a LoRA changes weights alone"


@pytest.mark.parametrize("change", [_other_text_weights, _other_text_config], ids=["weights", "configuration"])
def test_other_contents_are_not_reused(
    change: Callable[[Path], None], run: Run, cheap: Any, tiny_repos: Path, tmp_path: Path
) -> None:
    """Weights and configurations count by content, not by path: a changed text encoder is made again, and only that."""
    base = Path(shutil.copytree(tiny_repos / SD15_REPO, tmp_path / "models/base"))
    run(out="first", base=str(base))
    change(base)
    _, second = run(out="second", base=str(base))
    assert second.traced == ["text_encoder"]
    _, elsewhere = run(out="third", base=str(shutil.copytree(base, tmp_path / "models/moved")))
    assert elsewhere.traced == []


def test_other_tools_are_not_reused(run: Run, cheap: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version of torch may make another graph: everything is made again."""
    run(out="first")
    versions = tool_versions() | {"torch": "99.0"}
    monkeypatch.setattr("hypersd.export.component_exports.tool_versions", lambda: versions)
    monkeypatch.setattr("hypersd.export.exporter.tool_versions", lambda: versions)
    with pytest.raises(UserError, match="--replace"):
        run(out="first")
    _, second = run(out="second")
    assert second.traced == PARTS


def test_the_unets_key_holds_its_latent_size(tiny_repos: Path, tmp_path: Path, source_options: Any) -> None:
    """A VAE with another number of levels makes other latents of the same image: the UNet's graph is another one."""
    base = Path(shutil.copytree(tiny_repos / SD15_REPO, tmp_path / "base"))
    keys = []
    for _ in range(2):
        sources = find_sources(find_checkpoint(ONE), source_options(ONE, base=str(base)), "fp32")
        records = {name: tuple(f.record() for f in files) for name, files in sources.weights.items()}
        shapes = image_shapes(ShapeOptions(height=64, width=64), 64)
        exports = component_exports(find_checkpoint(ONE), sources, records, shapes, "fp32")
        keys.append(next(export.key for export in exports if export.name == "unet"))
        config = base / "vae/config.json"
        values = json.loads(config.read_text())
        for name in ("block_out_channels", "up_block_types", "down_block_types"):
            values[name] = values[name][:3]
        config.write_text(json.dumps(values))
    assert keys[0] != keys[1]
