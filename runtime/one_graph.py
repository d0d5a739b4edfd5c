"""Images from a bundle's one-graph: one network from tokens and noise to finished pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engines import Bundle, Engine, Manifest
from ..engines.engine import TORCH_DTYPES
from ..engines.load import load_one_graph
from ..engines.manifest import OneGraph
from ..engines.one_graphs import IMAGES, LATENTS, input_ids, noise_input
from ..errors import RequestError
from ..samplers.noise import Generators, randn
from ..samplers.sampler import make_sampler
from .batching import run_rows
from .clock import Clock
from .params import Params, decide
from .pipeline import PipelineOutput, make_generators
from .pixels import to_images
from .request import Request
from .text import ClipTokenizer, TextConditioner, load_tokenizers


def why_not(one_graph: OneGraph, request: Request) -> str | None:
    """Why a one-graph does not draw what is asked for, all of it; None if it does. The number of images is free."""
    asked = {
        "steps": (request.num_inference_steps, one_graph.num_inference_steps),
        "timesteps": (request.timesteps, one_graph.timesteps),
        "eta": (request.eta, one_graph.eta),
        "height": (request.height, one_graph.height),
        "width": (request.width, one_graph.width),
    }
    reasons = [f"{name} {has}, not {wanted}" for name, (wanted, has) in asked.items() if wanted != has]
    if request.is_guided:
        reasons.append(f"no guidance, not {request.guidance_scale:g}")
    if request.controls:
        reasons.append("no ControlNets")
    return ", ".join(reasons) or None


def find_one_graph(manifest: Manifest, params: Params) -> str:
    """The name of the one-graph that generates what ``params`` ask for.

    Raises:
        RequestError: an argument is out of range, or the bundle has none that does.
    """
    request = decide(manifest, replace(params, force=True))  # a one-graph was made for its steps
    reasons = {name: why_not(one_graph, request) for name, one_graph in manifest.one_graphs.items()}
    if found := next((name for name, reason in reasons.items() if reason is None), None):
        return found
    has = "; ".join(f"{name} has {reason}" for name, reason in reasons.items()) or "it has none"
    raise RequestError(f"no one-graph of this bundle draws that: {has}; add one with `hypersd export --one-graph`")


def _with_settings(params: Params, settings: OneGraph) -> Params:
    """Params with the graph's settings where they leave them open."""
    has_steps = params.num_inference_steps is not None or params.timesteps is not None
    return replace(
        params,
        num_inference_steps=params.num_inference_steps if has_steps else settings.num_inference_steps,
        timesteps=params.timesteps if has_steps else settings.timesteps,
        eta=settings.eta if params.eta is None else params.eta,
        height=settings.height if params.height is None else params.height,
        width=settings.width if params.width is None else params.width,
        force=True,  # the graph was made for its steps, and generates no others
    )


class OneGraphPainter:
    """A one-graph as a function of tensors: nothing in it waits or draws."""

    def __init__(self, manifest: Manifest, name: str, engine: Engine) -> None:
        self.settings = manifest.one_graphs[name]
        self.engine = engine
        self._scale = manifest.vae.spatial
        self._channels = manifest.vae.latent_channels
        self._sampler = make_sampler(manifest.sampler.kind, **manifest.scheduler)

    def latents_shape(self, images: int) -> tuple[int, int, int, int]:
        """[B, 4, h, w] of so many images."""
        return images, self._channels, self.settings.height // self._scale, self.settings.width // self._scale

    @property
    def dtype(self) -> torch.dtype:
        """Of latents and noise."""
        return TORCH_DTYPES[self.engine.inputs[LATENTS].dtype]

    def draw_noise(self, latents: Tensor, generator: Generators) -> list[Tensor | None]:
        """The noise of every step, [B, 4, h, w], None where a step takes none; ``generator`` drew the latents."""
        settings = self.settings
        return self._sampler.draw_noise(
            latents,
            num_inference_steps=settings.num_inference_steps,
            timesteps=settings.timesteps,
            eta=settings.eta,
            generator=generator,
        )

    def paint(self, tokens: Mapping[str, Tensor], latents: Tensor, noises: Sequence[Tensor | None]) -> Tensor:
        """Finished pixels [B, H, W, 3], uint8; the tensor may be the engine's own buffer.

        Args:
            tokens: int64 [B, 77] for each text encoder, by its name, a row for each image.
            latents: unit-variance noise [B, 4, h, w], in :attr:`dtype`.
            noises: what :meth:`draw_noise` made.
        """
        feeds = {input_ids(encoder): ids.to(self.engine.device) for encoder, ids in tokens.items()}
        feeds[LATENTS] = latents.contiguous()
        feeds |= {noise_input(i): noise for i, noise in enumerate(noises) if noise is not None}
        return run_rows(self.engine, feeds)[IMAGES]


