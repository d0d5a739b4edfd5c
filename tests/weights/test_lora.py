"""LoRA files, and weights with LoRAs fused into them: against diffusers, and against float64 arithmetic."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_writers import real_unet
from make_tiny_repos import SD15_REPO, SDXL_REPO
from safetensors.torch import load_file, save_file
from torch import Tensor

from hypersd.errors import WeightsError
from hypersd.export.checkpoints import find_checkpoint
from hypersd.export.layout import DiffusersBase, Part
from hypersd.export.models import check_sources, check_unet_sources, layer_shapes, load_unet, open_lora
from hypersd.export.repositories import Found, LocalFolder
from hypersd.export.sources import find_sources
from hypersd.weights.lora_file import Fusion, LoraFile
from hypersd.weights.lora_names import published_layers

BASES = {"sd15": SD15_REPO, "sdxl": SDXL_REPO}
LORAS = {family: f"ByteDance/Hyper-SD/Hyper-{family.upper()}-4steps-lora.safetensors" for family in BASES}
FAMILIES = pytest.mark.parametrize("family", BASES)

# Modules that Hyper-SD's files cover, the files' sizes on the Hub, and what their headers hold besides.
PUBLISHED = {"sd15": (278, 269_127_064, {}), "sdxl": (788, 787_359_648, {"__metadata__": {"format": "pt"}})}


def covered(unet: Any) -> dict[str, Any]:
    """Linear layers and convolutions of the blocks, by path: what Hyper-SD's files cover."""
    blocks = ("down_blocks.", "mid_block.", "up_blocks.")
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return {name: m for name, m in unet.named_modules() if name.startswith(blocks) and isinstance(m, kinds)}


def unet_part(tiny_repos: Path, family: str) -> Part:
    return DiffusersBase(LocalFolder(tiny_repos / BASES[family])).part("unet")


def base_shapes(tiny_repos: Path, family: str) -> dict[str, dict[str, tuple[int, ...]]]:
    return {"unet": layer_shapes(check_unet_sources(unet_part(tiny_repos, family), family))}


def load(tiny_repos: Path, family: str, lora: Path | None, scale: float = 1.0, dtype: torch.dtype = torch.float32):
    opened = [open_lora(lora, base_shapes(tiny_repos, family), family, scale)] if lora else []
    return load_unet(unet_part(tiny_repos, family), dtype, Fusion("unet", tuple(opened)))


def exact_weights(base: dict[str, Tensor], lora: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The fused weights in float64."""
    fused = {}
    for name, weight in base.items():
        key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        fused[name] = weight.double()
        if name.endswith(".weight") and f"{key}.alpha" in lora:
            down, up = lora[f"{key}.lora_down.weight"].double(), lora[f"{key}.lora_up.weight"].double()
            factor = scale * lora[f"{key}.alpha"].double() / down.shape[0]
            fused[name] = fused[name] + (up.flatten(1) @ down.flatten(1)).reshape(weight.shape) * factor
    return fused


# --- which modules ---------------------------------------------------------------------------------------------------


@FAMILIES
def test_covered_modules_of_the_real_architecture(family: str) -> None:
    """On the real UNets the covered modules are 278 and 788."""
    unet = real_unet(family)
    assert published_layers(layer_shapes(unet)) == [*covered(unet)]
    assert len(covered(unet)) == PUBLISHED[family][0]


@FAMILIES
def test_covered_modules_make_a_file_of_the_published_size(family: str) -> None:
    """A rank-64 float32 file over the covered modules is byte for byte as long as the one on the Hub."""
    _, size, metadata = PUBLISHED[family]
    shapes: dict[str, list[int]] = {}
    for name, module in covered(real_unet(family)).items():
        key, weight = "lora_unet_" + name.replace(".", "_"), module.weight
        shapes[f"{key}.alpha"] = []
        shapes[f"{key}.lora_down.weight"] = [64, *weight.shape[1:]]
        shapes[f"{key}.lora_up.weight"] = [weight.shape[0], 64, *[1] * (weight.dim() - 2)]
    header, end = dict(metadata), 0
    for key in sorted(shapes):
        begin, end = end, end + 4 * int(np.prod(shapes[key], dtype=int))
        header[key] = {"dtype": "F32", "shape": shapes[key], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"))
    assert 8 + (len(text) + 7) // 8 * 8 + end == size


# --- arithmetic ------------------------------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("scale", [1.0, 0.75])
def test_fused_weights_are_diffusers(family: str, scale: float, tiny_repos: Path) -> None:
    """Every weight of the fused UNet is that of diffusers' load_lora_weights and fuse_lora (alpha is not the rank)."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(str(tiny_repos / BASES[family]))
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    pipe.load_lora_weights(str(tiny_repos / LORAS[family]))
    pipe.fuse_lora(lora_scale=scale)
    pipe.unload_lora_weights()
    theirs, ours = pipe.unet.state_dict(), load(tiny_repos, family, tiny_repos / LORAS[family], scale).state_dict()
    assert ours.keys() == theirs.keys() == before.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-6, atol=1e-6)
    changed = {name for name in theirs if not torch.equal(before[name], theirs[name])}
    assert changed == {f"{name}.weight" for name in covered(load(tiny_repos, family, None))}


