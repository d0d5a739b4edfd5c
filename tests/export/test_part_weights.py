"""The loader of every component's weights, compared with from_pretrained, and the weights that it rejects."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from make_tiny_repos import CONTROLNETS, SD15_REPO, SDXL_REPO
from safetensors.torch import load_file, save_file
from torch import Tensor

from hypersd.errors import WeightsError
from hypersd.export.layout import DiffusersBase, Part
from hypersd.export.libraries import quiet
from hypersd.export.part_weights import open_part
from hypersd.export.repositories import LocalFolder

from .tiny_sources import assert_same, one_line

# part, class and place of every kind of component
KINDS: dict[str, tuple[str, Any, str]] = {
    "clip": ("text_encoder", transformers.CLIPTextModel, f"{SDXL_REPO}/text_encoder"),
    "clip-pooled": ("text_encoder_2", transformers.CLIPTextModelWithProjection, f"{SDXL_REPO}/text_encoder_2"),
    "unet-sd15": ("unet", diffusers.UNet2DConditionModel, f"{SD15_REPO}/unet"),
    "unet-sdxl": ("unet", diffusers.UNet2DConditionModel, f"{SDXL_REPO}/unet"),
    "vae": ("vae", diffusers.AutoencoderKL, f"{SD15_REPO}/vae"),
    "taesd": ("vae", diffusers.AutoencoderTiny, "madebyollin/taesd"),
    "controlnet": ("controlnet/canny", diffusers.ControlNetModel, next(iter(CONTROLNETS))),
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
CLIP_LAYER = "encoder.layers.0.mlp.fc1"
UNET_LAYER = "mid_block.resnets.0.conv1"


@pytest.fixture
def changed(tiny_repos: Path, tmp_path: Path) -> Callable[..., Part]:
    """``changed(kind, {name: tensor})``: the part with these tensors added or replaced, or taken out where None."""

    def change(kind: str, tensors: dict[str, Tensor | None]) -> Part:
        name, _, place = KINDS[kind]
        folder = Path(shutil.copytree(tiny_repos / place, tmp_path / kind))
        (path,) = folder.glob("*.safetensors")
        kept = {key: tensor for key, tensor in {**load_file(path), **tensors}.items() if tensor is not None}
        save_file(kept, path, metadata={"format": "pt"})
        return DiffusersBase(LocalFolder(folder)).part_in("", name)

    return change


def stored(tiny_repos: Path, kind: str) -> dict[str, Tensor]:
    (path,) = (tiny_repos / KINDS[kind][2]).glob("*.safetensors")
    return load_file(path)


def rejected(part: Part, kind: str, *words: str, dtype: torch.dtype = torch.float32) -> None:
    with pytest.raises(WeightsError) as error:
        open_part(part, KINDS[kind][1]).load(dtype)
    one_line(error, str(part.weights[0].path), *words)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@EVERY_KIND
def test_every_component_is_what_from_pretrained_makes(kind: str, dtype: torch.dtype, tiny_repos: Path) -> None:
    """Parameters and buffers (also the ones that are in no file), types, strides, settings, evaluation mode."""
    name, cls, place = KINDS[kind]
    part = DiffusersBase(LocalFolder(tiny_repos / place)).part_in("", name)
    ours: Any = open_part(part, cls).load(dtype)
    with quiet():
        key = "dtype" if cls.__module__.startswith("transformers") else "torch_dtype"
        theirs = cls.from_pretrained(str(tiny_repos / place), **{key: dtype})
    assert_same(ours, theirs)
    for tensors in ("named_parameters", "named_buffers"):
        found, expected = dict(getattr(ours, tensors)()), dict(getattr(theirs, tensors)())
        assert found.keys() == expected.keys()
        for path, tensor in expected.items():
            assert torch.equal(found[path], tensor), path
            assert (found[path].dtype, found[path].stride()) == (tensor.dtype, tensor.stride()), path
    assert not any(module.training for module in ours.modules())
    assert not any(weight.requires_grad for weight in ours.parameters())
    assert ours.dtype == theirs.dtype == dtype


@EVERY_KIND
def test_a_surplus_tensor_is_rejected(kind: str, changed: Callable[..., Part]) -> None:
    """A tensor without a place means another architecture (a Union ControlNet, a motion module)."""
    rejected(changed(kind, {"task_embedding": torch.ones(6, 320)}), kind, "1 left over: task_embedding", "config.json")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("clip", "embeddings.position_ids"),
        ("clip", "text_model.embeddings.position_ids"),
        ("clip", "text_projection.weight"),
        ("clip", "logit_scale"),
        ("clip-pooled", "text_model.embeddings.position_ids"),
        ("clip-pooled", "logit_scale"),
        ("vae", "loss.logvar"),
        ("vae", "model_ema.decay"),
    ],
)
def test_surplus_tensors_that_change_nothing(kind: str, name: str, changed: Callable[..., Part]) -> None:
    """Position ids, CLIP's scale, and the remains of a VAE's training may be there or not."""
    open_part(changed(kind, {name: torch.arange(77)[None]}), KINDS[kind][1])


def test_harmless_names_belong_to_their_component(changed: Callable[..., Part]) -> None:
    """A projection that text encoder 1 does not use would be a fault in a UNet."""
    rejected(changed("unet-sd15", {"text_projection": torch.ones(4, 4)}), "unet-sd15", "left over: text_projection")


# --- scaled fp8 ------------------------------------------------------------------------------------------------------


def scaled(weight: Tensor, per_row: bool, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    """A weight in float8 and its scale."""
    rows = weight.flatten(1).abs().amax(1, keepdim=True) if per_row else weight.abs().max()
    scale = rows / torch.finfo(dtype).max
    shape = (-1, *[1] * (weight.dim() - 1))
    return (weight / scale.reshape(shape)).to(dtype), scale


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("word", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize(("kind", "layer"), [("clip", CLIP_LAYER), ("unet-sd15", UNET_LAYER)])
def test_scaled_fp8(
    kind: str, layer: str, word: str, per_row: bool, dtype: torch.dtype, tiny_repos: Path, changed: Callable[..., Part]
) -> None:
    """The scale is multiplied in, in float32; input scales and ComfyUI's mark change nothing."""
    name = next(key for key in stored(tiny_repos, kind) if key.endswith(f"{layer}.weight"))
    weight = stored(tiny_repos, kind)[name]
    small, scale = scaled(weight, per_row, dtype)
    stem = name.removesuffix(".weight")
    part = changed(kind, {name: small, f"{stem}.{word}": scale, f"{stem}.scale_input": torch.tensor(3.0),
                          "scaled_fp8": torch.empty(2, dtype=dtype)})  # fmt: skip
    loaded = open_part(part, KINDS[kind][1]).load(torch.float32).get_parameter(layer + ".weight")
    assert torch.equal(loaded, small.float() * scale.reshape(-1, *[1] * (weight.dim() - 1)))
    torch.testing.assert_close(loaded, weight, rtol=0.13, atol=1e-3)


