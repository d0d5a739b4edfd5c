"""Record what LyCORIS makes of weights with its LoRAs, for the tests of weights/.

    pip install --no-deps --target FOLDER lycoris-lora==4.1.3 einops toml
    PYTHONPATH=FOLDER python scripts/record_lycoris.py

Every case is a small layer and a random LoRA of one of LyCORIS' kinds: the tensors as its files have them, the layer's
weight, and the weight that the two have together when they run, as in training. They are written to
tests/assets/lycoris.safetensors. (LyCORIS 4.1.3's get_merged_weight applies the scale of a LoHa and a LoKr twice.)
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

OUT = Path(__file__).parents[1] / "tests/assets/lycoris.safetensors"
DORA: dict[str, Any] = {"weight_decompose": True}
# Module, class, rank, and what else makes the kind; a factor and a low rank let LoKr decompose its matrices.
CASES: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "lora": ("locon", "LoConModule", 3, {}),
    "lora stabilized": ("locon", "LoConModule", 3, {"rs_lora": True}),
    "lora tucker": ("locon", "LoConModule", 3, {"use_tucker": True}),
    "lora dora": ("locon", "LoConModule", 3, DORA),
    "lora dora inputs": ("locon", "LoConModule", 3, DORA | {"wd_on_out": False}),
    "loha": ("loha", "LohaModule", 2, {}),
    "loha tucker": ("loha", "LohaModule", 2, {"use_tucker": True}),
    "loha dora": ("loha", "LohaModule", 2, DORA),
    "lokr": ("lokr", "LokrModule", 1, {"factor": 3}),
    "lokr both": ("lokr", "LokrModule", 1, {"factor": 3, "decompose_both": True}),
    "lokr tucker": ("lokr", "LokrModule", 1, {"factor": 3, "use_tucker": True}),
    "lokr whole": ("lokr", "LokrModule", 1, {"factor": 3, "full_matrix": True}),
    "lokr dora": ("lokr", "LokrModule", 1, {"factor": 3} | DORA),
}
LAYERS = {"linear": lambda: nn.Linear(6, 9, bias=False), "conv": lambda: nn.Conv2d(6, 9, 3, bias=False)}


def record(name: str, layer: nn.Linear | nn.Conv2d) -> dict[str, Tensor]:
    """The tensors of one case, with the parts of its file under ``file/``."""
    module_name, class_name, rank, more = CASES[name]
    made = getattr(importlib.import_module(f"lycoris.modules.{module_name}"), class_name)(
        "layer", layer, lora_dim=rank, alpha=1.5, **more
    )
    for key, parameter in made.named_parameters():
        if key.startswith(("lora", "hada", "lok")):
            nn.init.normal_(parameter, std=0.5)
        elif key == "dora_scale":
            parameter.data.mul_(1.25)
    file = made.custom_state_dict() or made.state_dict()
    inputs = torch.eye(layer.weight[0].numel()).view(-1, *layer.weight.shape[1:])  # each picks out one column
    tensors = {"weight": layer.weight, "fused": made(inputs).flatten(1).T.reshape(layer.weight.shape)}
    tensors |= {f"file/{part}": tensor for part, tensor in file.items()}
    return {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}


def main() -> None:
    torch.manual_seed(0)
    recorded: dict[str, Tensor] = {}
    for name in CASES:
        for kind, make in LAYERS.items():
            if kind == "linear" and "tucker" in name:
                continue
            recorded |= {f"{name}, {kind}/{key}": tensor for key, tensor in record(name, make()).items()}
    save_file(recorded, OUT)
    print(f"{OUT}: {len(recorded)} tensors, {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
