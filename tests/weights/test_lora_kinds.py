"""Layers of every kind, as the libraries that train them write and merge them: LyCORIS (recorded) and peft."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from make_tiny_repos import sd15_unet
from safetensors.torch import load_file, save_file
from torch import Tensor

from hypersd.errors import WeightsError
from hypersd.weights.lora_file import Fusion, LoraFile

RECORDED = Path(__file__).parents[1] / "assets/lycoris.safetensors"  # scripts/record_lycoris.py
LORA = {"r": 3, "lora_alpha": 5, "init_lora_weights": False}
TARGETS = ["to_q", "to_out.0", "conv1", "conv_in", "conv_shortcut", "time_embedding.linear_1"]
PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", LORA | {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"mid_block.*conv1": 1.5}}),
    "rank stabilized": ("LoraConfig", LORA | {"use_rslora": True, "rank_pattern": {"conv1": 2}}),
    "dora": ("LoraConfig", LORA | {"use_dora": True}),
    "loha": ("LoHaConfig", {"r": 2, "alpha": 3, "init_weights": False, "use_effective_conv2d": True}),
    "loha plain convolutions": ("LoHaConfig", {"r": 2, "alpha": 3, "init_weights": False}),
    "lokr": ("LoKrConfig", {"r": 2, "alpha": 3, "init_weights": False, "use_effective_conv2d": True}),
    "lokr both": ("LoKrConfig", {"r": 1, "alpha": 3, "init_weights": False, "decompose_both": True}),
    "lokr whole": ("LoKrConfig", {"r": 64, "alpha": 16, "init_weights": False}),
}


@functools.cache
def recorded() -> dict[str, dict[str, Tensor]]:
    """The recorded cases by name."""
    cases: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(RECORDED).items():
        name, _, part = key.partition("/")
        cases.setdefault(name, {})[part] = tensor
    return cases


def open_layer(folder: Path, parts: dict[str, Tensor], weight: Tensor) -> LoraFile:
    """A file with one layer, for a base whose only layer is ``conv_in``."""
    save_file({f"lora_unet_conv_in.{part}": tensor for part, tensor in parts.items()}, folder / "one.safetensors")
    return LoraFile.open(folder / "one.safetensors", {"unet": {"conv_in": tuple(weight.shape)}})


@pytest.mark.parametrize("name", recorded())
def test_fused_weights_are_those_of_lycoris(name: str, tmp_path: Path) -> None:
    """LoRA, LoCon, LoHa and LoKr of every form, with and without DoRA, on linear layers and convolutions."""
    case = recorded()[name]
    parts = {key.removeprefix("file/"): tensor for key, tensor in case.items() if key.startswith("file/")}
    lora = open_layer(tmp_path, parts, case["weight"])
    fused = Fusion("unet", (lora,)).fuse("conv_in.weight", case["weight"])
    torch.testing.assert_close(fused, case["fused"], rtol=2e-6, atol=2e-6)
    assert (fused - case["weight"]).abs().max() > 0.01
    layer = lora.layers["unet"]["conv_in"]
    assert layer.kind == name.split()[0].removesuffix(",")
    assert layer.is_dora == ("dora" in name)


@pytest.mark.parametrize("name", ["lora, linear", "lora, conv", "lora tucker, conv"])
def test_factors_make_the_change(name: str, tmp_path: Path) -> None:
    """Down, up and scale, for a runtime that adds LoRAs itself, are those of the fused weight."""
    case = recorded()[name]
    parts = {key.removeprefix("file/"): tensor for key, tensor in case.items() if key.startswith("file/")}
    factors = open_layer(tmp_path, parts, case["weight"]).layers["unet"]["conv_in"].factors()
    assert factors is not None
    down, up, scale = factors
    assert down.shape == (3, case["weight"][0].numel())
    change = (up @ down * scale).view(case["weight"].shape)
    torch.testing.assert_close(case["weight"] + change, case["fused"], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", ["loha, linear", "lokr, conv", "lora dora, linear"])
def test_other_kinds_have_no_factors(name: str, tmp_path: Path) -> None:
    case = recorded()[name]
    parts = {key.removeprefix("file/"): tensor for key, tensor in case.items() if key.startswith("file/")}
    assert open_layer(tmp_path, parts, case["weight"]).layers["unet"]["conv_in"].factors() is None


@pytest.mark.parametrize("name", PEFT)
def test_fused_weights_are_those_of_peft(name: str, tmp_path: Path) -> None:
    """A folder that peft saved, and the weights that peft merges: alphas are in the configuration beside the file."""
    import peft

    kind, settings = PEFT[name]
    torch.manual_seed(0)
    unet = sd15_unet()
    before = {key: tensor.clone() for key, tensor in unet.state_dict().items()}
    shapes = {key.removesuffix(".weight"): tuple(t.shape) for key, t in before.items() if t.dim() in (2, 4)}
    model = peft.get_peft_model(unet, getattr(peft, kind)(target_modules=TARGETS, **settings))  # type: ignore[arg-type]
    for key, parameter in model.named_parameters():
        if "lora_magnitude_vector" in key:
            parameter.data.mul_(1.25)
    model.save_pretrained(tmp_path)
    merged = model.merge_and_unload().state_dict()  # type: ignore[operator]
    fusion = Fusion("unet", (LoraFile.open(tmp_path / "adapter_model.safetensors", {"unet": shapes}),))
    for key, weight in before.items():
        torch.testing.assert_close(fusion.fuse(key, weight), merged[key], rtol=2e-6, atol=2e-6)
    assert sum(not torch.equal(merged[key], weight) for key, weight in before.items()) >= 10


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "OFT"}, "type 'OFT'"),
        ({"init_lora_weights": "pissa_niter_4", "lora_alpha": 1, "r": 1}, "changed the base's weights"),
        ({"lora_alpha": "8", "r": 4}, "lora_alpha, r and alpha_pattern"),
        ({"lora_alpha": float("nan"), "r": 4}, "lora_alpha, r and alpha_pattern"),
        ({"lora_alpha": 8, "r": 0}, "lora_alpha, r and alpha_pattern"),
        ({"alpha_pattern": {"(": 1}}, "lora_alpha, r and alpha_pattern"),
        ([], "no configuration"),
    ],
)
def test_a_configuration_that_cannot_be_fused_is_rejected(config: Any, message: str, tmp_path: Path) -> None:
    weight = torch.ones(4, 4)
    tensors = {f"base_model.model.conv_in.lora_{part}.weight": weight.clone() for part in "AB"}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=message):
        LoraFile.open(tmp_path / "adapter_model.safetensors", {"unet": {"conv_in": (4, 4)}})