class OneGraphPipeline:
    """A one-graph that is ready to draw: a :class:`.pipeline.Pipeline` for one set of settings, with one network.

    Several threads may call it on the CPU; on a GPU they use a stream each, or take turns.
    """

    def __init__(self, manifest: Manifest, name: str, engine: Engine, tokenizers: Mapping[str, ClipTokenizer]) -> None:
        self.manifest = manifest
        self.name = name
        self.device = engine.device
        self.painter = OneGraphPainter(manifest, name, engine)
        self.tokenizers = tokenizers
        self._text = TextConditioner(tokenizers, {})  # its encoders are in the graph

    @classmethod
    def load(
        cls, bundle: str | Path, name: str | None = None, backend: str = "auto", device: str = "auto"
    ) -> OneGraphPipeline:
        """Load a one-graph of a bundle, and no other network.

        Args:
            bundle: the folder that ``hypersd export`` wrote.
            name: the one-graph's, as ``hypersd info`` shows it; None for the bundle's first.
            backend: ``"onnxruntime"``, which ``"auto"`` takes, or ``"openvino"``.
            device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.

        Raises:
            BundleError: the bundle is missing, damaged or altered.
            RequestError: it has no one-graph, or none of that name, or the backend is not known.
            EngineError: the device cannot be used here.
        """
        opened = Bundle.load(bundle)
        graphs = opened.manifest.one_graphs
        name = next(iter(graphs), None) if name is None else name
        if name is None or name not in graphs:
            asked, has = f" {name!r}" if name else "", ", ".join(graphs) or "none"
            raise RequestError(
                f"{opened.root} has no one-graph{asked}, it has {has}; add one with `hypersd export --one-graph`"
            )
        return cls(opened.manifest, name, load_one_graph(opened, name, backend, device), load_tokenizers(opened))

    def __call__(self, prompt: str | Sequence[str], **params: Any) -> PipelineOutput:
        """Generate images: :meth:`generate` with its params as keywords."""
        return self.generate(Params(prompt=prompt, **params))

    def generate(self, params: Params) -> PipelineOutput:
        """Generate images. Settings that are given must be those of the graph, which are taken for what is left out.

        Returns:
            A list of ``PIL.Image``, with seconds by stage: ``tokenize``, ``draw``, ``convert`` and ``total``.

        Raises:
            RequestError: a setting is not the graph's, or an argument is out of range.
            EngineError: the engine failed.
        """
        settings = self.painter.settings
        request = decide(self.manifest, _with_settings(params, settings))
        if reason := why_not(settings, request):
            raise RequestError(f"{self.name} has {reason}: expected its own settings, or a pipeline of all networks")
        generator, used_seed = make_generators(request, params.generator)
        clock = Clock()
        with clock.stage("tokenize"):
            tokens = self._tokens(request)
        with clock.stage("draw", self.device):
            pixels = self._draw(request, tokens, generator, params.latents).cpu()
        with clock.stage("convert"):
            images = to_images(pixels, "pil")
        return PipelineOutput(images=images, timings=clock.timings(), request=request, seed=used_seed)

    def _tokens(self, request: Request) -> dict[str, Tensor]:
        """Token ids [B, 77] by text encoder, a row for each image."""
        by_text = self._text.tokenize(request.prompts).input_ids
        return {
            encoder: torch.cat([by_text[text][encoder] for text in request.prompts]).repeat_interleave(
                request.num_images_per_prompt, dim=0
            )
            for encoder in by_text[request.prompts[0]]
        }

    def _draw(
        self, request: Request, tokens: Mapping[str, Tensor], generator: Generators, latents: Tensor | None
    ) -> Tensor:
        painter, shape = self.painter, self.painter.latents_shape(request.batch)
        if latents is None:
            latents = randn(shape, generator=generator, device=self.device, dtype=painter.dtype)
        elif tuple(latents.shape) != shape:
            raise RequestError(f"latents: expected a tensor of the shape {list(shape)}, got {list(latents.shape)}")
        latents = latents.to(self.device, painter.dtype)
        return painter.paint(tokens, latents, painter.draw_noise(latents, generator))
