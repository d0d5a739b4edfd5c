"""ControlNets of an export: names, fitting ones, and exported components that compute the same as diffusers'."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from make_tiny_repos import controlnet as tiny_controlnet
from make_tiny_repos import sd15_unet, sdxl_unet
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hypersd.engines.manifest import ControlNetOrigin, ControlNetSettings
from hypersd.engines.specs import dim_range
from hypersd.errors import RequestError, WeightsError
from hypersd.export.checkpoints import DEMO_CONTROLNET
from hypersd.export.components import ComponentModule, unet_component
from hypersd.export.controlnet_components import (
    cond_embedding_component,
    controlled_unet_component,
    controlnet_component,
)
from hypersd.export.controlnet_sources import KNOWN_CONTROLNETS, ControlNetSource, named, residual_shapes, settings_of
from hypersd.export.models import load_controlnet
from hypersd.export.shapes import ShapeOptions, image_shapes
from hypersd.export.sources import SourceOptions, Sources, find_sources

from .fake_hub import BASES, COMMIT, FakeHub
from .tiny_sources import DEMO15, DEMOXL, ENTRIES, FAMILIES, assert_same, find, one_line

CANNY = {"sd15": "lllyasviel/control_v11p_sd15_canny", "sdxl": "diffusers/controlnet-canny-sdxl-1.0"}
UNETS = {"sd15": sd15_unet, "sdxl": sdxl_unet}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def copied(tiny_repos: Path, tmp_path: Path) -> Callable[..., Path]:
    """``copied(family, key=value)``: the tiny ControlNet, its configuration changed; a value ``...`` is taken out."""

    def copy_it(family: str, **changes: Any) -> Path:
        folder = Path(shutil.copytree(tiny_repos / CANNY[family], tmp_path / "canny"))
        config = json.loads((folder / "config.json").read_text()) | changes
        kept = {key: value for key, value in config.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(kept))
        return folder

    return copy_it


@pytest.fixture
def find_with(tiny_repos: Path) -> Callable[..., Sources]:
    """``find_with(family, location)``: the sources of a checkpoint of the family with the ControlNet at a place."""

    def find_it(family: str, location: object, **changes: Any) -> Sources:
        sources = (ControlNetSource.parse(str(location)),)
        return find(family, tiny_repos, controlnets=sources, **changes)

    return find_it


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "location"),
    [
        ("owner/name", "", "owner/name"),
        ("canny=owner/name", "canny", "owner/name"),
        ("a.b-c_1=x", "a.b-c_1", "x"),
        ("canny=./a=b", "canny", "./a=b"),
        ("./a=b", "", "./a=b"),
        ("/models/lr=1e-5/controlnet", "", "/models/lr=1e-5/controlnet"),
        ("C:\\lr=1e-5", "", "C:\\lr=1e-5"),
        ("canny=", "canny", ""),
        ("", "", ""),
    ],
)
def test_the_option_is_parsed(text: str, name: str, location: str) -> None:
    """WHERE or NAME=WHERE; a folder may have the sign in its name."""
    assert ControlNetSource.parse(text) == ControlNetSource(location=location, name=name)


@pytest.mark.parametrize("name", ["", ".", "..", "my net", "ä", "a:b", "a\nb", "\x1b[31m", "x" * 101])
def test_names_that_cannot_be_used(name: str) -> None:
    """Given with the option or in Python, the name of no folder is one line that says which are."""
    with pytest.raises(RequestError) as error:
        ControlNetSource.parse(f"{name}=owner/name")
    one_line(error, "--controlnet", "expected letters, digits")
    if name:  # an empty one takes the default
        with pytest.raises(RequestError) as error:
            named([ControlNetSource(location="owner/name", name=name)])
        one_line(error, "owner/name", "NAME=WHERE")


def test_default_names_are_the_last_part_of_the_place() -> None:
    """And the order is the one given: it is that of the export."""
    places = ["owner/net-1.0", "./b/", "/x/y.z", DEMO_CONTROLNET]
    sources = [ControlNetSource(location=place) for place in places]
    assert list(named(sources).items()) == list(zip(["net-1.0", "b", "y.z", DEMO_CONTROLNET], sources, strict=True))


@pytest.mark.parametrize("location", ["my controlnet", "models/my controlnet", ".", "..", "/", ""])
def test_places_whose_name_cannot_be_used(location: str) -> None:
    """A folder may be called anything: the message says how to give its ControlNet a name, and that works."""
    with pytest.raises(RequestError) as error:
        named([ControlNetSource.parse(location)])
    one_line(error, f"--controlnet {location}", "NAME=WHERE")
    source = ControlNetSource.parse(f"canny={location}")
    assert named([source]) == {"canny": source}


def test_two_of_the_same_name() -> None:
    """The second would replace the first; another name mends it, and the same component may be there twice."""
    first, second = ControlNetSource(location="a/canny"), ControlNetSource(location="b/canny")
    for twice in ([first, second], [first, first], [first, ControlNetSource.parse("canny=b/other")]):
        with pytest.raises(RequestError) as error:
            named(twice)
        one_line(error, twice[1].location, "two ControlNets are named 'canny'", "NAME=WHERE")
    assert list(named([first, ControlNetSource.parse("other=b/canny")])) == ["canny", "other"]
    assert list(named([first, ControlNetSource.parse("again=a/canny")])) == ["canny", "again"]


@pytest.mark.parametrize(
    ("location", "settings"),
    [
        ("diffusers/controlnet-canny-sdxl-1.0", ControlNetSettings(conditioning_scale=0.5, preprocess="canny")),
        ("lllyasviel/control_v11p_sd15_canny", ControlNetSettings(conditioning_scale=1.0, preprocess="canny")),
        ("lllyasviel/sd-controlnet-scribble", ControlNetSettings(conditioning_scale=1.0, preprocess="scribble")),
        (DEMO_CONTROLNET, ControlNetSettings(conditioning_scale=1.0, preprocess="canny")),
        ("somebody/controlnet", ControlNetSettings(conditioning_scale=1.0, preprocess="none")),
        ("somebody/controlnet-canny-sdxl-1.0", ControlNetSettings()),
    ],
)
def test_settings_of_known_locations(location: str, settings: ControlNetSettings) -> None:
    """The model cards' settings for the repositories that are known; nothing is guessed from a name."""
    assert settings_of(location) == settings


