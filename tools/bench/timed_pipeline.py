"""Pipelines with diffusers' parts and arguments (diffusers' own and optimum's), timed stage by stage from outside."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch

from .protocol import CONVERSION, DECODE, TEXT_ENCODERS, TOKENS, Settings, TimedImage, step_name


class StageClock:
    """Seconds by stage of one image. On a CUDA device marks are events: the host waits for no stage."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[tuple[str, Any, Any]] = []
        self._steps = 0
        self._step_began: Any = None

    def reset(self) -> None:
        """Begin a new image."""
        self._spans, self._steps, self._step_began = [], 0, None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the body."""
        began = self._mark()
        yield
        self._spans.append((name, began, self._mark()))

    @contextmanager
    def step_begins(self) -> Iterator[None]:
        """Surround the UNet, where a step begins."""
        self._steps += 1
        self._step_began = self._mark()
        yield

    @contextmanager
    def step_ends(self) -> Iterator[None]:
        """Surround the scheduler's arithmetic, where a step ends."""
        yield
        if self._step_began is not None:
            self._spans.append((step_name(self._steps), self._step_began, self._mark()))
            self._step_began = None

    def stages(self) -> dict[str, float]:
        """Seconds by stage, once the image is finished."""
        is_cuda = self._device.type == "cuda"
        if is_cuda:
            torch.cuda.synchronize(self._device)  # for the last mark; the image itself is on the host already
        stages: dict[str, float] = {}
        for name, began, ended in self._spans:
            seconds = began.elapsed_time(ended) / 1000 if is_cuda else ended - began
            stages[name] = stages.get(name, 0.0) + seconds
        return stages

    def _mark(self) -> Any:
        """A point in time: of the device's work so far, or of the host's clock."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


class _Timed:
    """A part of a pipeline that enters ``around`` for every call; all else is the part's own."""

    def __init__(self, part: Any, around: Callable[[], AbstractContextManager[None]]) -> None:
        self._part = part
        self._around = around

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._around():
            return self._part(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)


def _timed(function: Callable[..., Any], around: Callable[[], AbstractContextManager[None]]) -> Callable[..., Any]:
    """The same for a method, whose signature the pipelines inspect."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with around():
            return function(*args, **kwargs)

    return call


class TimedPipeline:
    """Generates with a pipeline of diffusers' kind; noise is drawn in ``noise_dtype``, for any compute type."""

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

    def generate(self, settings: Settings) -> TimedImage:
        """Generate one image."""
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
        return TimedImage(np.asarray(result.images[0]), seconds, self._clock.stages())


def _draw_noise_in(pipe: Any, noise_dtype: torch.dtype) -> None:
    """Draw all noise in one dtype: the same seed gives different noise, and so another image, in another dtype."""
    for function in (type(pipe).prepare_latents, type(pipe.scheduler).step):
        names = inspect.unwrap(function).__globals__
        names["randn_tensor"] = _noise_in(names["randn_tensor"], noise_dtype)


def _noise_in(draw: Callable[..., torch.Tensor], noise_dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """diffusers' ``randn_tensor``, but drawn in ``noise_dtype`` and then rounded to the dtype asked for."""

    def randn_tensor(*args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> torch.Tensor:
        return draw(*args, dtype=noise_dtype, **kwargs).to(dtype)

    return randn_tensor
