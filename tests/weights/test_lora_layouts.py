"""Every layout of LoRA files, against diffusers' own load_lora_weights and fuse_lora; and files that are no LoRA."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_writers import (
    LAYOUTS,
    Random,
    full_path,
    is_attention,
    kohya,
    layer_shapes,
    original_names,
    pairs,
    random_lora,
    real_unet,
)
from make_tiny_repos import SD15_REPO, SDXL_REPO
from safetensors.torch import save_file
from torch import Tensor, nn

from hypersd.errors import WeightsError
from hypersd.weights.lora_file import Fusion, LoraFile

BASES = {"sd15": SD15_REPO, "sdxl": SDXL_REPO}


@pytest.fixture(scope="module")
def pipes(tiny_repos: Path) -> dict[str, Any]:
    """diffusers' pipelines of both tiny bases."""
    from diffusers import DiffusionPipeline

    return {family: DiffusionPipeline.from_pretrained(str(tiny_repos / base)) for family, base in BASES.items()}


@pytest.fixture(scope="module")
def shapes(pipes: dict[str, Any]) -> dict[str, Any]:
    return {family: layer_shapes(pipe) for family, pipe in pipes.items()}


@pytest.fixture(scope="module")
def compare(pipes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., int]:
    """``compare(family, tensors, metadata)``: the number of weights that diffusers and we change in the same way."""

    def run(family: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None, scale: float = 1.0) -> int:
        pipe, changed = pipes[family], 0
        shapes = layer_shapes(pipe)
        before = {name: {k: v.clone() for k, v in getattr(pipe, name).state_dict().items()} for name in shapes}
        path = tmp_path_factory.mktemp("lora") / "some lora.safetensors"
        save_file(tensors, path, metadata)
        config = {"unet_config": pipe.unet.config} if family == "sd15" else {}  # SDXL's pipeline passes it itself
        pipe.load_lora_weights(str(path.parent), weight_name=path.name, **config)
        pipe.fuse_lora(lora_scale=scale)
        pipe.unload_lora_weights()
        lora = LoraFile.open(path, shapes, scale)
        for component, weights in before.items():
            fusion, theirs = Fusion(component, (lora,)), getattr(pipe, component).state_dict()
            for key, weight in weights.items():
                torch.testing.assert_close(fusion.fuse(key, weight), theirs[key], rtol=1e-6, atol=1e-6)
                changed += not torch.equal(theirs[key], weight)
            getattr(pipe, component).load_state_dict(weights)
        return changed

    return run


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fused_weights_are_those_of_diffusers(
    family: str, layout: str, shapes: dict[str, Any], compare: Callable[..., int]
) -> None:
    """UNet and text encoders, to float32 rounding, and every layer that is in the file."""
    write, alpha, is_read = LAYOUTS[layout]
    lora = {place: layer for place, layer in random_lora(shapes[family], alpha).items() if is_read(place)}
    assert compare(family, write(lora)) == len(lora)