def test_every_known_controlnet_has_a_name_of_its_own() -> None:
    """All of them could be in one bundle without NAME=."""
    assert len(named(ControlNetSource(location=known.location) for known in KNOWN_CONTROLNETS)) == len(
        KNOWN_CONTROLNETS
    )


# --- where they come from --------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tiny_repos: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tiny_repos)
    monkeypatch.setattr("hypersd.export.repositories.fetch_optional", fake.fetch_optional)
    monkeypatch.setattr("hypersd.export.repositories.fetch", fake.fetch)
    return fake


@FAMILIES
def test_a_repository(family: str, hub: FakeHub) -> None:
    """Its revision goes to it alone, is pinned by the first file, and is what the bundle says of it."""
    source = ControlNetSource(location=CANNY[family], name="canny", revision="v9")
    sources = find_sources(ENTRIES[family], SourceOptions(controlnets=(source,)), "fp32")
    assert sources.controlnets == {"canny": ControlNetOrigin(location=CANNY[family], revision=COMMIT)}
    asked = [revision for repo, _, revision in hub.asked if repo == CANNY[family]]
    assert asked[0] == "v9"
    assert set(asked[1:]) == {COMMIT}
    assert "v9" not in [revision for repo, _, revision in hub.asked if repo != CANNY[family]]
    assert {found.repo for found in sources.weights["controlnet/canny"]} == {CANNY[family]}


