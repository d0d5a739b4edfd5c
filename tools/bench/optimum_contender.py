"""optimum-onnx's pipelines on the bundle's own ONNX files; runs in an environment that need not have this package's.

:mod:`hypersd.tools.bench.optimum_folder` writes the folder.
"""

from __future__ import annotations

from typing import Any

import onnxruntime as ort
import torch
from optimum import onnxruntime  # pyright: ignore[reportMissingImports]  # it cannot share our environment

from ...families import find_family
from .optimum_encoders import adapt_encoders
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
        adapt_encoders(pipe, self._family, "hidden_states")
        self._timed = TimedPipeline(pipe, self._device, DTYPES[self._precision])
        how = f"ONNX Runtime, {provider}"
        return Facts(precision=self._precision, device=device_name(self._device), how=how, packages=PACKAGES)

    def generate(self, settings: Settings) -> TimedImage:
        """Generate one image."""
        return self._timed.generate(settings)
