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
    """``alpha / rank * up @ down`` for every layer that Hyper-SD's LoRAs cover; zero at first.

    Hu et al., "LoRA", https://arxiv.org/abs/2106.09685, section 4.1.
    """

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.names = [
            name
            for name, module in unet.named_modules()
            if name.startswith(COVERED) and isinstance(module, nn.Linear | nn.Conv2d)
        ]
        weights = [unet.get_submodule(name).weight for name in self.names]
        self.down = nn.ParameterList(torch.randn(RANK, *w.shape[1:]) / w[0].numel() ** 0.5 for w in weights)
        self.up = nn.ParameterList(torch.zeros(w.shape[0], RANK, *[1] * (w.dim() - 2)) for w in weights)

    def fused(self, unet: nn.Module) -> dict[str, Tensor]:
        """The UNet's weights with the LoRA's added, by name, for ``torch.func.functional_call``."""
        fused = {}
        for name, down, up in zip(self.names, self.down, self.up, strict=True):
            weight = unet.get_submodule(name).weight
            with torch.autocast(weight.device.type, enabled=False):  # as it is fused when it is deployed
                delta = (up.flatten(1) @ down.flatten(1)).view_as(weight)
            fused[f"{name}.weight"] = weight + ALPHA / RANK * delta
        return fused

    def save(self, path: Path) -> None:
        """Write kohya keys, float16, as Hyper-SD's files have them."""
        tensors = {}
        for name, down, up in zip(self.names, self.down, self.up, strict=True):
            key = "lora_unet_" + name.replace(".", "_")
            tensors[f"{key}.lora_down.weight"] = down.detach().half().contiguous()
            tensors[f"{key}.lora_up.weight"] = up.detach().half().contiguous()
            tensors[f"{key}.alpha"] = torch.tensor(ALPHA, dtype=torch.float16)
        save_file(tensors, path)


class WithLora(nn.Module):
    """A frozen UNet with a LoRA fused in for each call."""

    def __init__(self, unet: nn.Module, lora: Lora) -> None:
        super().__init__()
        object.__setattr__(self, "unet", unet)  # not a submodule: it is not trained, averaged or saved
        self.lora = lora

    def forward(self, *args: object, **kwargs: object) -> object:
        return torch.func.functional_call(self.unet, self.lora.fused(self.unet), args, kwargs)