@pytest.mark.parametrize("inside", [False, True], ids=["own", "pipeline"])
@FAMILIES
def test_a_folder(
    family: str, inside: bool, tiny_repos: Path, tmp_path: Path, find_with: Callable[..., Sources]
) -> None:
    """A ControlNet's own folder, and a whole pipeline's, whose controlnet/ is taken: with diffusers' weights."""
    place = tmp_path / "pipeline"
    if inside:
        shutil.copytree(tiny_repos / BASES[family], place)
    shutil.copytree(tiny_repos / CANNY[family], place / "controlnet" if inside else place)
    sources = find_with(family, f"edges={place}")
    assert sources.controlnets == {"edges": ControlNetOrigin(location=str(place.resolve()))}
    ours = load_controlnet(sources.parts["controlnet/edges"], torch.float32)
    assert_same(ours, ControlNetModel.from_pretrained(str(tiny_repos / CANNY[family])))
    assert not ours.training


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_and_variants(
    variant: str | None, sharded: bool, copied: Callable[..., Path], find_with: Callable[..., Sources]
) -> None:
    """Files as diffusers writes them are found, recorded, and loaded in the requested precision."""
    folder = copied("sd15")
    model = ControlNetModel.from_pretrained(str(folder))
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder, variant=variant, max_shard_size="200KB" if sharded else "10GB")
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert (len(files) > 1) == sharded
    part = find_with("sd15", folder).parts["controlnet/canny"]
    assert (sorted(found.filename for found in part.weights), part.variant) == (files, variant)
    assert_same(load_controlnet(part, torch.float16), model.half())


def test_the_demonstrations_own() -> None:
    """Known by its name, wherever the clone lies; and it fits the demonstration's base alone."""
    options = SourceOptions(controlnets=(ControlNetSource(location=DEMO_CONTROLNET, name="canny"),))
    sources = find_sources(DEMO15, options, "fp32")
    assert sources.controlnets == {"canny": ControlNetOrigin(location=DEMO_CONTROLNET)}
    assert settings_of(sources.controlnets["canny"].location).preprocess == "canny"
    with pytest.raises(WeightsError) as error:
        find_sources(DEMOXL, options, "fp32")
    one_line(error, "is for SD1.5, the checkpoint is SDXL")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (ControlNetSource(location="nowhere", name="x"), ["--controlnet 'nowhere'", "neither a folder nor"]),
        (ControlNetSource(location="", name="x"), ["--controlnet ''", "neither a folder nor"]),
        (ControlNetSource(location="a/b/c"), ["--controlnet 'a/b/c'", "neither a folder nor"]),
        (ControlNetSource(location=DEMO_CONTROLNET, revision="main"), ["is a folder and has no revisions"]),
    ],
    ids=["word", "nothing", "path", "revision"],
)
def test_locations_that_do_not_exist(source: ControlNetSource, words: list[str], tiny_repos: Path) -> None:
    """A mistyped place is quoted, with what was expected."""
    with pytest.raises(WeightsError) as error:
        find("sd15", tiny_repos, controlnets=(source,))
    one_line(error, *words)


def _rename_to_bin(file: Path) -> None:
    file.rename(file.with_suffix(".bin"))


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "filename", "words"),
    [
        (Path.unlink, "config.json", ["config.json", "expected a model in diffusers layout"]),
        (lambda file: file.write_text("{"), "config.json", ["config.json is not JSON"]),
        (lambda file: file.write_text("[]"), "config.json", ["config.json holds no JSON object"]),
        (Path.unlink, WEIGHTS, [f"has no {WEIGHTS}"]),
        (_rename_to_bin, WEIGHTS, [f"has no {WEIGHTS}", "pickled .bin"]),
        (_truncate, WEIGHTS, [WEIGHTS]),
        (lambda file: file.write_bytes(b"x"), WEIGHTS, [WEIGHTS]),
    ],
    ids=["no config", "half a config", "a list", "no weights", "pickled", "truncated", "no safetensors"],
)
def test_damaged_folders(
    damage: Callable[[Path], Any],
    filename: str,
    words: list[str],
    copied: Callable[..., Path],
    find_with: Callable[..., Sources],
) -> None:
    """Seen when the sources are found, not after minutes of work: one line with the folder and what is wrong."""
    folder = copied("sd15")
    damage(folder / filename)
    with pytest.raises(WeightsError) as error:
        find_with("sd15", folder)
    one_line(error, str(folder), *words)


LOST = "controlnet_down_blocks.1.weight"


