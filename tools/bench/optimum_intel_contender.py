"""optimum-intel's pipelines on the bundle's own weights; runs in an environment that need not have this package's.

:mod:`hypersd.tools.bench.openvino_folder` writes the folder, :mod:`hypersd.tools.bench.openvino_models` its models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from optimum import intel  # pyright: ignore[reportMissingImports]  # it cannot share our environment

from ...families import find_family
from .openvino_models import cpu_precision
from .optimum_encoders import adapt_encoders
from .protocol import Facts, Settings, TimedImage
from .timed_pipeline import TimedPipeline

PACKAGES = ("torch", "optimum-intel", "optimum", "diffusers", "transformers", "openvino", "nncf")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


class Runner:
    """A bundle's components in the layout of OpenVINO's exports, compiled for one size.

    Args:
        folder: that layout.
        family: the name of the bundle's.
        precision: the bundle's, ``"fp32"`` or ``"fp16"``: its noise is drawn in it.
        rows: of the UNet.
        latents: height and width.
    """

    def __init__(self, folder: str, family: str, precision: str, rows: int, latents: Sequence[int]) -> None:
        self._folder = folder
        self._family = find_family(family)
        self._precision = precision
        self._rows = rows
        self._latents = latents

    def load(self) -> Facts:
        """Load and compile, with optimum-intel's own defaults but for the fixed shapes."""
        pipeline_class = getattr(intel, f"OV{self._family.pipeline_class}")
        pipe: Any = pipeline_class.from_pretrained(self._folder, compile=False, dynamic_shapes=False)
        for name in ("unet", "vae_decoder", *self._family.encoder_names):
            _fix_shapes(getattr(pipe, name).model, self._rows if name == "unet" else 1, self._latents)
        pipe.compile()
        adapt_encoders(pipe, self._family, "last_hidden_state")
        self._timed = TimedPipeline(pipe, torch.device("cpu"), DTYPES[self._precision])
        how = "OpenVINO, static shapes, fp16 weights"
        return Facts(precision=cpu_precision(), device="cpu", how=how, packages=PACKAGES)

    def generate(self, settings: Settings) -> TimedImage:
        """Generate one image."""
        return self._timed.generate(settings)


def _fix_shapes(model: Any, rows: int, latents: Sequence[int]) -> None:
    """Reshape. The pipeline's own method takes two rows for granted, and bundles without guidance have one."""
    shapes = {port: port.get_partial_shape() for port in model.inputs}
    for port, shape in shapes.items():
        if port.get_any_name() != "timestep":
            shape[0] = rows
        if len(shape) == 4:
            shape[2], shape[3] = latents
    model.reshape(shapes)
