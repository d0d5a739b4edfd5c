"""One call on its way through a bundle's engines: the whole image at once, or stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..engines import Engine, Manifest
from ..engines.cuda.capture import Capture
from ..engines.cuda.device import is_out_of_memory, out_of_memory_in_words
from ..engines.cuda.graphs import GraphedEngine, GraphedFunction
from ..engines.cuda.turns import Turns, hand_out
from ..engines.engine import TORCH_DTYPES
from ..engines.staged_engines import StagedEngines
from ..errors import RequestError
from ..samplers import Sampler
from .buckets import bucket, padded
from .call import Call
from .clock import Steps
from .controlled_unet import without_residuals
from .denoiser import Denoiser
from .image_function import ImageFunction
from .one_graph_function import OneGraphFunction
from .pixels import to_images, to_pixels
from .request import GenerationSettings
from .starts import START_IMAGES, draw, latents_shape
from .text import ClipTokenizer, TextConditioner

AfterStep = Callable[[Denoiser, int, int, Tensor], "Tensor | None"]
KEPT_GRAPHS = 16  # such as four kinds of call in batches of up to 8 images, which run in four sizes
WholeImage = Callable[[GenerationSettings, Mapping[str, Tensor]], Mapping[str, Tensor]]


class Runner:
    """Runs calls on a bundle's engines; on a GPU one at a time, on a stream of its own.

    Args:
        manifest: the bundle's.
        function: makes the inputs of a call, and images of them.
        text: tokenizes and encodes prompts.
        stages: the same function, if its stages can run one by one; None for a one-graph.
        whole: a whole image in one run: a one-graph, or CUDA graphs; None where only stages run.
        device: the denoiser's.
        dtype: that of its latents.
        has_turns: whether calls share memory that they have to take turns for, as they do on a GPU.
        release: called at the end of each turn, while the others still wait.
        padded_up_to: the largest batch whose rows are padded for graphs; 0 where no graph runs: padding would only cost
            time.
    """

    def __init__(
        self,
        manifest: Manifest,
        function: ImageFunction | OneGraphFunction,
        *,
        text: TextConditioner,
        stages: ImageFunction | None,
        whole: WholeImage | None,
        device: torch.device,
        dtype: torch.dtype,
        has_turns: bool,
        release: Callable[[], None] | None = None,
        padded_up_to: int = 0,
    ) -> None:
        self.manifest = manifest
        self.function = function
        self.text = text
        self.stages = stages
        self.whole = whole
        self.device = device
        self.dtype = dtype
        self.padded_up_to = padded_up_to
        self._turns = Turns(device) if has_turns else None
        self._release = release

    @contextmanager
    def turn(self) -> Iterator[torch.cuda.Stream | None]:
        """Wait for this runner's other calls, and keep them waiting; gives the caller's stream on a GPU.

        Tensors that are kept for later calls are no inference tensors, which could be written only in the inference
        mode that this caller may be in, and the next one not.
        """
        taken = nullcontext() if self._turns is None else self._turns.turn()
        with taken as caller, torch.inference_mode(False), torch.no_grad():  # the first of the two enables gradients
            try:
                yield caller
            finally:
                if self._release is not None:
                    self._release()

    def run(self, call: Call, after_step: AfterStep | None = None) -> Any:
        """The images of a call, of its ``output_type``; with ``after_step`` stage by stage.

        Raises:
            RequestError: the caller's latents are of another shape, or a one-graph is to call ``after_step``.
            EngineError: an engine failed, or the device's memory is not enough.
        """
        request = call.request
        generating = f"generating {request.batch} of {request.width}x{request.height}"
        with out_of_memory_in_words(generating), self.turn() as caller:
            if self.whole is not None and after_step is None:
                return self._at_once(self.whole, call, caller)
            return self._by_stages(call, after_step, caller)

    def by_stages(self) -> ImageFunction:
        """The image function whose stages run one by one.

        Raises:
            RequestError: a one-graph has no stages.
        """
        if self.stages is None:
            raise RequestError("a one-graph has no stages of its own: load the bundle without one_graph")
        return self.stages

    def _at_once(self, whole: WholeImage, call: Call, caller: torch.cuda.Stream | None) -> Any:
        """Draw the random numbers here, in the same order as stage by stage, and run the whole image."""
        with call.clock.stage("generate"):
            inputs = {**self._inputs(call), **self.function.text_inputs(call.request, call.tokenized)}
            inputs |= self.function.draw_noise(call.plan, inputs["latents"], call.generator)
            output = self._run_padded(whole, call, inputs)
            if call.settings.output_type in ("pt", "latent"):
                return hand_out(output.clone(), caller)  # the graph's own memory stays here
            pixels = self._to_host(output)
        with call.clock.stage("convert"):
            return self._images(pixels, call.settings.output_type)

    def _run_padded(self, whole: WholeImage, call: Call, inputs: Mapping[str, Tensor]) -> Tensor:
        """The output's rows of the call's own images.

        Rows are added for a graph alone: not if such a call cannot be recorded or has no memory for them.
        """
        settings, images = call.settings, call.request.batch
        rows = bucket(images, self.padded_up_to) if self.padded_up_to else images
        if rows > images and isinstance(whole, GraphedFunction):
            try:
                more = padded(inputs, images, rows, settings.is_guided)
                if whole.can_record(settings, more):
                    return whole(settings, more)["output"][:images]
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
        return whole(settings, inputs)["output"]

    def _by_stages(self, call: Call, after_step: AfterStep | None, caller: torch.cuda.Stream | None) -> Any:
        """Run one stage after the other; on a GPU each is waited for, so that its time is its own."""
        function, settings, clock = self.by_stages(), call.settings, call.clock
        with clock.stage("encode", self.device):
            inputs = self._inputs(call)
            embeddings = function.embed(call.request, call.tokenized)
            controls = function.embed_controls(settings, inputs)
        with clock.stage("encode_image", self.device) if settings.starts_from != "noise" else nullcontext():
            start = function.start(settings, inputs)
        with clock.stage("denoise", self.device):
            steps = Steps(self.device)

            def callback(denoiser: Denoiser, i: int, latents: Tensor) -> Tensor | None:
                replaced = after_step and after_step(denoiser, i, int(call.plan[i].t), latents)
                steps.mark()
                return replaced

            latents = function.denoise(
                settings, embeddings, controls, start, inputs, generator=call.generator, callback=callback
            )
        clock.add_steps(steps)
        if settings.output_type == "latent":
            return hand_out(latents, caller)
        with clock.stage("decode", self.device):
            sample = function.decode(latents)
        with clock.stage("convert", self.device):
            pixels = to_pixels(sample, settings.output_type)
            if settings.output_type == "pt":
                return hand_out(pixels, caller)
            return self._images(self._to_host(pixels), settings.output_type)

    def _inputs(self, call: Call) -> dict[str, Tensor]:
        """The image function's inputs on the device, without the prompts and the noise of later steps."""
        where = {"device": self.device, "dtype": self.dtype}
        encoder = self.stages and self.stages.image_encoder
        return {
            **{name: image.to(self.device) for name, image in call.images.items() if name in START_IMAGES},
            **{name: image.to(**where) for name, image in call.images.items() if name not in START_IMAGES},
            **draw(call, encoder, latents_shape(self.manifest, call.request), **where),
            **self.function.make_constants(call),
            **self.function.lora_inputs(call.slot),
        }

    def _to_host(self, pixels: Tensor) -> Tensor:
        return pixels if self._turns is None else self._turns.to_host(pixels)

    def _images(self, pixels: Tensor, output_type: str) -> Any:
        """Images of the caller's own: with turns ``pixels`` are memory that the next one overwrites."""
        images = to_images(pixels, output_type)
        return images.copy() if output_type == "np" and self._turns is not None else images