@pytest.mark.parametrize("change", [lambda _: None, lambda weight: weight[:-1]], ids=["missing", "shape"])
def test_weights_that_do_not_fit_their_configuration(
    change: Callable[[Tensor], Tensor | None], copied: Callable[..., Path], find_with: Callable[..., Sources]
) -> None:
    """diffusers would go on with random ones: it is an error that names the weight."""
    folder = copied("sdxl")
    tensors: dict[str, Any] = load_file(folder / WEIGHTS)
    tensors[LOST] = change(tensors[LOST])
    kept = {key: tensor.contiguous() for key, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})
    part = find_with("sdxl", folder).parts["controlnet/canny"]
    with pytest.raises(WeightsError) as error:
        load_controlnet(part, torch.float32)
    one_line(error, str(folder), LOST, "ControlNetModel")


# --- which fit -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "other", "words"),
    [
        ("sd15", "sdxl", ["is for SDXL, the checkpoint is SD1.5", "lllyasviel/control_v11p_sd15_canny"]),
        ("sdxl", "sd15", ["is for SD1.5, the checkpoint is SDXL", "diffusers/controlnet-canny-sdxl-1.0"]),
    ],
)
def test_the_other_family(
    family: str, other: str, words: list[str], copied: Callable[..., Path], find_with: Callable[..., Sources]
) -> None:
    """Both families are named, and a ControlNet that fits."""
    folder = copied(other)
    with pytest.raises(WeightsError) as error:
        find_with(family, folder)
    one_line(error, str(folder), *words)


def test_configurations_come_before_weights(hub: FakeHub, tiny_repos: Path, tmp_path: Path) -> None:
    """A ControlNet that does not fit costs no download: its weights are not requested and need not exist."""
    source = ControlNetSource(location=CANNY["sdxl"])
    with pytest.raises(WeightsError, match=r"is for SDXL"):
        find_sources(ENTRIES["sd15"], SourceOptions(controlnets=(source,)), "fp32")
    assert not [file for _, file, _ in hub.asked if file.endswith((".safetensors", ".index.json"))]
    base = Path(shutil.copytree(tiny_repos / BASES["sd15"], tmp_path / "base"))
    for file in base.rglob("*.safetensors"):
        file.unlink()
    with pytest.raises(WeightsError, match=r"is for SDXL"):
        find("sd15", tiny_repos, base=str(base), controlnets=(source,))


UNET_MISFITS: list[tuple[str, dict[str, Any], list[str]]] = [
    ("sd15", {"cross_attention_dim": 48}, ["cross_attention_dim 48", "has 32"]),
    ("sdxl", {"cross_attention_dim": 32}, ["cross_attention_dim 32", "has 64"]),
    ("sdxl", {"projection_class_embeddings_input_dim": 2816}, ["projection_class_embeddings_input_dim 2816", "has 80"]),
    ("sd15", {"block_out_channels": [32, 128]}, ["128 channels at 1/2", "64 channels at 1/2"]),
    ("sdxl", {"block_out_channels": [64, 64]}, ["64 channels at 1/1", "32 channels at 1/1"]),
    ("sd15", {"layers_per_block": 2}, ["makes residuals of 32 channels at 1/1, 32 channels at 1/1, 32 channels at"]),
    (
        "sd15",
        {"block_out_channels": [32, 64, 64], "down_block_types": ["CrossAttnDownBlock2D", *["DownBlock2D"] * 2]},
        ["64 channels at 1/4"],
    ),
]


@pytest.mark.parametrize(("family", "changes", "words"), UNET_MISFITS, ids=lambda value: str(value)[:40])
def test_another_unet_of_the_family(
    family: str, changes: dict[str, Any], words: list[str], copied: Callable[..., Path], find_with: Callable[..., Any]
) -> None:
    """Its residuals would not add up, or would be of another text encoder: both sides are in the message."""
    folder = copied(family, **changes)
    with pytest.raises(WeightsError) as error:
        find_with(family, folder)
    one_line(error, str(folder), "UNet of", BASES[family], *words, "take one that was made for this base")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"global_pool_conditions": True}, ["global_pool_conditions True"]),
        ({"class_embed_type": "timestep"}, ["class_embed_type timestep"]),
        ({"num_class_embeds": 3}, ["num_class_embeds 3"]),
        ({"encoder_hid_dim_type": "text_proj"}, ["encoder_hid_dim_type text_proj"]),
        ({"conditioning_channels": 4}, ["conditioning_channels 4"]),
        ({"in_channels": 9}, ["in_channels 9"]),
        ({"conditioning_embedding_out_channels": [4, 8]}, ["conditioning_embedding_out_channels [4, 8]"]),
        ({"controlnet_conditioning_channel_order": "brg"}, ["controlnet_conditioning_channel_order brg"]),
        ({"in_channels": 5, "conditioning_channels": 1}, ["in_channels 5", "conditioning_channels 1"]),
    ],
    ids=str,
)
def test_kinds_that_are_not_supported(
    changes: dict[str, Any], words: list[str], copied: Callable[..., Path], find_with: Callable[..., Sources]
) -> None:
    """They would draw something else than diffusers does: refused, and all that is unusual is listed."""
    folder = copied("sd15", **changes)
    with pytest.raises(WeightsError) as error:
        find_with("sd15", folder)
    one_line(error, str(folder), *words, "not supported")


