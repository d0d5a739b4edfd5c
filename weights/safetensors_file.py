"""Reads and writes big safetensors files tensor by tensor, and keeps none of them in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import WeightsError

# Pages that were read through the file's mapping count as this process's memory until it is unmapped.
REMAP_BYTES = 1 << 28
FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})  # types of weights; integers are quantized


class SafetensorsFile:
    """An open ``.safetensors`` file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes_read = 0
        self._open()
        self.names: tuple[str, ...] = tuple(self._file.keys())
        self.metadata: dict[str, str] = self._file.metadata() or {}

    def _open(self) -> None:
        try:
            self._file = safe_open(str(self.path), framework="pt", device="cpu")
        except OSError as error:
            raise WeightsError(f"{self.path} cannot be read: {error.strerror or error}") from error
        except SafetensorError as error:
            raise WeightsError(
                f"{self.path} is not a whole safetensors file ({error}): download it again, or convert it"
            ) from error

    def read(self, name: str) -> Tensor:
        """One tensor, as stored: a view of the file, to be converted or cloned at once."""
        if self._bytes_read > REMAP_BYTES:
            self._open()
            self._bytes_read = 0
        tensor = self._file.get_tensor(name)
        self._bytes_read += tensor.nbytes
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from the header."""
        return tuple(self._file.get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """A tensor's type in the format's words (``F16``, ``F8_E4M3``), from the header."""
        return self._file.get_slice(name).get_dtype()

    def elements(self) -> Iterator[int]:
        """The number of elements of every tensor, without reading any."""
        return (math.prod(self._file.get_slice(name).get_shape()) for name in self.names)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor by name, in the file's order."""
        for name in self.names:
            yield name, self.read(name)


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite; one pass, and no copy unless it is of float8."""
    if not tensor.numel():
        return True
    low, high = (tensor.float() if tensor.dtype.itemsize == 1 else tensor).aminmax()
    return bool(torch.isfinite(low) and torch.isfinite(high))


def write_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]], tensors: Iterable[Tensor]) -> None:
    """Write a file of float16 tensors, which are taken one at a time.

    Args:
        path: the file; replaced if it is there.
        shapes: the shape of every tensor, by name.
        tensors: the tensors in that order, on the CPU; they are rounded to float16.

    Raises:
        OSError: the file cannot be written.
    """
    with path.open("wb") as file:
        file.write(_header(shapes))
        for shape, tensor in zip(shapes.values(), tensors, strict=True):
            assert tuple(tensor.shape) == shape
            file.write(tensor.to(torch.float16).reshape(-1).numpy().data)


def _header(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """The file's beginning, before the tensors (https://github.com/huggingface/safetensors#format)."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + torch.float16.itemsize * math.prod(shape)
        entries[name] = {"dtype": "F16", "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    return len(text).to_bytes(8, "little") + text