@pytest.mark.parametrize(
    "entry", [{"lora_alpha": 3}, {"lora_alpha": 3, "use_rslora": True}], ids=["plain", "stabilized"]
)
def test_settings_in_the_header_are_those_of_diffusers(
    entry: dict[str, Any], shapes: dict[str, Any], compare: Callable[..., int]
) -> None:
    """diffusers writes peft's configuration into a file's header: alphas are there, and in no tensor."""
    lora = {place: layer for place, layer in random_lora(shapes["sd15"]).items() if is_attention(place)}
    values: dict[str, Any] = {}
    for component in ("unet", "text_encoder"):
        paths = {path: down.shape[0] for (found, path), (down, _, _) in lora.items() if found == component}
        alphas = {path: 1.5 for path in paths if path.endswith(("to_q", "q_proj"))}
        settings = {"r": 3, "rank_pattern": paths, "alpha_pattern": alphas, "target_modules": [*paths], **entry}
        values |= {f"{component}.{key}": value for key, value in settings.items()}
    tensors = pairs(lora, ".lora_A.weight", ".lora_B.weight")
    assert compare("sd15", tensors, {"lora_adapter_metadata": json.dumps(values)}, scale=0.75) == len(lora)


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", BASES)
def test_original_names_are_those_that_diffusers_converts(family: str) -> None:
    """diffusers' converter of whole checkpoints finds every layer of the real architectures under its original name."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    unet = real_unet(family)
    lora: Random = {("unet", path): (torch.empty(0), torch.empty(0), 1.0) for path in layer_shapes_of(unet)}
    name = original_names(lora)
    marked = {f"model.diffusion_model.{name(place)}.weight": torch.tensor(i) for i, place in enumerate(lora)}
    everything = {  # it expects a whole checkpoint, with the norms and biases that no LoRA changes
        **{f"model.diffusion_model.{key}": torch.tensor(-1) for key in ("time_embed.0.bias", "time_embed.2.bias")},
        **{f"model.diffusion_model.{key}.bias": torch.tensor(-1) for key in ("label_emb.0.0", "label_emb.0.2")},
        **{f"model.diffusion_model.{key}.bias": torch.tensor(-1) for key in ("input_blocks.0.0", "out.2")},
        **{f"model.diffusion_model.out.0.{key}": torch.tensor(-1) for key in ("weight", "bias")},
        **{key.replace(".weight", ".bias"): torch.tensor(-1) for key in marked if ".op." in key or ".conv." in key},
        **marked,
    }
    converted = convert_ldm_unet_checkpoint(everything, unet.config)
    found = {key.removesuffix(".weight"): int(value) for key, value in converted.items() if int(value) >= 0}
    assert found == {path: i for i, (_, path) in enumerate(lora)}


def layer_shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    kinds = nn.Linear | nn.Conv2d
    return {path: tuple(layer.weight.shape) for path, layer in module.named_modules() if isinstance(layer, kinds)}


CONV, TO_OUT = "down_blocks.0.resnets.0.conv1", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
Q_PROJ = "encoder.layers.0.self_attn.q_proj"
SPELLINGS = {
    "lora_unet_down_blocks_0_resnets_0_conv1.lora_": ("unet", CONV),
    "lora_unet_input_blocks_1_0_in_layers_2.lora_": ("unet", CONV),
    "unet.down_blocks.0.resnets.0.conv1.lora.": ("unet", CONV),
    "down_blocks.0.resnets.0.conv1.lora.": ("unet", CONV),
    "base_model.model.down_blocks.0.resnets.0.conv1.lora_": ("unet", CONV),
    "base_model.model.unet.down_blocks.0.resnets.0.conv1.lora_": ("unet", CONV),
    "diffusion_model.input_blocks.1.0.in_layers.2.lora_": ("unet", CONV),
    "lycoris_down_blocks_0_resnets_0_conv1.lora_": ("unet", CONV),
    f"{TO_OUT.replace('attn1.to_out.0', 'attn1.processor.to_out')}_lora.": ("unet", TO_OUT),
    f"unet.{TO_OUT.replace('attn1.to_out.0', 'attn1.processor.to_out')}_lora.": ("unet", TO_OUT),
    f"unet.{TO_OUT}.lora.": ("unet", TO_OUT),
    "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_out_0.lora_": ("unet", TO_OUT),
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_": ("text_encoder", Q_PROJ),
    "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_": ("text_encoder", Q_PROJ),
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.": ("text_encoder", Q_PROJ),
    "text_encoder.encoder.layers.0.self_attn.q_proj.lora.": ("text_encoder", Q_PROJ),
    "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.": ("text_encoder", Q_PROJ),
    "base_model.model.text_model.encoder.layers.0.self_attn.q_proj.lora_": ("text_encoder", Q_PROJ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("alpha", [torch.tensor(3.0), torch.tensor([3.0]).half(), torch.tensor(3.0).bfloat16(), None])
def test_every_spelling_of_a_layer(spelling: str, alpha: Tensor | None, shapes: dict[str, Any], tmp_path: Path) -> None:
    """Prefixes, separators and endings that occur, each with an alpha of any type and shape, or without one."""
    component, path = SPELLINGS[spelling]
    shape = shapes["sd15"][component][path]
    down, up = torch.randn(2, *shape[1:]), torch.randn(shape[0], 2, *[1] * (len(shape) - 2))
    tensors = {f"{spelling}down.weight": down, f"{spelling}up.weight": up}
    if alpha is not None:
        tensors[re.sub(r"(\.lora_|\.lora\.|_lora\.|\.lora_linear_layer\.)$", ".alpha", spelling)] = alpha
    save_file(tensors, tmp_path / "one.safetensors")
    lora = LoraFile.open(tmp_path / "one.safetensors", shapes["sd15"], 0.5)
    fused = Fusion(component, (lora,)).fuse(f"{path}.weight", torch.zeros(shape))
    exact = (up.double().flatten(1) @ down.double().flatten(1)).view(shape) * 0.5 * (1 if alpha is None else 1.5)
    torch.testing.assert_close(fused.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "ends", [(".lora_A.weight", ".lora_B.weight"), (".lora_A.default.weight", ".lora_B.default.weight")]
)
def test_peft_endings_with_and_without_an_adapter_name(
    ends: tuple[str, str], shapes: dict[str, Any], tmp_path: Path
) -> None:
    lora = random_lora(shapes["sdxl"])
    tensors = pairs(lora, *ends, lambda place: f"base_model.model.{place[0]}.{full_path(place)}")
    save_file(tensors, tmp_path / "lora.safetensors")
    layers = LoraFile.open(tmp_path / "lora.safetensors", shapes["sdxl"]).layers
    assert {name: len(found) for name, found in layers.items()} == {n: len(s) for n, s in shapes["sdxl"].items()}


def test_embeddings_of_sdxl_in_both_spellings(shapes: dict[str, Any], tmp_path: Path) -> None:
    """kohya's own trainer writes ``label_emb``, conversions of its files ``add_embedding``."""
    lora = {place: layer for place, layer in random_lora(shapes["sdxl"]).items() if "add_embedding" in place[1]}
    found = []
    for i, name in enumerate((full_path, original_names(random_lora(shapes["sdxl"])))):
        save_file(kohya(lora, name), tmp_path / f"{i}.safetensors")
        found.append(LoraFile.open(tmp_path / f"{i}.safetensors", shapes["sdxl"]).layers["unet"].keys())
    assert found[0] == found[1] == {path for _, path in lora}


