"""``--add-lora``: where LoRAs are found, which components depend on them, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_writers import kohya, pairs, random_lora
from safetensors.torch import save_file

from hypersd.engines.hub import HubFile
from hypersd.errors import RequestError, WeightsError
from hypersd.export import ExportOptions, export_bundle
from hypersd.export.checkpoints import find_checkpoint
from hypersd.export.component_exports import component_exports
from hypersd.export.lora_sources import LoraSource, find_added
from hypersd.export.models import check_sources
from hypersd.export.shapes import ShapeOptions, image_shapes
from hypersd.export.sources import SourceOptions, Sources, find_sources

NAME = "Hyper-SD15-1step-lora"
FC1, CONV = {"text_encoder": {"encoder.layers.0.mlp.fc1": (37, 32)}}, {"unet": {"conv_in": (32, 4, 3, 3)}}
Find = Callable[..., Sources]


@pytest.fixture
def loras(tmp_path: Path) -> dict[str, Path]:
    """A LoRA for the UNet alone, and one for the text encoder too."""
    paths = {name: tmp_path / f"{name}.safetensors" for name in ("unet", "both")}
    save_file(kohya(random_lora(CONV, 1.0)), paths["unet"])
    save_file(kohya(random_lora({**CONV, **FC1}, 1.0)), paths["both"])
    return paths


@pytest.fixture
def find(source_options: Callable[..., SourceOptions]) -> Find:
    """``find(*LORA)``: the sources of a checkpoint with these added, as ``--add-lora`` takes them."""

    def run(*added: str) -> Sources:
        options = source_options(NAME, added_loras=tuple(map(LoraSource.parse, added)))
        return find_sources(find_checkpoint(NAME), options, "fp32")

    return run


def keys(sources: Sources, lora_scale: float = 1.0) -> dict[str, str]:
    """The components' keys."""
    records = {name: tuple(f.record() for f in files) for name, files in sources.weights.items()}
    loras = check_sources(sources, "sd15", lora_scale).loras
    shapes = image_shapes(ShapeOptions(height=64, width=64), 64)
    exports = component_exports(find_checkpoint(NAME), sources, records, shapes, "fp32", loras)
    return {export.name: export.key for export in exports}


def test_components_depend_on_the_loras_that_change_them(find: Find, loras: dict[str, Path]) -> None:
    """File, scale and order count, for those components alone that the file has layers for."""
    unet, both = str(loras["unet"]), str(loras["both"])
    plain = keys(find())
    variants = [keys(find(*added)) for added in ([unet], [f"{unet}:0.5"], [both], [unet, both], [both, unet])]
    unets = [variant["unet"] for variant in (plain, *variants)]
    assert len(set(unets)) == len(unets)
    encoders = [variant["text_encoder"] for variant in (plain, *variants)]
    assert encoders[0] == encoders[1] == encoders[2] != encoders[3] == encoders[4] == encoders[5]
    for half in ("vae_encoder", "vae_decoder"):
        assert {variant[half] for variant in (plain, *variants)} == {plain[half]}
    assert keys(find(), 0.5)["unet"] != plain["unet"]
    assert keys(find(), 0.5)["text_encoder"] == plain["text_encoder"]


def test_peft_settings_beside_the_file_count(find: Find, tmp_path: Path) -> None:
    """Its configuration changes the weights as the file does: it is recorded, and another one makes another UNet."""
    tensors = pairs(random_lora(CONV), ".lora_A.weight", ".lora_B.weight", lambda place: f"base_model.model.{place[1]}")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    found = []
    for alpha in (1, 2):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": alpha, "r": 2}))
        sources = find(str(tmp_path))
        assert [file.filename for file in sources.weights["added_lora/1"]] == [
            "adapter_model.safetensors", "adapter_config.json",
        ]  # fmt: skip
        found.append(keys(sources)["unet"])
    assert found[0] != found[1]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["style.safetensors"], "style.safetensors"),
        (["style.safetensors", "pytorch_lora_weights.safetensors"], "pytorch_lora_weights.safetensors"),
        (["a.safetensors", "adapter_model.safetensors"], "adapter_model.safetensors"),
    ],
)
def test_the_file_of_a_folder(names: list[str], expected: str, tmp_path: Path) -> None:
    """The one that diffusers or peft would write, or the only one."""
    for name in names:
        save_file({"x": torch.ones(1)}, tmp_path / name)
    assert [file.filename for file in find_added(LoraSource(location=str(tmp_path)), None).files] == [expected]


