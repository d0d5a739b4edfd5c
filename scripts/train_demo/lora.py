"""LoRAs in training, and their files in Hyper-SD's format."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

RANK = 64
ALPHA = 16.0  # unequal to the rank, so that whoever leaves it out is found out
COVERED = ("down_blocks", "mid_block", "up_blocks")


class Lora(nn.Module):
    """``alpha / rank * up @ down`` for layers of a UNet; zero at first.

    Hu et al., "LoRA", https://arxiv.org/abs/2106.09685, section 4.1.

    Args:
        unet: the network whose layers it changes; by default those that Hyper-SD's LoRAs cover.
        rank: of every layer's delta.
        alpha: its factor, times the rank.
        within: a part of the paths of the layers, such as ``".attentions."``.
    """

    def __init__(self, unet: nn.Module, rank: int = RANK, alpha: float = ALPHA, within: str = "") -> None:
        super().__init__()
        self.rank, self.alpha = rank, alpha
        self.names = [
            name
            for name, module in unet.named_modules()
            if name.startswith(COVERED) and within in name and isinstance(module, nn.Linear | nn.Conv2d)
        ]
        weights = [unet.get_submodule(name).weight for name in self.names]
        self.down = nn.ParameterList(torch.randn(rank, *w.shape[1:]) / w[0].numel() ** 0.5 for w in weights)
        self.up = nn.ParameterList(torch.zeros(w.shape[0], rank, *[1] * (w.dim() - 2)) for w in weights)

    def deltas(self) -> dict[str, Tensor]:
        """By the names of weights what is added to them, [out, in times the size of a convolution's kernel]."""
        deltas = {}
        for name, down, up in zip(self.names, self.down, self.up, strict=True):
            with torch.autocast(down.device.type, enabled=False):  # as it is fused when it is deployed
                deltas[f"{name}.weight"] = self.alpha / self.rank * (up.flatten(1) @ down.flatten(1))
        return deltas

    def save(self, path: Path) -> None:
        """Write kohya keys, float16, as Hyper-SD's files have them."""
        tensors = {}
        for name, down, up in zip(self.names, self.down, self.up, strict=True):
            key = "lora_unet_" + name.replace(".", "_")
            tensors[f"{key}.lora_down.weight"] = down.detach().half().contiguous()
            tensors[f"{key}.lora_up.weight"] = up.detach().half().contiguous()
            tensors[f"{key}.alpha"] = torch.tensor(self.alpha, dtype=torch.float16)
        save_file(tensors, path)

    def save_peft(self, path: Path) -> None:
        """Write peft's keys as diffusers saves them, float16; that layout has no alpha: ``lora_B`` contains it."""
        tensors = {}
        for name, down, up in zip(self.names, self.down, self.up, strict=True):
            tensors[f"unet.{name}.lora_A.weight"] = down.detach().half().contiguous()
            tensors[f"unet.{name}.lora_B.weight"] = (self.alpha / self.rank * up.detach()).half().contiguous()
        save_file(tensors, path, metadata={"format": "pt"})


def fused(unet: nn.Module, *loras: tuple[Lora, float]) -> dict[str, Tensor]:
    """The UNet's weights with LoRAs added in their strengths, by name, for ``torch.func.functional_call``."""
    weights: dict[str, Tensor] = {}
    for lora, strength in loras:
        for name, delta in lora.deltas().items():
            weight = unet.get_parameter(name)
            weights[name] = weights.get(name, weight) + strength * delta.view_as(weight)
    return weights


class WithLora(nn.Module):
    """A frozen UNet with a LoRA fused in for each call."""

    def __init__(self, unet: nn.Module, lora: Lora) -> None:
        super().__init__()
        object.__setattr__(self, "unet", unet)  # not a submodule: it is not trained, averaged or saved
        self.lora = lora

    def forward(self, *args: object, **kwargs: object) -> object:
        return torch.func.functional_call(self.unet, fused(self.unet, (self.lora, 1.0)), args, kwargs)
