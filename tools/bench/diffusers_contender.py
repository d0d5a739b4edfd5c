"""diffusers, with the LoRA fused by peft: eager or compiled, in the bundle's precision or in bfloat16."""

from __future__ import annotations

from typing import Any, Literal

import diffusers
import peft
import torch
import transformers
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline  # noqa: F401  # diffusers imports classes on first use

from ...engines import Bundle
from ...engines.precision import PRECISIONS
from ..reference import find_reference_sources, load_pipeline
from .protocol import Facts, Settings, TimedImage, device_name, resolve_device
from .timed_pipeline import TimedPipeline

PACKAGES = tuple(library.__name__ for library in (torch, diffusers, transformers, peft))
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Runner:
    """The sources of a bundle in diffusers.

    Args:
        bundle: the bundle's folder.
        device: ``"auto"``, ``"cpu"`` or a CUDA device.
        precision: ``"bf16"``, or ``"bundle"`` for the bundle's own; float32 for that on a CPU, where torch's float16
            is slow.
        mode: ``"compiled"`` puts torch.compile around the UNet and the decoder, ``"eager"`` nothing.
    """

    def __init__(
        self, bundle: str, device: str, precision: Literal["bundle", "bf16"], mode: Literal["eager", "compiled"]
    ) -> None:
        self._manifest = Bundle.load(bundle).manifest
        self._device = resolve_device(device)
        own = PRECISIONS[self._manifest.precision].plain.name if self._device.type == "cuda" else "fp32"
        self._precision = own if precision == "bundle" else precision
        self._compile = {"eager": _as_it_is, "compiled": _compile}[mode]
        self._mode = mode
        self._sources = find_reference_sources(self._manifest)

    def load(self) -> Facts:
        """Load and fuse, convert, compile (which happens at the first call)."""
        pipe = load_pipeline(self._manifest, self._sources)
        pipe.to(self._device, DTYPES[self._precision])
        is_half = self._precision != "fp32"
        if is_half:  # the fastest layout of half-precision convolutions, on CPUs and GPUs
            pipe.unet.to(memory_format=torch.channels_last)
            pipe.vae.to(memory_format=torch.channels_last)
        self._compile(pipe)
        self._timed = TimedPipeline(pipe, self._device, PRECISIONS[self._manifest.precision].dtype)
        layout = ", channels_last" if is_half else ""
        return Facts(
            precision=self._precision,
            device=device_name(self._device),
            how=f"{self._mode}{layout}",
            packages=PACKAGES,
        )

    def generate(self, settings: Settings) -> TimedImage:
        """Generate one image."""
        return self._timed.generate(settings)


def _as_it_is(pipe: Any) -> None:
    """Compile nothing."""


def _compile(pipe: Any) -> None:
    """Put torch.compile around the UNet and the decoder; on a GPU with CUDA graphs."""
    mode = "reduce-overhead" if pipe.device.type == "cuda" else None
    pipe.unet = torch.compile(pipe.unet, mode=mode)
    pipe.vae.decode = torch.compile(pipe.vae.decode, mode=mode)
