"""Weight files of random numbers, made and written one tensor at a time, so that networks of any size fit in memory."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor, nn

from ..engines.files import whole_file
from ..weights.lora_names import published_layers
from ..weights.safetensors_file import write_safetensors
from .models import layer_shapes

UP_STD = 0.1  # with an alpha that is the root of the rank, what the LoRA adds is a sixth of the weights
CLIP_NAMES = ("text_model.", "text_projection.")

Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class RandomFile:
    """A float16 weight file to write.

    Attributes:
        path: relative to the folder of all files; with the seed it decides the contents.
        shapes: of every tensor, by its published name.
        tensors: makes them in that order, from torch's CPU generator.
    """

    path: str
    shapes: Shapes
    tensors: Callable[[], Iterator[Tensor]]

    @property
    def name(self) -> str:
        """The folder's name, which is the network's; without a folder the file's own."""
        path = PurePosixPath(self.path)
        return path.parent.name or path.stem

    @property
    def size(self) -> int:
        """Bytes of the tensors."""
        return torch.float16.itemsize * sum(map(math.prod, self.shapes.values()))

    def write(self, root: Path, seed: int, on_tensor: Callable[[float], None]) -> None:
        """Write the file under ``root``, whole or not at all. torch's own random state stays as it was.

        Args:
            root: the folder of all files.
            seed: equal seeds make equal files.
            on_tensor: called with the fraction of the tensors that is written, 0 to 1.
        """
        path = root / self.path
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path, is_locked=True) as partial, torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_seed_of(self.path, seed))
            write_safetensors(partial, self.shapes, self._counted(on_tensor))

    def _counted(self, on_tensor: Callable[[float], None]) -> Iterator[Tensor]:
        for i, tensor in enumerate(self.tensors(), 1):
            yield tensor
            on_tensor(i / len(self.shapes))


def network_file(path: str, network: nn.Module) -> RandomFile:
    """The weights of a network on the meta device, initialised as torch initialises such layers.

    This keeps activations finite and alive in float16 through networks as deep as SDXL's.
    """
    shapes = {_published_name(network, name): tuple(weight.shape) for name, weight in network.named_parameters()}
    return RandomFile(path, shapes, lambda: _initialised(network))


def lora_file(path: str, unet: nn.Module, prefix: str, rank: int) -> RandomFile:
    """A LoRA over the layers that Hyper-SD's cover, with kohya keys that begin with ``prefix``."""
    shapes: Shapes = {}
    layers = layer_shapes(unet)
    for name in published_layers(layers):
        key, (rows, *columns) = prefix + name.replace(".", "_"), layers[name]
        shapes[f"{key}.lora_down.weight"] = (rank, *columns)
        shapes[f"{key}.lora_up.weight"] = (rows, rank, *[1] * (len(columns) - 1))
        shapes[f"{key}.alpha"] = ()
    return RandomFile(path, shapes, lambda: _lora_tensors(shapes, rank))


def _seed_of(path: str, seed: int) -> int:
    """A file's own seed: a resumed run draws the same numbers, whatever was written before."""
    return int.from_bytes(hashlib.sha256(f"{seed} {path}".encode()).digest()[:7], "big")


def _initialised(network: nn.Module) -> Iterator[Tensor]:
    """The weights in the order of ``named_parameters``; a layer's memory is released after its last one."""
    for module in network.modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.to_empty(device="cpu", recurse=False)
            module.reset_parameters()  # pyright: ignore[reportCallIssue]
            for weight in module.parameters(recurse=False):
                yield weight.detach()
            module.to("meta")


def _lora_tensors(shapes: Shapes, rank: int) -> Iterator[Tensor]:
    for name, shape in shapes.items():
        if name.endswith(".alpha"):
            yield torch.tensor(rank**0.5)
        else:
            std = UP_STD if name.endswith("lora_up.weight") else math.prod(shape[1:]) ** -0.5
            yield torch.randn(shape) * std


def _published_name(network: nn.Module, name: str) -> str:
    """The name in published files: transformers' CLIPTextModel leaves a part of it out since version 5."""
    is_clip = type(network).__name__.startswith("CLIPText")
    return f"{CLIP_NAMES[0]}{name}" if is_clip and not name.startswith(CLIP_NAMES) else name