@FAMILIES
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_half_precision_weights_are_rounded_once(
    family: str, stored: torch.dtype, tiny_repos: Path, tmp_path: Path
) -> None:
    """In fp16 each weight is the float16 nearest to the exact sum, whether the LoRA file is float32 or float16."""
    tensors = {key: tensor.to(stored) for key, tensor in load_file(tiny_repos / LORAS[family]).items()}
    save_file(tensors, tmp_path / "lora.safetensors")
    fused = load(tiny_repos, family, tmp_path / "lora.safetensors", 0.75, torch.float16).state_dict()
    base = load_file(unet_part(tiny_repos, family).weights[0].path)
    exact = exact_weights(base, tensors, 0.75)
    naive_is_worse = 0
    for name, weight in exact.items():
        assert fused[name].dtype == torch.float16
        reference = weight.numpy()
        ulp = np.spacing(np.abs(reference).astype(np.float16)).astype(np.float64)
        allowed = ulp * 0.5 + np.abs(reference) * 1e-6 + 1e-7  # the float32 sums' own error on top
        assert (np.abs(fused[name].double().numpy() - reference) <= allowed).all(), name
        key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        if f"{key}.alpha" in tensors:
            down, up = tensors[f"{key}.lora_down.weight"].half(), tensors[f"{key}.lora_up.weight"].half()
            delta = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape) * (0.75 * tensors[f"{key}.alpha"] / 4)
            naive = (base[name].half() + delta.half()).double().numpy()
            naive_is_worse += int((np.abs(naive - reference) > allowed).sum())
    assert naive_is_worse > 1000, "fusing in fp16 would pass, too: the bound proves nothing"


def test_half_precision_base_is_fused_in_float32(tiny_repos: Path, tmp_path: Path) -> None:
    """A base stored in float16 is widened before the LoRA is added: the sum is not rounded to float16 in between."""
    base = {k: v.half() for k, v in load_file(unet_part(tiny_repos, "sd15").weights[0].path).items()}
    (tmp_path / "unet").mkdir()
    config = (tiny_repos / BASES["sd15"] / "unet/config.json").read_text()
    (tmp_path / "unet/config.json").write_text(config)
    save_file(base, tmp_path / "unet/diffusion_pytorch_model.safetensors")
    part = DiffusersBase(LocalFolder(tmp_path)).part("unet")
    lora = tiny_repos / LORAS["sd15"]
    opened = open_lora(lora, base_shapes(tiny_repos, "sd15"), "sd15")
    fused = load_unet(part, torch.float32, Fusion("unet", (opened,))).state_dict()
    for name, weight in exact_weights(base, load_file(lora), 1.0).items():
        torch.testing.assert_close(fused[name].double(), weight, rtol=1e-6, atol=1e-6)


@st.composite
def layers(draw: st.DrawFn) -> dict[str, Any]:
    """A linear layer or a convolution (1x1, 3x3, oblong) with a LoRA of any rank, alpha, scale and stored type."""
    out, inner, rank = draw(st.integers(1, 24)), draw(st.integers(1, 24)), draw(st.integers(1, 9))
    kernel = draw(st.sampled_from([(), (1, 1), (3, 3), (1, 3)]))
    types = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    lora_type = draw(types)
    spread = 10.0 ** draw(st.integers(-3, 1))
    alpha_shape = draw(st.sampled_from([(), (1,)]))
    return {
        "weight": (torch.randn(out, inner, *kernel, generator=generator) * spread).to(draw(types)),
        "down": torch.randn(rank, inner, *kernel, generator=generator).to(lora_type),
        "up": torch.randn(out, rank, *[1] * len(kernel), generator=generator).to(lora_type),
        "alpha": torch.full(alpha_shape, draw(st.floats(2.0**-6, 256, width=32))).to(lora_type),
        "scale": draw(st.floats(-10, 10)),
    }