def test_fp8_without_scales(tiny_repos: Path, changed: Callable[..., Part]) -> None:
    """Plain float8 weights are converted as they are."""
    weights = {key: t.to(torch.float8_e4m3fn) for key, t in stored(tiny_repos, "clip").items()}
    ours = open_part(changed("clip", dict(weights)), transformers.CLIPTextModel).load(torch.float16)
    for key, tensor in weights.items():
        assert torch.equal(ours.get_parameter(key.removeprefix("text_model.")), tensor.half())


@pytest.mark.parametrize(
    ("companion", "shape", "words"),
    [
        ("weight_scale_inv", (1,), "weight_scale_inv stands beside a float8 weight"),
        ("comfy_quant", (1,), "comfy_quant stands beside a float8 weight"),
        ("weight_scale", (3,), "has the shape [3], expected one scale or"),
        ("weight_scale", (64, 2), "has the shape [64, 2], expected one scale or"),
    ],
)
def test_fp8_with_other_companions(
    companion: str, shape: tuple[int, ...], words: str, tiny_repos: Path, changed: Callable[..., Part]
) -> None:
    """A scale of a kind that is not known is never ignored."""
    name = next(key for key in stored(tiny_repos, "clip") if key.endswith(f"{CLIP_LAYER}.weight"))
    small = stored(tiny_repos, "clip")[name].to(torch.float8_e4m3fn)
    part = changed("clip", {name: small, f"{name.removesuffix('.weight')}.{companion}": torch.ones(shape)})
    rejected(part, "clip", words)


