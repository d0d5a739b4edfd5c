"""Pipelines with diffusers' parts and arguments, timed stage by stage from outside: diffusers' own and optimum's."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch

from ..drawing import CONVERSION, DECODE, TEXT_ENCODERS, TOKENS, Drawn, Settings, step_name


class StageClock:
    """Adds up seconds by stage; on a CUDA device every stage is waited for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.stages: dict[str, float] = {}
        self._steps = 0
        self._step_began: float | None = None

    def reset(self) -> None:
        """A new image begins."""
        self.stages, self._steps, self._step_began = {}, 0, None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what is inside."""
        began = time.perf_counter()
        yield
        self.stages[name] = self.stages.get(name, 0.0) + self._now() - began

    @contextmanager
    def step_begins(self) -> Iterator[None]:
        """Inside runs the UNet. The step ends with :meth:`step_ends`."""
        self._steps += 1
        self._step_began = time.perf_counter()
        yield

    @contextmanager
    def step_ends(self) -> Iterator[None]:
        """Inside is the scheduler's arithmetic, the last of a step."""
        yield
        if self._step_began is not None:
            self.stages[step_name(self._steps)] = self._now() - self._step_began
            self._step_began = None

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class _Timed:
    """A part that a pipeline calls: ``around`` surrounds every call, all else is the part's own."""

    def __init__(self, part: Any, around: Callable[[], AbstractContextManager[None]]) -> None:
        self._part = part
        self._around = around

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._around():
            return self._part(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)


def _timed(function: Callable[..., Any], around: Callable[[], AbstractContextManager[None]]) -> Callable[..., Any]:
    """The same for a method, whose signature pipelines look at."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with around():
            return function(*args, **kwargs)

    return call


class TimedPipeline:
    """Draws with a pipeline of diffusers' kind; the noise is drawn in ``noise_dtype``, whatever it computes in."""

    def __init__(self, pipe: Any, device: torch.device, noise_dtype: torch.dtype) -> None:
        self._pipe = pipe
        self._clock = clock = StageClock(device)
        pipe.set_progress_bar_config(disable=True)
        _draw_noise_in(pipe, noise_dtype)
        for names, stage in (
            (("tokenizer", "tokenizer_2"), TOKENS),
            (("text_encoder", "text_encoder_2"), TEXT_ENCODERS),
        ):
            for name in names:
                if (part := getattr(pipe, name, None)) is not None:
                    setattr(pipe, name, _Timed(part, functools.partial(clock.stage, stage)))
        pipe.unet = _Timed(pipe.unet, clock.step_begins)
        pipe.scheduler.step = _timed(pipe.scheduler.step, clock.step_ends)
        pipe.vae.decode = _timed(pipe.vae.decode, functools.partial(clock.stage, DECODE))
        processor = pipe.image_processor
        processor.postprocess = _timed(processor.postprocess, functools.partial(clock.stage, CONVERSION))

    def draw(self, settings: Settings) -> Drawn:
        """Draw one image."""
        self._clock.reset()
        began = time.perf_counter()
        result = self._pipe(
            settings.prompt,
            **settings.schedule,
            eta=settings.eta,
            guidance_scale=settings.guidance_scale,
            height=settings.height,
            width=settings.width,
            generator=torch.Generator("cpu").manual_seed(settings.seed),
            output_type="pil",
        )
        seconds = time.perf_counter() - began
        return Drawn(np.asarray(result.images[0]), seconds, self._clock.stages)


def _draw_noise_in(pipe: Any, noise_dtype: torch.dtype) -> None:
    """Let all noise be that of one dtype: one seed is another noise, and so another image, in every dtype."""
    for function in (type(pipe).prepare_latents, type(pipe.scheduler).step):
        names = inspect.unwrap(function).__globals__
        names["randn_tensor"] = _noise_in(names["randn_tensor"], noise_dtype)


def _noise_in(draw: Callable[..., torch.Tensor], noise_dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """diffusers' ``randn_tensor``, which draws in ``noise_dtype`` and then rounds to what it is asked for."""

    def randn_tensor(*args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> torch.Tensor:
        return draw(*args, dtype=noise_dtype, **kwargs).to(dtype)

    return randn_tensor