@settings(deadline=None, max_examples=150)
@given(layers())
def test_fuse_is_the_formula(tmp_path_factory: pytest.TempPathFactory, layer: dict[str, Any]) -> None:
    """weight + scale * alpha / rank * up @ down, to float32's error, for every kind of layer, rank, alpha and type."""
    path = tmp_path_factory.getbasetemp() / "one_layer.safetensors"
    key, (weight, down, up, alpha) = "lora_unet_x", (layer[k] for k in ("weight", "down", "up", "alpha"))
    parts = {"lora_down.weight": down, "lora_up.weight": up, "alpha": alpha}
    path.unlink(missing_ok=True)
    save_file({f"{key}.{part}": tensor for part, tensor in parts.items()}, path)
    lora = LoraFile.open(path, {"unet": {"x": tuple(weight.shape)}}, layer["scale"])
    fused = Fusion("unet", (lora,)).fuse("x.weight", weight)
    assert fused.dtype == torch.float32
    assert fused.shape == weight.shape
    factor = layer["scale"] * alpha.double().item() / down.shape[0]
    product = (up.double().flatten(1) @ down.double().flatten(1)).reshape(weight.shape)
    size = (up.double().abs().flatten(1) @ down.double().abs().flatten(1)).reshape(weight.shape) * abs(factor)
    error = (fused.double() - (weight.double() + product * factor)).abs()
    assert (error <= 2.0**-23 * (down.shape[0] + 4) * (size + weight.double().abs())).all()


# --- files that do not fit -------------------------------------------------------------------------------------------

FIRST = "lora_unet_mid_block_resnets_0_conv1"


def refused(tiny_repos: Path, path: Path, family: str = "sd15") -> str:
    """The one line that a LoRA is refused with, before any weight is read."""
    with pytest.raises(WeightsError) as error:
        open_lora(path, base_shapes(tiny_repos, family), family)
    message = str(error.value)
    assert "\n" not in message
    assert path.name in message
    return message


EXTRA = {
    "left over": ("lora_unet_conv_in", (4, 3, 3), 32),
    "encoder": ("lora_te_text_model_encoder_layers_0_mlp_fc1", (32,), 37),
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("missing", "1 missing: mid_block.resnets.0.conv1"),
        ("left over", "1 left over: conv_in"),
        ("encoder", "text_encoder: 1 left over: encoder.layers.0.mlp.fc1"),
        ("no alpha", None),
    ],
)
@pytest.mark.parametrize("repo", ["ByteDance/Hyper-SD", None])
def test_a_published_file_covers_the_layers_that_it_should(
    change: str, words: str | None, repo: str | None, tiny_repos: Path, tmp_path: Path, source_options: Any
) -> None:
    """A published LoRA that leaves a layer alone is damaged; a local one may be for some layers only."""
    tensors = load_file(tiny_repos / LORAS["sd15"])
    if change in EXTRA:
        key, columns, rows = EXTRA[change]
        tensors[f"{key}.lora_down.weight"] = torch.ones(1, *columns)
        tensors[f"{key}.lora_up.weight"] = torch.ones(rows, 1, *[1] * (len(columns) - 1))
    else:
        for end in ("alpha",) if change == "no alpha" else ("lora_down.weight", "lora_up.weight", "alpha"):
            del tensors[f"{FIRST}.{end}"]
    save_file(tensors, tmp_path / "lora.safetensors")
    name = "Hyper-SD15-4steps-lora"
    sources = find_sources(find_checkpoint(name), source_options(name), "fp32")
    sources = dataclasses.replace(sources, lora=Found(tmp_path / "lora.safetensors", "lora.safetensors", repo))
    if words is None or repo is None:
        assert check_sources(sources, "sd15").loras.keys() == {"lora"}
        return
    with pytest.raises(WeightsError, match=re.escape(words)):
        check_sources(sources, "sd15")