@pytest.mark.parametrize(
    "changes",
    [
        {"controlnet_conditioning_channel_order": "bgr"},
        {"global_pool_conditions": ..., "conditioning_channels": ..., "encoder_hid_dim_type": ...},
        {"conditioning_embedding_out_channels": [2, 2, 2, 2]},
        {"down_block_types": ["DownBlock2D", "DownBlock2D"]},
        {"_diffusers_version": "0.99", "a_setting_of_tomorrow": 1},
    ],
    ids=str,
)
def test_unusual_ones_that_fit(changes: dict[str, Any], copied: Callable[..., Path], find_with: Any) -> None:
    """BGR images, older files' missing keys, a slimmer ControlNet (SDXL's small ones): residuals are what counts."""
    assert list(find_with("sd15", copied("sd15", **changes)).controlnets) == ["canny"]


@pytest.mark.parametrize("class_name", ["UNet2DConditionModel", "ControlNetUnionModel", ..., None, 3], ids=str)
def test_folders_of_something_else(class_name: Any, copied: Callable[..., Path], find_with: Any) -> None:
    """A UNet's folder, say: the message has the class that is there and the one that was expected."""
    folder = copied("sd15", _class_name=class_name)
    with pytest.raises(WeightsError) as error:
        find_with("sd15", folder)
    found = "no class" if class_name is ... else str(class_name)
    one_line(error, f"{folder} holds {found}, expected a ControlNetModel")


@pytest.mark.parametrize(
    "changes",
    [
        {"block_out_channels": 5},
        {"block_out_channels": ["a", "b"]},
        {"layers_per_block": [1]},
        {"layers_per_block": "two"},
        {"layers_per_block": None},
        {"conditioning_embedding_out_channels": 4},
    ],
    ids=str,
)
def test_configurations_that_make_no_sense(
    changes: dict[str, Any], copied: Callable[..., Path], find_with: Any
) -> None:
    """A line that names the folder, not a traceback."""
    folder = copied("sd15", **changes)
    with pytest.raises(WeightsError) as error:
        find_with("sd15", folder)
    one_line(error, str(folder))


# --- residuals -------------------------------------------------------------------------------------------------------