def test_each_layer_has_its_own_alpha(shapes: dict[str, Any], tmp_path: Path) -> None:
    """If alphas differ, each layer gets its own; diffusers 0.42 gives many the most frequent one."""
    lora = {place: (*layer[:2], 1.0 + i % 5) for i, (place, layer) in enumerate(random_lora(shapes["sdxl"]).items())}
    save_file(kohya(lora), tmp_path / "lora.safetensors")
    opened = LoraFile.open(tmp_path / "lora.safetensors", shapes["sdxl"], 2.0)
    for (component, path), (down, up, alpha) in lora.items():
        shape = shapes["sdxl"][component][path]
        fused = Fusion(component, (opened,)).fuse(f"{path}.weight", torch.ones(shape))
        exact = 1 + (up.double().flatten(1) @ down.double().flatten(1)).view(shape) * 2 * alpha / down.shape[0]
        torch.testing.assert_close(fused.double(), exact, rtol=1e-6, atol=1e-6)


def test_diffusers_spelling_counts_in_a_file_with_both(shapes: dict[str, Any], tmp_path: Path) -> None:
    """Some files have the blocks twice, in both spellings: diffusers takes its own, alpha included."""
    lora = {place: layer for place, layer in random_lora(shapes["sd15"], 1.5).items() if place == ("unet", CONV)}
    other = {place: (down * 2, up + 1, 7.0) for place, (down, up, _) in lora.items()}
    save_file(kohya(lora) | kohya(other, original_names(random_lora(shapes["sd15"]))), tmp_path / "both.safetensors")
    down, _, alpha = lora["unet", CONV]
    factors = LoraFile.open(tmp_path / "both.safetensors", shapes["sd15"]).layers["unet"][CONV].factors()
    assert factors is not None
    assert torch.equal(factors[0], down.flatten(1))
    assert factors[2] == alpha / down.shape[0]