def test_integers_are_rejected(tiny_repos: Path, changed: Callable[..., Part]) -> None:
    """Weights that were quantized to integers have scales elsewhere."""
    name = next(key for key in stored(tiny_repos, "clip") if key.endswith(f"{CLIP_LAYER}.weight"))
    part = changed("clip", {name: stored(tiny_repos, "clip")[name].to(torch.int8)})
    rejected(part, "clip", name, "stored as I8", "unquantized")


def test_a_scale_beside_a_weight_that_is_not_fp8(tiny_repos: Path, changed: Callable[..., Part]) -> None:
    """A scale without a float8 weight has no known meaning."""
    name = next(key for key in stored(tiny_repos, "clip") if key.endswith(f"{CLIP_LAYER}.weight"))
    scale = f"{name.removesuffix('.weight')}.scale_weight"
    rejected(changed("clip", {scale: torch.ones(())}), "clip", f"left over: {scale}")


# --- numbers that are none -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@EVERY_KIND
def test_a_weight_that_is_not_finite(kind: str, value: float, tiny_repos: Path, changed: Callable[..., Part]) -> None:
    """One NaN or infinity among all weights: file and tensor are named, before anything is traced."""
    name, weight = max(stored(tiny_repos, kind).items(), key=lambda item: item[1].numel())
    weight.view(-1)[weight.numel() // 3] = value
    rejected(changed(kind, {name: weight}), kind, f"{name} holds NaN or an infinity", dtype=torch.float16)


def test_a_weight_that_float16_cannot_hold(tiny_repos: Path, changed: Callable[..., Part]) -> None:
    """A large float32 weight would become infinite: the message says which, and what helps."""
    weight = stored(tiny_repos, "unet-sd15")[f"{UNET_LAYER}.weight"]
    weight[0, 0, 0, 0] = 7e4
    part = changed("unet-sd15", {f"{UNET_LAYER}.weight": weight})
    rejected(part, "unet-sd15", f"{UNET_LAYER}.weight holds 70000, more than float16 can", "fp32", dtype=torch.float16)
    open_part(part, diffusers.UNet2DConditionModel).load(torch.float32)


# --- what is added while loading ------------------------------------------------------------------------------------


class Plus:
    """Adds a constant to one parameter."""

    def __init__(self, name: str, number: float) -> None:
        self.name, self.number = name, number

    def fuse(self, name: str, weight: Tensor) -> Tensor:
        return weight.float() + self.number if name == self.name else weight


@pytest.mark.parametrize(("kind", "layer"), [("clip", CLIP_LAYER), ("unet-sd15", UNET_LAYER)])
def test_a_fuser_adds_before_the_only_rounding(kind: str, layer: str, tiny_repos: Path) -> None:
    """The sum is made in float32 and rounded once, in text encoders as in UNets."""
    name, cls, place = KINDS[kind]
    opened = open_part(DiffusersBase(LocalFolder(tiny_repos / place)).part_in("", name), cls)
    fused = opened.load(torch.float16, Plus(f"{layer}.weight", 0.1)).get_parameter(f"{layer}.weight")
    weight = next(t for key, t in stored(tiny_repos, kind).items() if key.endswith(f"{layer}.weight"))
    assert torch.equal(fused, (weight.float() + 0.1).half())


def test_a_fuser_that_adds_infinity(tiny_repos: Path) -> None:
    """The file is innocent: the message says that the LoRA made it so."""
    name, cls, place = KINDS["unet-sd15"]
    part = DiffusersBase(LocalFolder(tiny_repos / place)).part_in("", name)
    with pytest.raises(WeightsError) as error:
        open_part(part, cls).load(torch.float16, Plus(f"{UNET_LAYER}.weight", float("inf")))
    one_line(error, UNET_LAYER, "with the LoRA added")