REAL: dict[str, dict[str, Any]] = {  # what the published unet/config.json say of the architecture
    "sd15": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


@FAMILIES
def test_residuals_of_the_real_architectures(family: str) -> None:
    """Their channels are those of the convolutions that diffusers makes for them."""
    with torch.device("meta"):
        model: Any = ControlNetModel(**REAL[family])
    layers = [*model.controlnet_down_blocks, model.controlnet_mid_block]
    shapes = residual_shapes(model.config)
    assert [channels for channels, _ in shapes] == [layer.out_channels for layer in layers]
    assert max(level for _, level in shapes) == {"sd15": 3, "sdxl": 2}[family]


def halved(side: int, times: int) -> int:
    for _ in range(times):
        side = (side + 1) // 2
    return side


def expected_residuals(config: dict[str, Any], height: int, width: int) -> list[tuple[int, ...]]:
    shapes = residual_shapes(config)
    return [(channels, halved(height, level), halved(width, level)) for channels, level in shapes]


def conditions(model: Any, rows: int, seed: int = 0) -> dict[str, Any]:
    """The inputs of a UNet and a ControlNet besides latents and control image, in diffusers' names."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 77, model.config.cross_attention_dim, generator=generator)
    if model.config.addition_embed_type is None:
        return {"timestep": torch.tensor([321.0]), "encoder_hidden_states": hidden}
    size = model.config.projection_class_embeddings_input_dim - 6 * model.config.addition_time_embed_dim
    added = {"text_embeds": torch.randn(rows, size, generator=generator), "time_ids": torch.ones(rows, 6) * 64}
    return {"timestep": torch.tensor([321.0]), "encoder_hidden_states": hidden, "added_cond_kwargs": added}


@pytest.mark.parametrize(("height", "width"), [(8, 10), (9, 7)])
@FAMILIES
def test_residuals_of_a_run(family: str, height: int, width: int) -> None:
    """Channels and halvings are what a ControlNet makes, at odd sizes too."""
    model: Any = tiny_controlnet(UNETS[family]()).eval()
    image = torch.rand(2, 3, 8 * height, 8 * width)
    with torch.no_grad():
        down, mid = model(
            torch.randn(2, 4, height, width), **conditions(model, 2), controlnet_cond=image, return_dict=False
        )
    assert [tuple(residual.shape[1:]) for residual in (*down, mid)] == expected_residuals(model.config, height, width)


@pytest.mark.parametrize("layers", [1, 2, (1, 2, 3)], ids=str)
def test_residuals_that_a_unet_takes(layers: int | tuple[int, ...]) -> None:
    """They are added to its skip connections: those that a three-level UNet has on its way down."""
    torch.manual_seed(0)
    unet: Any = UNet2DConditionModel(
        block_out_channels=(8, 16, 24), layers_per_block=layers, norm_num_groups=4, cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=4,
    )  # fmt: skip
    skips: list[Tensor] = []
    unet.conv_in.register_forward_hook(lambda _, __, output: skips.append(output))
    for block in unet.down_blocks:
        block.register_forward_hook(lambda _, __, output: skips.extend(output[1]))
    unet.mid_block.register_forward_hook(lambda _, __, output: skips.append(output))
    with torch.no_grad():
        unet(torch.randn(1, 4, 10, 9), **conditions(unet, 1))
    assert [tuple(skip.shape[1:]) for skip in skips] == expected_residuals(unet.config, 10, 9)


# --- the components --------------------------------------------------------------------------------------------------

SCALE = 0.3
SHAPES = image_shapes(ShapeOptions(batch=1, height=72, width=64), 64)  # 9 and 8 latents, 5 and 4 halved


def run(component: ComponentModule, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
    """The component's outputs by name; the feeds have to be what its inputs are said to be."""
    for name, spec in component.inputs.items():
        assert spec.accepts(tuple(feeds[name].shape)), name
        assert str(feeds[name].dtype) == f"torch.{spec.dtype}", name
    with torch.no_grad():
        outputs = component.module(*(feeds[name] for name in component.inputs))
    tensors = [outputs] if isinstance(outputs, Tensor) else outputs
    return dict(zip(component.outputs, tensors, strict=True))


def assert_close(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    """float32 to rounding, as a part of the largest value; float16 bit by bit, for every operation is the same one."""
    for ours, theirs in zip(actual, expected, strict=True):
        tolerance = 0.0 if theirs.dtype == torch.float16 else 5e-6 * theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=tolerance)


def feeds_of(component: ComponentModule, seed: int = 0) -> dict[str, Tensor]:
    return dict(zip(component.inputs, component.random_inputs({}, seed), strict=True))


def in_diffusers_names(feeds: dict[str, Tensor]) -> dict[str, Any]:
    added = {name: feeds[name] for name in ("text_embeds", "time_ids") if name in feeds}
    own = {name: feeds[name] for name in ("sample", "timestep", "encoder_hidden_states")}
    return {**own, **({"added_cond_kwargs": added} if added else {}), "return_dict": False}


def frozen(model: nn.Module, dtype: torch.dtype) -> Any:
    return copy.deepcopy(model).to(dtype).eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("family", "order", "guided", "dtype"),
    [
        ("sd15", "rgb", True, torch.float32),
        ("sd15", "bgr", False, torch.float16),
        ("sdxl", "bgr", True, torch.float32),
        ("sdxl", "rgb", False, torch.float16),
    ],
)
def test_the_two_components_are_diffusers_controlnet(family: str, order: str, guided: bool, dtype: torch.dtype) -> None:
    """Embedding and rest after each other give diffusers' residuals, under its names, in the shapes promised."""
    torch.manual_seed(3)
    model = tiny_controlnet(UNETS[family]())
    model.register_to_config(controlnet_conditioning_channel_order=order)
    theirs = frozen(model, dtype)
    embedding = cond_embedding_component(frozen(model, dtype), SHAPES, 8)
    rest = controlnet_component(frozen(model, dtype), SHAPES, guided, 8)
    image = torch.rand(1, 3, 72, 64).to(dtype)
    embedded = run(embedding, {"controlnet_cond": image})["cond_embedding"]
    copies = 2 if guided else 1
    feeds = feeds_of(rest) | {
        "cond_embedding": torch.cat([embedded] * copies),
        "conditioning_scale": torch.tensor([SCALE]),
    }
    with torch.no_grad():
        down, mid = theirs(
            **in_diffusers_names(feeds), controlnet_cond=torch.cat([image] * copies), conditioning_scale=SCALE
        )
    residuals = run(rest, feeds)
    assert list(residuals) == [*(f"down_block_res_sample_{i}" for i in range(len(down))), "mid_block_res_sample"]
    assert_close(residuals.values(), [*down, mid])
    for name, spec in {**embedding.outputs, **rest.outputs}.items():
        made = embedded if name == "cond_embedding" else residuals[name]
        assert tuple(made.shape) == tuple(dim_range(dim).opt for dim in spec.shape)
        assert str(made.dtype) == f"torch.{spec.dtype}"
    assert all(residual.abs().max() > 1e-3 for residual in residuals.values()), "nothing was compared"
    flipped = run(embedding, {"controlnet_cond": image.flip(1)})["cond_embedding"]
    assert (flipped - embedded).abs().max() > 0.1, "the order of the channels was not compared"