@pytest.mark.parametrize("names", [[], ["a.safetensors", "b.safetensors"], ["pytorch_lora_weights.bin"]])
def test_a_folder_without_one_lora_asks_for_its_name(names: list[str], tmp_path: Path) -> None:
    for name in names:
        save_file({"x": torch.ones(1)}, tmp_path / name)
    with pytest.raises(WeightsError, match=r"name the file, as in .*/FILE\.safetensors") as error:
        find_added(LoraSource(location=str(tmp_path)), None)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("location", ["nothing.safetensors", "owner/nothing.safetensors", "", "a b"])
def test_a_place_that_is_none(location: str) -> None:
    with pytest.raises(WeightsError, match="--add-lora") as error:
        find_added(LoraSource(location=location), None)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("owner/usual", ["pytorch_lora_weights.safetensors"]),
        ("owner/peft", ["adapter_model.safetensors", "adapter_config.json"]),
        ("owner/usual/more/style.safetensors", ["more/style.safetensors"]),
    ],
)
def test_repositories_on_the_hub(
    location: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The usual names, or the file that is named; the record pins the commit, so that verify finds the same again."""
    for name in ("usual/pytorch_lora_weights", "usual/more/style", "peft/adapter_model"):
        path = tmp_path / f"owner/{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"x": torch.ones(1)}, path)
    (tmp_path / "owner/peft/adapter_config.json").write_text("{}")
    asked = []

    def fetch_optional(repo_id: str, filename: str, *, revision: str | None = None, progress: object = None) -> Any:
        asked.append(revision)
        path = tmp_path / repo_id / filename
        return HubFile(path=path, repo_id=repo_id, filename=filename, revision="c0") if path.is_file() else None

    monkeypatch.setattr("hypersd.export.repositories.fetch_optional", fetch_optional)
    files = find_added(LoraSource(location=location, scale=0.5, revision="main"), None).files
    assert [file.filename for file in files] == expected
    assert {(file.repo, file.revision) for file in files} == {("/".join(location.split("/")[:2]), "c0")}
    assert asked[0] == "main"


@pytest.mark.parametrize(
    ("text", "location", "scale"),
    [
        ("x.safetensors", "x.safetensors", 1.0),
        ("a/b:0.8", "a/b", 0.8),
        ("a/b/c:-1", "a/b/c", -1),
    ],
)
def test_a_place_and_its_scale(text: str, location: str, scale: float) -> None:
    assert LoraSource.parse(text) == LoraSource(location=location, scale=scale)


def test_a_file_whose_name_has_a_colon(tmp_path: Path) -> None:
    """A file that exists is meant, also if its name looks like one with a scale."""
    save_file({"x": torch.ones(1)}, tmp_path / "style:0.5")
    assert LoraSource.parse(str(tmp_path / "style:0.5")).scale == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [("x:", "is no scale"), ("x:big", "is no scale"), ("x:nan", "out of range"), ("x:11", "out of range"),
     ("x:0", "adds nothing"), ("x:-0.0", "adds nothing")],
)  # fmt: skip
def test_scales_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as error:
        LoraSource.parse(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", [{"lora_scale": 0.0}, {"sources": SourceOptions(added_loras=(
    LoraSource(location="x", scale=0.0),))}])  # fmt: skip
def test_a_scale_that_adds_nothing_is_refused_from_python(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="0 adds nothing of the LoRA"):
        export_bundle(NAME, tmp_path / "out", ExportOptions(**options))
    assert not list(tmp_path.iterdir())


def test_an_added_lora_of_another_family_is_named(find: Find, tiny_repos: Path) -> None:
    lora = tiny_repos / "ByteDance/Hyper-SD/Hyper-SDXL-1step-lora.safetensors"
    with pytest.raises(WeightsError, match=r"is a LoRA for SDXL, the base is SD1\.5"):
        check_sources(find(str(lora)), "sd15")


def test_an_added_lora_that_is_not_finite_is_named(find: Find, tmp_path: Path) -> None:
    """Before anything is traced; the base is read only later."""
    tensors = kohya(random_lora(CONV, 1.0))
    tensors["lora_unet_conv_in.lora_up.weight"][0] = float("inf")
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(WeightsError, match=r"bad\.safetensors: lora_unet_conv_in\.lora_up\.weight holds a NaN"):
        check_sources(find(str(tmp_path / "bad.safetensors")), "sd15")
