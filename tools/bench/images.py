"""Which images are drawn: the same ones by all contenders, and none of them twice."""

from __future__ import annotations

import dataclasses

from ...engines import Manifest
from ...runtime.params import Params, decide
from ...runtime.request import Request
from .drawing import Settings
from .options import BenchOptions


def make_requests(manifest: Manifest, options: BenchOptions) -> list[Request]:
    """One for each number of steps, with every setting decided.

    Raises:
        RequestError: a setting is out of range for the bundle.
    """
    common = Params(
        prompt=options.prompt, eta=options.eta, height=options.height, width=options.width, seed=options.seed
    )
    return [
        decide(manifest, dataclasses.replace(common, num_inference_steps=steps)) for steps in options.steps or [None]
    ]


def image(request: Request, seed: int, number: int) -> Settings:
    """The image of that number, from 0 on: a seed of its own, and a prompt that no cache of text has seen."""
    prompt = request.prompts[0]
    return Settings(
        prompt=f"{prompt}, {number + 1}" if number else prompt,
        seed=seed + number,
        num_inference_steps=request.num_inference_steps,
        timesteps=request.timesteps,
        eta=request.eta,
        guidance_scale=request.guidance_scale,
        height=request.height,
        width=request.width,
    )