@pytest.mark.parametrize(("family", "dtype"), [("sd15", torch.float16), ("sdxl", torch.float32)])
def test_the_unet_takes_residuals_as_diffusers_does(family: str, dtype: torch.dtype) -> None:
    """Each goes to its own skip connection; and with zeros it is the plain UNet, bit by bit."""
    torch.manual_seed(4)
    unet = UNETS[family]()
    controlled = controlled_unet_component(frozen(unet, dtype), SHAPES, False, 8)
    plain = unet_component(frozen(unet, dtype), SHAPES, False, 8)
    feeds = feeds_of(controlled, seed=5)
    *down, mid = [tensor for name, tensor in feeds.items() if "residual" in name]
    assert [name for name in controlled.inputs if name not in plain.inputs] == [
        *(f"down_block_additional_residual_{i}" for i in range(len(down))), "mid_block_additional_residual"
    ]  # fmt: skip
    with torch.no_grad():
        (theirs,) = frozen(unet, dtype)(
            **in_diffusers_names(feeds), down_block_additional_residuals=down, mid_block_additional_residual=mid
        )
    assert_close(run(controlled, feeds).values(), [theirs])
    zeros = {name: torch.zeros_like(tensor) if "residual" in name else tensor for name, tensor in feeds.items()}
    without = run(plain, feeds)["out_sample"]
    assert torch.equal(run(controlled, zeros)["out_sample"], without)
    assert not torch.allclose(theirs, without, atol=1e-2)


def test_dimensions_that_vary() -> None:
    """Residuals of a bundle with ranges have dimensions that follow from the latents', and hold at every size."""
    shapes = image_shapes(ShapeOptions(dynamic={"height": (72, 72, 104), "batch": (1, 1, 3)}), 64)
    model = tiny_controlnet(sd15_unet())
    component = controlnet_component(frozen(model, torch.float32), shapes, True, 8)
    assert set(component.ranges) == {"batch", "latent_height"}
    for rows, height in [(1, 9), (4, 12)]:
        extents = {"batch": rows, "latent_height": height}
        feeds = dict(zip(component.inputs, component.random_inputs(extents, 0), strict=True))
        for name, residual in run(component, feeds).items():
            assert tuple(residual.shape) == component.outputs[name].shape_at(extents), name
