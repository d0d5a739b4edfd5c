"""optimum-onnx's pipelines on the bundle's own ONNX files; runs in an environment that need not have this package's.

:mod:`hypersd.tools.bench.optimum_folder` writes the folder.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import onnxruntime as ort
import torch
from optimum import onnxruntime  # pyright: ignore[reportMissingImports]  # it cannot share our environment

from ...families import find_family
from .protocol import Facts, Settings, TimedImage, device_name, resolve_device
from .timed_pipeline import TimedPipeline

PACKAGES = ("torch", "optimum-onnx", "optimum", "diffusers", "transformers", "onnxruntime", "onnxruntime-gpu")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


class Runner:
    """A bundle's components in the layout of optimum's exports.

    Args:
        folder: that layout.
        family: the name of the bundle's.
        precision: the bundle's, ``"fp32"`` or ``"fp16"``.
        device: ``"auto"``, ``"cpu"`` or a CUDA device.
    """

    def __init__(self, folder: str, family: str, precision: str, device: str) -> None:
        self._folder = folder
        self._family = find_family(family)
        self._precision = precision
        has_cuda = "CUDAExecutionProvider" in ort.get_available_providers()
        self._device = resolve_device(device if has_cuda or device != "auto" else "cpu")

    def load(self) -> Facts:
        """Load, with optimum's own defaults."""
        is_cuda = self._device.type == "cuda"
        provider = "CUDAExecutionProvider" if is_cuda else "CPUExecutionProvider"
        options = {"device_id": self._device.index or 0} if is_cuda else {}
        pipeline_class = getattr(onnxruntime, f"ORT{self._family.pipeline_class}")
        pipe: Any = pipeline_class.from_pretrained(self._folder, provider=provider, provider_options=options)
        for encoder in self._family.text_encoders:
            if encoder.hidden_layer is not None:
                setattr(pipe, encoder.component, _TextEncoder(getattr(pipe, encoder.component)))
        self._timed = TimedPipeline(pipe, self._device, DTYPES[self._precision])
        how = f"ONNX Runtime, {provider}"
        return Facts(precision=self._precision, device=device_name(self._device), how=how, packages=PACKAGES)

    def generate(self, settings: Settings) -> TimedImage:
        """Generate one image."""
        return self._timed.generate(settings)


class _Encoded(NamedTuple):
    """A text encoder's outputs as SDXL's pipeline reads them: the pooled projection first, then the hidden states."""

    first: torch.Tensor
    hidden_states: tuple[torch.Tensor | None, ...]


class _TextEncoder:
    """A bundle's text encoder, which computes only the layer in use, behind the interface of optimum's pipeline."""

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder

    def __call__(self, input_ids: torch.Tensor, output_hidden_states: bool | None = None) -> _Encoded:
        outputs = self._encoder(input_ids)
        hidden_states = outputs["hidden_states"]
        return _Encoded(outputs.get("text_embeds", hidden_states), (hidden_states, None))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)
