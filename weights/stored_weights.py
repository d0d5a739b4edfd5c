"""The weights of one component as its files hold them: whole, in shards, or as a part of one big file.

Scaled fp8 is read here too. A layer then has its weight in float8 and a scale beside it, ``X.scale_weight``
(ComfyUI's scaled files) or ``X.weight_scale`` (TensorRT Model Optimizer, compressed-tensors, ComfyUI since 0.4), with
which it is multiplied; ``X.scale_input`` and ``X.input_scale`` are for kernels that compute in float8.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ..errors import WeightsError
from .safetensors_file import FLOATS, SafetensorsFile

FLOAT8 = frozenset({"F8_E4M3", "F8_E5M2"})
SCALES = ("scale_weight", "weight_scale")
UNUSED = ("scale_input", "input_scale")
MARK = "scaled_fp8"  # an empty tensor in ComfyUI's scaled files


class StoredWeights:
    """Weight files as one collection of tensors; the scale of a scaled weight is not a tensor of its own."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Open the files and read their headers.

        Raises:
            WeightsError: a file is damaged, two hold the same tensor, or a float8 weight has companions that are
                not known, so that its value is not known either.
        """
        self._files: dict[str, SafetensorsFile] = {}
        for file in map(SafetensorsFile, paths):
            for name in file.names:
                if name in self._files:
                    raise WeightsError(f"{file.path} and {self._files[name].path} both hold {name}: expected it once")
                self._files[name] = file
        self._scales: dict[str, str] = {}
        companions = {name for name in self._files if self._is_companion(name)}
        self.names: tuple[str, ...] = tuple(name for name in self._files if name not in companions)

    def path(self, name: str) -> Path:
        """The file that holds the tensor."""
        return self._files[name].path

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, from the header."""
        return self._files[name].shape(name)

    def check_dtype(self, name: str) -> None:
        """Reject integers, which are quantized weights.

        Raises:
            WeightsError: the tensor is not of a floating type that is read here.
        """
        if (dtype := self._files[name].dtype(name)) not in FLOATS:
            raise WeightsError(
                f"{self.path(name)}: {name} is stored as {dtype}, expected {', '.join(sorted(FLOATS))}: "
                "take the model's unquantized weights"
            )

    def read(self, name: str) -> Tensor:
        """The tensor as stored, a view of the file; in float32 if a scale was multiplied in."""
        tensor = self._files[name].read(name)
        if (key := self._scales.get(name)) is None:
            return tensor
        scale = self._files[key].read(key).float()
        return tensor.float() * scale.reshape(-1, *[1] * (tensor.dim() - 1))

    def _is_companion(self, name: str) -> bool:
        """Whether the tensor says something about a float8 weight, which is noted."""
        layer, _, leaf = name.rpartition(".")
        if leaf == MARK:
            return True
        weight = f"{layer}.weight"
        if leaf in ("weight", "bias") or weight not in self._files or self._files[weight].dtype(weight) not in FLOAT8:
            return False
        if leaf not in (*SCALES, *UNUSED):
            raise WeightsError(
                f"{self.path(name)}: {name} stands beside a float8 weight, expected {', '.join((*SCALES, *UNUSED))}: "
                "take weights without such a scale, in fp16"
            )
        if leaf in SCALES:
            self._check_scale(weight, name)
            self._scales[weight] = name
        return True

    def _check_scale(self, weight: str, scale: str) -> None:
        """One scale, or one for each row."""
        shape, rows = self.shape(scale), self.shape(weight)[0]
        if any(extent != 1 for extent in shape) and (shape[0] != rows or any(extent != 1 for extent in shape[1:])):
            raise WeightsError(
                f"{self.path(scale)}: {scale} has the shape {list(shape)}, expected one scale or {rows}, one for each "
                "row: take weights without such a scale, in fp16"
            )
        if weight in self._scales:
            raise WeightsError(f"{self.path(scale)}: {weight} has two scales, expected one: take the weights in fp16")
