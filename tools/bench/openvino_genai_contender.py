"""OpenVINO GenAI's pipeline on the bundle's own weights; runs in an environment that need not have this package's.

:mod:`hypersd.tools.bench.openvino_folder` writes the folder, :mod:`hypersd.tools.bench.openvino_models` its models.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai  # pyright: ignore[reportMissingImports]  # it is in an environment of its own

from .openvino_models import cpu_precision
from .protocol import DECODE, TEXT_ENCODERS, Facts, Settings, TimedImage, step_name

PACKAGES = ("openvino-genai", "openvino", "openvino-tokenizers")
NOISY = 0.5  # the eta from which TCD is nearer to LCM than to DDIM


class Runner:
    """A bundle's components in the layout of OpenVINO's exports, compiled for one size.

    Args:
        folder: that layout.
        sampler: the bundle's kind of sampler.
        eta: of all images.
        height: of all images, in pixels.
        width: likewise.
        guidance_scale: of all images; above 1 the UNet computes two rows.
    """

    def __init__(self, folder: str, sampler: str, eta: float, height: int, width: int, guidance_scale: float) -> None:
        self._folder = folder
        self._sampler = sampler
        self._of_several_steps = "LCM" if sampler == "lcm" or (sampler == "tcd" and eta >= NOISY) else "DDIM"
        self._shape = (1, height, width, guidance_scale)

    def load(self) -> Facts:
        """Load and compile, with GenAI's own defaults but for the fixed shapes."""
        self._pipe = genai.Text2ImagePipeline(self._folder)
        self._pipe.reshape(*self._shape)
        self._pipe.compile("CPU")
        how = f"OpenVINO, C++, static shapes, fp16 weights, {self._samplers()}"
        return Facts(precision=cpu_precision(), device="cpu", how=how, packages=PACKAGES)

    def generate(self, settings: Settings) -> TimedImage:
        """Generate one image from the noise of its seed."""
        assert settings.noise is not None, "the noise was not handed over"
        steps = settings.num_inference_steps or 1  # a custom timestep is one step
        noise = _Noise(np.load(settings.noise))
        self._pipe.set_scheduler(self._scheduler(steps))
        began = time.perf_counter()
        image = self._pipe.generate(
            settings.prompt,
            num_inference_steps=steps,
            guidance_scale=settings.guidance_scale,
            height=settings.height,
            width=settings.width,
            num_images_per_prompt=1,
            generator=noise,
        )
        pixels = image.data[0].copy()
        seconds = time.perf_counter() - began
        return TimedImage(pixels, seconds, _stages(self._pipe.get_performance_metrics()))

    def _samplers(self) -> str:
        """A few words."""
        if self._sampler != "tcd":
            return self._of_several_steps
        several = "" if self._of_several_steps == "DDIM" else f", and {self._of_several_steps} for several"
        return f"no TCD: DDIM for one step, which is the same{several}"

    def _scheduler(self, steps: int) -> Any:
        """The bundle's sampler, or the nearest: at eta 1 TCD is LCM, but for the alpha of the first timestep."""
        name = "DDIM" if self._sampler == "tcd" and steps == 1 else self._of_several_steps
        kind = getattr(genai.Scheduler.Type, name)
        return genai.Scheduler.from_config(Path(self._folder) / "scheduler/scheduler_config.json", kind)


class _Noise(genai.Generator):
    """Hands out noise, [draws, 1, C, h, w] float32, in place of random numbers."""

    def __init__(self, draws: np.ndarray) -> None:
        super().__init__()
        self._draws = iter(draws)

    def randn_tensor(self, shape: Any) -> ov.Tensor:
        """The next draw."""
        draw = next(self._draws)
        assert draw.shape == tuple(shape), f"noise of {list(draw.shape)} was handed over, GenAI draws {list(shape)}"
        return ov.Tensor(draw)


def _stages(metrics: Any) -> dict[str, float]:
    """GenAI's own figures, in whole milliseconds but for the steps; tokens are in the text encoders' and conversion in
    the decoder's."""
    steps = metrics.raw_metrics.iteration_durations  # microseconds
    return {
        TEXT_ENCODERS: sum(metrics.get_text_encoder_infer_duration().values()) / 1000,
        **{step_name(i): each / 1e6 for i, each in enumerate(steps, start=1)},
        DECODE: metrics.get_vae_decoder_infer_duration() / 1000,
    }
