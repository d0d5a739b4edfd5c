"""A bundle's one-graph as an image function: tokens and noise in, finished pixels out, in one run of one engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..engines import Engine, Manifest
from ..engines.component_names import IMAGES, LATENTS, input_ids, lora_input, noise_input
from ..engines.engine import TORCH_DTYPES
from ..engines.specs import OneGraph
from ..errors import RequestError
from ..families import find_family
from ..samplers import Plan
from ..samplers.loop import draw_noise
from ..samplers.noise import Generators
from .adapters import PackedSlot
from .batching import run_rows
from .call import Call
from .params import Params
from .request import GenerationSettings, Request
from .text import TokenizedTexts


def find_one_graph(manifest: Manifest, params: Params) -> str:
    """The name of the first one-graph whose fixed settings are those that ``params`` ask for.

    Raises:
        RequestError: the bundle has none.
    """
    misfits = {name: _misfits(one_graph, params) for name, one_graph in manifest.one_graphs.items()}
    if found := next((name for name, reasons in misfits.items() if not reasons), None):
        return found
    has = "; ".join(f"{name} is fixed to {', '.join(reasons)}" for name, reasons in misfits.items()) or "it has none"
    raise RequestError(f"no one-graph of this bundle fits: {has}; add one with `hypersd export --one-graph`")


def fixed_params(manifest: Manifest, name: str, params: Params) -> Params:
    """``params`` with the settings of a one-graph.

    Raises:
        RequestError: ``params`` ask for other settings.
    """
    one_graph = manifest.one_graphs[name]
    if reasons := _misfits(one_graph, params):
        raise RequestError(f"{name} is fixed to {', '.join(reasons)}: leave them out, or generate without a one-graph")
    return replace(
        params,
        num_inference_steps=one_graph.num_inference_steps,
        timesteps=one_graph.timesteps,
        eta=one_graph.eta,
        height=one_graph.height,
        width=one_graph.width,
        force=True,  # the graph was composed for its steps
    )


def _misfits(one_graph: OneGraph, params: Params) -> list[str]:
    """The settings of a one-graph that differ from the ones asked for. The number of images is free."""
    steps = params.num_inference_steps if params.timesteps is None else len(params.timesteps)
    asked = {
        "steps": (one_graph.steps, steps),
        "timesteps": (one_graph.timesteps, None if params.timesteps is None else tuple(params.timesteps)),
        "eta": (one_graph.eta, params.eta),
        "height": (one_graph.height, params.height),
        "width": (one_graph.width, params.width),
        "output_type": ("pil", params.output_type),
        "guidance_scale": (0, params.guidance_scale if (params.guidance_scale or 0) > 1 else None),
        "image": (None, None if params.image is None else "one"),
        "control_image": (None, None if params.control_image is None else "one"),
    }
    return [f"{name}={fixed} (asked: {given})" for name, (fixed, given) in asked.items() if given not in (None, fixed)]


class OneGraphFunction:
    """A one-graph as a function of tensors, beside :class:`.image_function.ImageFunction` of all components."""

    def __init__(self, manifest: Manifest, name: str, engine: Engine) -> None:
        self.engine = engine
        self.encoders = find_family(manifest.family).encoder_names
        self.dtype: torch.dtype = TORCH_DTYPES[engine.inputs[LATENTS].dtype]

    def make_constants(self, call: Call) -> dict[str, Tensor]:
        """No inputs: the graph holds its constants."""
        return {}

    def lora_inputs(self, slot: PackedSlot) -> dict[str, Tensor]:
        """The contents of the components' LoRA slots, by the graph's input."""
        return {lora_input(component): tensor for component, tensor in slot.tensors.items()}

    def text_inputs(self, request: Request, tokenized: TokenizedTexts) -> dict[str, Tensor]:
        """Token ids, int64 [B, 77], for each text encoder's input, a row for each image."""
        return {
            input_ids(encoder): torch.cat([tokenized.input_ids[text][encoder] for text in tokenized.texts])
            .repeat_interleave(request.num_images_per_prompt, dim=0)
            .to(self.engine.device)
            for encoder in self.encoders
        }

    def draw_noise(self, plan: Plan, latents: Tensor, generator: Generators) -> dict[str, Tensor]:
        """The inputs ``noise_0`` and so on, [B, 4, h, w] each, for the steps that take noise."""
        noises = draw_noise(latents, plan, generator=generator)
        return {noise_input(i): noise for i, noise in enumerate(noises) if noise is not None}

    def generate(self, settings: GenerationSettings, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``output``: finished pixels [B, H, W, 3], uint8; the tensor may be the engine's own buffer."""
        feeds = {name: inputs[name].contiguous() for name in self.engine.inputs}
        return {"output": run_rows(self.engine, feeds)[IMAGES]}