@pytest.mark.parametrize(("family", "other", "name"), [("sd15", "sdxl", "SDXL"), ("sdxl", "sd15", "SD1.5")])
def test_a_lora_of_the_other_family_is_recognised(family: str, other: str, name: str, tiny_repos: Path) -> None:
    """The message names both families, in place of hundreds of keys."""
    message = refused(tiny_repos, tiny_repos / LORAS[other], family)
    expected = {"sd15": "SD1.5", "sdxl": "SDXL"}[family]
    assert f"a LoRA for {name}, the base is {expected}" in message
    assert "left over" not in message


@pytest.mark.parametrize(("family", "other", "name"), [("sd15", "sdxl", "SDXL"), ("sdxl", "sd15", "SD1.5")])
def test_the_other_family_is_recognised_on_real_architectures(
    family: str, other: str, name: str, tmp_path: Path
) -> None:
    """The marks hold for the real files' keys, not only for the tiny ones."""
    keys = ["lora_unet_" + layer.replace(".", "_") for layer in covered(real_unet(other))]
    save_file({f"{key}.alpha": torch.ones(()) for key in keys}, tmp_path / "lora.safetensors")
    with pytest.raises(WeightsError, match=f"a LoRA for {re.escape(name)}"):
        open_lora(tmp_path / "lora.safetensors", {"unet": layer_shapes(real_unet(family))}, family)


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight", "FLUX"),
        ("transformer.transformer_blocks.0.attn.to_k.lora_A.weight", "SD3"),
        ("lora_unet_single_blocks_0_linear1.lora_down.weight", "FLUX"),
        ("lora_unet_double_blocks_0_img_attn_proj.lora_down.weight", "FLUX"),
        ("lora_unet_joint_blocks_0_context_block_attn_proj.lora_down.weight", "SD3"),
    ],
)
def test_flux_and_sd3_are_recognised(family: str, key: str, name: str, tiny_repos: Path, tmp_path: Path) -> None:
    """Hyper-SD publishes LoRAs for these, too: they are named, with diffusers' keys and with kohya's."""
    save_file({key: torch.ones(4, 4)}, tmp_path / "lora.safetensors")
    assert f"a LoRA for {name}" in refused(tiny_repos, tmp_path / "lora.safetensors", family)


# --- shapes that do not fit ------------------------------------------------------------------------------------------


def _ranks_disagree(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return down[:3].clone(), up


def _other_width(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([down, down], dim=1), up


def _other_output(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return down, torch.cat([up, up])


def _flat(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return down.flatten(), up.flatten()


def _swapped(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return up, down


def _rank_zero(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return down[:0].clone(), up[:, :0].clone()


BREAKS = pytest.mark.parametrize(
    "broken", [_ranks_disagree, _other_width, _other_output, _flat, _swapped, _rank_zero], ids=lambda f: f.__name__[1:]
)


def broken_lora(
    tiny_repos: Path, folder: Path, broken: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], layer: str
) -> Path:
    tensors = load_file(tiny_repos / LORAS["sd15"])
    down, up = f"{layer}.lora_down.weight", f"{layer}.lora_up.weight"
    tensors[down], tensors[up] = broken(tensors[down], tensors[up])
    save_file(tensors, folder / "lora.safetensors")
    return folder / "lora.safetensors"


@BREAKS
@pytest.mark.parametrize("layer", [FIRST, "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"])
def test_a_layer_of_other_shapes_is_refused(
    broken: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], layer: str, tiny_repos: Path, tmp_path: Path
) -> None:
    """Shapes that do not make the layer's weight end in one line that names file and layer."""
    path = broken_lora(tiny_repos, tmp_path, broken, layer)
    message = refused(tiny_repos, path)
    assert layer.removeprefix("lora_unet_") in message.replace(".", "_")


def test_alpha_must_be_one_number(tiny_repos: Path, tmp_path: Path) -> None:
    """An alpha of several numbers is no alpha."""
    tensors = load_file(tiny_repos / LORAS["sd15"])
    tensors[f"{FIRST}.alpha"] = torch.ones(3)
    save_file(tensors, tmp_path / "lora.safetensors")
    assert "alpha [3]" in refused(tiny_repos, tmp_path / "lora.safetensors")