def make_runner(
    manifest: Manifest,
    engines: Mapping[str, Engine],
    tokenizers: Mapping[str, ClipTokenizer],
    sampler: Sampler,
    capture: Capture | None,
    vae_tile: int | None,
) -> Runner:
    """A runner of all components.

    With ``capture``, and if every engine after the text encoders can be recorded, the whole image is a CUDA graph;
    called stage by stage, every component is one. Staged engines are not recorded; calls take turns on them, lest one
    releases what another is about to run.
    """
    unet = engines["unet"]
    plain_unet = without_residuals(unet)
    is_graphed = capture is not None and all(e.capturable for name, e in engines.items() if name not in tokenizers)

    def graphed(engine: Engine) -> Engine:
        return GraphedEngine(engine, capture) if is_graphed and engine.capturable else engine

    each = {name: graphed(engine) for name, engine in engines.items()}
    text = TextConditioner(tokenizers, each)
    stages = ImageFunction(manifest, each, plain_unet and graphed(plain_unet), text, sampler, vae_tile)
    whole = ImageFunction(manifest, engines, plain_unet, text, sampler, vae_tile)
    return Runner(
        manifest,
        stages,
        text=text,
        stages=stages,
        whole=GraphedFunction(whole.generate, capture, KEPT_GRAPHS) if is_graphed else None,
        device=unet.device,
        dtype=TORCH_DTYPES[unet.inputs["sample"].dtype],
        has_turns=is_graphed or unet.device.type == "cuda" or isinstance(engines, StagedEngines),
        release=engines.release if isinstance(engines, StagedEngines) else None,
        padded_up_to=manifest.shapes.batch.max if is_graphed else 0,
    )


def make_one_graph_runner(
    manifest: Manifest, name: str, engine: Engine, tokenizers: Mapping[str, ClipTokenizer]
) -> Runner:
    """A runner of a one-graph."""
    function = OneGraphFunction(manifest, name, engine)
    return Runner(
        manifest,
        function,
        text=TextConditioner(tokenizers, {}),  # the text encoders are in the graph
        stages=None,
        whole=function.generate,
        device=engine.device,
        dtype=function.dtype,
        has_turns=engine.device.type == "cuda",
    )