def test_loras_are_added_one_after_another(shapes: dict[str, Any], tmp_path: Path) -> None:
    """The sum is computed in float32 on a float16 weight, and layers that no LoRA has come back as they are."""
    lora = {place: layer for place, layer in random_lora(shapes["sd15"]).items() if place == ("unet", CONV)}
    save_file(kohya(lora), tmp_path / "one.safetensors")
    opened = [LoraFile.open(tmp_path / "one.safetensors", shapes["sd15"], strength) for strength in (0.5, -0.25, 0.25)]
    both, once = Fusion("unet", tuple(opened[:2])), Fusion("unet", (opened[2],))
    weight = torch.randn(shapes["sd15"]["unet"][CONV])
    fused = both.fuse(f"{CONV}.weight", weight.half())
    assert fused.dtype == torch.float32
    torch.testing.assert_close(fused, once.fuse(f"{CONV}.weight", weight.half()), rtol=1e-6, atol=1e-6)
    bias = torch.ones(3)
    assert both.fuse(f"{CONV}.bias", bias) is bias
    assert both.fuse("conv_in.weight", weight) is weight
    assert Fusion("text_encoder", both.loras).fuse(f"{CONV}.weight", weight) is weight


# --- files that do not fit -------------------------------------------------------------------------------------------


def rejected(tensors: dict[str, Tensor], shapes: dict[str, Any], folder: Path) -> str:
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / "bad.safetensors")
    with pytest.raises(WeightsError) as error:
        LoraFile.open(folder / "bad.safetensors", shapes["sd15"])
    message = str(error.value)
    assert "\n" not in message
    assert "bad.safetensors" in message
    return message


ONE, KEY = torch.ones(2, 2), "lora_unet_down_blocks_0_resnets_0_conv1"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["lora_down.weight", "lora_up.weight", "alpha"])
def test_a_value_that_is_not_finite_is_named(value: float, part: str, shapes: dict[str, Any], tmp_path: Path) -> None:
    tensors = kohya({place: layer for place, layer in random_lora(shapes["sd15"]).items() if place == ("unet", CONV)})
    tensors[f"{KEY}.{part}"].flatten()[-1:] = value
    assert f"{KEY}.{part} holds a NaN or an infinity" in rejected(tensors, shapes, tmp_path)


def test_modules_that_the_base_lacks_are_listed(shapes: dict[str, Any], tmp_path: Path) -> None:
    """A LoRA for another base: every module is named once, up to 30 of them."""
    lora = random_lora(shapes["sd15"])
    tensors = kohya({("unet", "down_blocks.7.resnets.0.conv1"): lora["unet", CONV], ("unet", CONV): lora["unet", CONV]})
    assert "changes 1: lora_unet_down_blocks_7_resnets_0_conv1: the base has no" in rejected(tensors, shapes, tmp_path)
    many = kohya({("unet", f"x{i:03}"): lora["unet", CONV] for i in range(500)})
    message = rejected(many, shapes, tmp_path)
    assert "changes 500: lora_unet_x000, " in message
    assert "x029, …" in message
    assert len(message) < 2000


@pytest.mark.parametrize(
    "part", ["lora_B.bias", "bias_values", "oft_blocks", "a1.weight", "diff", "w_norm", "on_input"]
)
def test_parts_of_other_kinds_are_listed(part: str, shapes: dict[str, Any], tmp_path: Path) -> None:
    """A bias, OFT, GLoRA, (IA)3 and the like beside layers that are known: nothing is silently left out."""
    tensors = kohya({place: layer for place, layer in random_lora(shapes["sd15"]).items() if place == ("unet", CONV)})
    assert f"has 1: {KEY}.{part}: parts of no kind" in rejected(tensors | {f"{KEY}.{part}": ONE}, shapes, tmp_path)


def test_quantized_layers_are_rejected(shapes: dict[str, Any], tmp_path: Path) -> None:
    """Integers mean nothing without their scales."""
    tensors = kohya({place: layer for place, layer in random_lora(shapes["sd15"]).items() if place == ("unet", CONV)})
    tensors[f"{KEY}.lora_up.weight"] = tensors[f"{KEY}.lora_up.weight"].to(torch.int8)
    assert f"{KEY}.lora_up.weight is stored as I8" in rejected(tensors, shapes, tmp_path)


@pytest.mark.parametrize("parts", [["alpha"], ["lora_down.weight"], ["hada_w1_a", "hada_w1_b"], ["lokr_w1"],
                                   ["dora_scale"], ["lora_down.weight", "lokr_w2"]])  # fmt: skip
def test_half_a_layer_is_rejected(parts: list[str], shapes: dict[str, Any], tmp_path: Path) -> None:
    message = rejected({f"{KEY}.{part}": torch.ones(2, 2) for part in parts}, shapes, tmp_path)
    assert all(f"{KEY}.{part}" in message for part in parts)
    assert "make no layer" in message


def test_a_layer_that_occurs_twice_is_rejected(shapes: dict[str, Any], tmp_path: Path) -> None:
    """By kohya's name and by diffusers', of which neither is better."""
    lora = {place: layer for place, layer in random_lora(shapes["sd15"]).items() if place == ("unet", CONV)}
    tensors = kohya(lora) | {key: t.clone() for key, t in pairs(lora, ".lora_A.weight", ".lora_B.weight").items()}
    assert f"changes {CONV} twice" in rejected(tensors, shapes, tmp_path)


@pytest.mark.parametrize("tensors", [{}, {"model.diffusion_model.out.0.weight": ONE}, {"weight": ONE}])
def test_a_file_that_is_no_lora(tensors: dict[str, Tensor], shapes: dict[str, Any], tmp_path: Path) -> None:
    assert "is no LoRA" in rejected(tensors, shapes, tmp_path)


NAMES = st.sampled_from([KEY, "lora_te_text_model_encoder_layers_0_mlp_fc1", "unet.conv_in", "x", ""])
PARTS = st.sampled_from(["lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha", "dora_scale", "hada_w1_a",
                         "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "lokr_w1", "lokr_w1_a",
                         "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "lora_A.weight",
                         "lora_B.weight", "lora_magnitude_vector", "weight"])  # fmt: skip
EXTENTS = st.lists(st.sampled_from([0, 1, 2, 3, 4, 32, 37]), max_size=5)


@settings(deadline=None, max_examples=150)
@given(st.dictionaries(st.tuples(NAMES, PARTS), EXTENTS, max_size=5), st.sampled_from([torch.float32, torch.float16]))
def test_a_malformed_file_is_a_message(
    shapes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, parts: dict[Any, list[int]], dtype: torch.dtype
) -> None:
    """Tensors of any shapes under known and unknown names: one line, or layers that can be fused."""
    path = tmp_path_factory.getbasetemp() / "malformed.safetensors"
    path.unlink(missing_ok=True)
    save_file({f"{name}.{part}": torch.ones(shape, dtype=dtype) for (name, part), shape in parts.items()}, path)
    try:
        lora = LoraFile.open(path, shapes["sd15"])
    except WeightsError as error:
        assert "\n" not in str(error)
        return
    for component, layers in lora.layers.items():
        for module in layers:
            weight = torch.ones(shapes["sd15"][component][module])
            assert Fusion(component, (lora,)).fuse(f"{module}.weight", weight).shape == weight.shape
