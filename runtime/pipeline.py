"""Prompt to image."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engines import Bundle, Engine, Manifest
from ..engines.cuda.graphed_engine import GraphedEngine
from ..engines.cuda.graphs import Capture, GraphedFunction, capture_cuda_graph
from ..engines.cuda.turns import Turns, hand_out
from ..engines.engine import TORCH_DTYPES
from ..engines.load import Choice, choose, choose_one_graph, load_choice
from ..engines.progress import BuildProgress
from ..errors import BundleError, EngineError, RequestError, one_line
from ..samplers import Sampler, make_sampler
from ..samplers.noise import Generators, make_generators, randn, random_seed
from .clock import Clock, Steps
from .controlled_unet import with_plain_unet
from .controls import PerControlNet, images_by_name, make_conditions
from .image_function import CONDITION, Denoiser, ImageSettings, Painter
from .one_graph_function import OneGraphFunction, fixed_params
from .params import Params, decide
from .pixels import to_images, to_pixels
from .request import Request
from .text import ClipTokenizer, TextConditioner, TextEmbeddings, TokenizedTexts, load_tokenizers
from .tiling import check_tile

ImageOfTensors = Callable[[ImageSettings, Mapping[str, Tensor]], Mapping[str, Tensor]]
StepCallback = Callable[["Pipeline", int, int, dict[str, Tensor]], "dict[str, Tensor] | None"]
CALLBACK_TENSORS = ("latents", "prompt_embeds")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineOutput:
    """What a call returns.

    Attributes:
        images: a list of ``PIL.Image``, an array or a tensor, as ``output_type`` asked.
        timings: seconds by stage: ``tokenize``, ``encode``, ``denoise``, ``decode``, ``convert``, and ``control``, the
            fitting of control images if there are any; and ``total``. ``step_1`` and so on are what ``denoise`` is
            made of, callbacks included. On a GPU with CUDA graphs all that the GPU does
            is one stage, ``generate``, which ends when the image is on the host; for ``"pt"`` and ``"latent"`` nobody
            waits for that, and it ends when the work is enqueued.
        request: what was generated: the call's arguments, the manifest's where they were left out.
        seed: the seed of the noise, also if the call left it open; None if the caller brought generators.
    """

    images: Any
    timings: dict[str, float]
    request: Request
    seed: int | tuple[int, ...] | None


class Pipeline:
    """A bundle that is ready to generate images.

    Several threads may call one pipeline. On the CPU their calls run side by side: they share no state but the engines,
    which keep buffers per thread. On a GPU they take turns on a stream of the pipeline's own, which starts after the
    work of the caller's current stream, and which that stream waits for. If the engines can be recorded there, the
    whole image is a CUDA graph (see :class:`..engines.cuda_graphs.GraphedFunction`) for each of the last few kinds of
    call, from the third call of a kind on; calls with a callback run step by step, with a graph for every network. The
    text encoders are graphs of their own: they do not run for prompts that were seen lately. What cannot be recorded
    after all runs without a graph, and a :class:`..engines.cuda_graphs.GraphWarning` says so once.
    """

    def __init__(
        self,
        manifest: Manifest,
        engines: Mapping[str, Engine],
        tokenizers: Mapping[str, ClipTokenizer],
        *,
        capture: Capture | None = capture_cuda_graph,
        vae_tile: int | None = None,
        one_graph: str | None = None,
    ) -> None:
        """Put a pipeline together; ``capture`` records its work, None for never. The rest is as for :meth:`load`."""
        self.manifest = manifest
        self.engines = engines
        self.choice: Choice | None = None  # what ``load`` decided on
        self._bundle_shapes = manifest.shapes  # of which engines may take a part
        self.sampler: Sampler = make_sampler(manifest.sampler.kind, **manifest.scheduler)
        self.one_graph = one_graph
        self._painter: Painter | OneGraphFunction
        self._graphed = None
        if one_graph is not None:
            self._painter = OneGraphFunction(manifest, one_graph, engines[one_graph], self.sampler)
            self.device, self.dtype = engines[one_graph].device, self._painter.dtype
            self.text = TextConditioner(tokenizers, {})  # the text encoders are in the graph
            self._turns = Turns(self.device) if self.device.type == "cuda" else None
            return
        self.unet = engines["unet"]
        self.vae_decoder = engines["vae_decoder"]
        self.device = self.unet.device
        self.dtype = TORCH_DTYPES[self.unet.inputs["sample"].dtype]
        engines = with_plain_unet(engines)
        drawing = [engine for name, engine in engines.items() if name not in tokenizers]
        is_graphed = capture is not None and all(engine.capturable for engine in drawing)
        if is_graphed:  # all that draws as one graph; called stage by stage, every network is one
            self._graphed = GraphedFunction(Painter(manifest, engines, self.sampler, vae_tile).paint, capture)
            engines = {
                name: GraphedEngine(engine, capture) if engine.capturable else engine
                for name, engine in engines.items()
            }
        self.text = TextConditioner(tokenizers, engines)
        self._painter = Painter(manifest, engines, self.sampler, vae_tile)
        self._turns = Turns(self.device) if is_graphed or self.device.type == "cuda" else None

    @property
    def _engines_name(self) -> str:
        return (self.choice and self.choice.target) or ""

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        backend: str = "auto",
        device: str = "auto",
        target: str | None = None,
        progress: BuildProgress | None = None,
        cuda_graphs: bool = True,
        precision: str | None = None,
        vae_tile: int | None = None,
        one_graph: str | None = None,
    ) -> Pipeline:
        """Load a bundle.

        Args:
            bundle: the folder that ``hypersd export`` wrote.
            backend: ``"tensorrt"``, ``"tensorrt-rtx"``, ``"onnxruntime"`` or ``"openvino"``; ``"auto"`` takes TensorRT
                engines of the bundle that can run here, else ONNX Runtime, and :attr:`choice` says what and why;
                ``"null"`` computes nothing, to measure the loop itself.
            device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
            target: which of the bundle's TensorRT engines, by the name that ``hypersd info`` shows or a part of it.
            progress: told of what takes long; TensorRT-RTX compiles its kernels at the first load on a machine.
            cuda_graphs: record what the GPU does and replay it; False enqueues every kernel anew at every call.
            precision: what OpenVINO computes in, ``"fp32"`` or ``"bf16"``; by default ``"bf16"`` where the processor
                multiplies in it. The other backends compute in what the bundle was exported in.
            vae_tile: decode images in tiles with sides of so many pixels, which overlap by a quarter and are blended
                as diffusers' ``vae.enable_tiling()`` does it: less memory, more time, and seams that a smooth surface
                may show. For bundles that take a range of sizes.
            one_graph: run the bundle's one-graph of that name instead of its components; its settings are fixed.

        Raises:
            BundleError: the bundle is missing, damaged, altered or of another version.
            EngineError: the backend or device cannot be used here.
            RequestError: ``vae_tile`` is none that the decoder takes.
        """
        opened = Bundle.load(bundle)
        tokenizers = load_tokenizers(opened)
        for name in ("text_encoder", "unet", "vae_decoder"):
            opened.component(name)
        if one_graph is None:
            choice = choose(opened, backend, device, target, precision)
        elif target is not None or precision is not None or vae_tile is not None:
            raise RequestError("a one-graph has no target, precision or vae_tile: leave them or one_graph out")
        else:
            choice = choose_one_graph(opened, one_graph, backend, device)
        if vae_tile is not None:
            latent_sample = choice.manifest.components["vae_decoder"].inputs["latent_sample"]
            vae_tile = check_tile(latent_sample, vae_tile, choice.manifest.vae.spatial)
        engines = load_choice(opened, choice, device, progress, one_graph)
        try:
            capture = capture_cuda_graph if cuda_graphs else None
            pipe = cls(choice.manifest, engines, tokenizers, capture=capture, vae_tile=vae_tile, one_graph=one_graph)
        except RequestError as error:  # the manifest's scheduler is none
            raise BundleError(f"{opened.root}: {error}; export the bundle again") from error
        pipe.choice, pipe._bundle_shapes = choice, opened.manifest.shapes
        return pipe

    @property
    def is_graphed(self) -> bool:
        """Whether calls without a callback may run as one CUDA graph for the whole image."""
        return self._graphed is not None

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        eta: float | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        control_image: Any = None,
        controlnet_conditioning_scale: PerControlNet = None,
        control_guidance_start: PerControlNet = None,
        control_guidance_end: PerControlNet = None,
        resize_mode: str = "crop",
        force: bool = False,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> PipelineOutput:
        """Generate images: :meth:`generate` with its params as keywords, which have diffusers' names and meaning.

        See :class:`.params.Params` for each of them.
        """
        params = Params(
            prompt=prompt,
            negative_prompt=negative_prompt,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            eta=eta,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            num_images_per_prompt=num_images_per_prompt,
            seed=seed,
            generator=generator,
            latents=latents,
            output_type=output_type,
            control_image=control_image,
            controlnet_conditioning_scale=controlnet_conditioning_scale,
            control_guidance_start=control_guidance_start,
            control_guidance_end=control_guidance_end,
            resize_mode=resize_mode,
            force=force,
        )
        return self.generate(params, callback_on_step_end, callback_on_step_end_tensor_inputs)

    @torch.no_grad()
    def generate(
        self,
        params: Params,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> PipelineOutput:
        """Generate the images that ``params`` ask for.

        Args:
            params: the arguments; the manifest decides on those that are None.
            callback_on_step_end: called as ``callback(pipe, step_index, timestep, tensors)`` after every step; tensors
                in the dict that it returns replace the loop's.
            callback_on_step_end_tensor_inputs: the tensors that it gets, of ``latents`` and ``prompt_embeds``.

        Raises:
            RequestError: an argument is out of range.
            EngineError: an engine failed, or the device's memory is not enough.
        """
        _check_callback_tensors(callback_on_step_end_tensor_inputs)
        request = self.decide(params)
        generator, used_seed = _random_numbers(request, params.generator)
        settings = self._painter.settings(request, params.output_type)
        clock = Clock()
        with clock.stage("tokenize"):
            tokenized = self._tokenize(request, settings)
        conditions: dict[str, Tensor] = {}
        if params.control_image is not None:
            with clock.stage("control"):
                images = images_by_name(self.manifest, params.control_image)
                size = request.width, request.height
                conditions = make_conditions(images, *size, params.resize_mode, len(request.prompts))
        with _out_of_memory_in_words(request), self._turn() as caller:
            call = _Call(request, settings, tokenized, conditions, generator, params.latents)
            whole = self._painter.paint if isinstance(self._painter, OneGraphFunction) else self._graphed
            if whole is not None and callback_on_step_end is None:
                drawn = self._draw_graphed(whole, call, clock, caller)
            else:
                callback = None
                if callback_on_step_end is not None:
                    callback = self._step_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
                drawn = self._draw_by_stages(call, clock, callback, caller)
        return PipelineOutput(images=drawn, timings=clock.timings(), request=request, seed=used_seed)

    def decide(self, params: Params) -> Request:
        """Check ``params``, and make every decision that :meth:`generate` would make, without generating.

        Raises:
            RequestError: an argument is out of range.
        """
        if self.one_graph is not None:
            params = fixed_params(self.manifest, self.one_graph, params)
        return decide(self.manifest, params, self._bundle_shapes, self._engines_name)

    def encode_prompt(self, prompts: Sequence[str]) -> TextEmbeddings:
        """The text encoders' outputs for some prompts, one row each; those of prompts seen lately are kept."""
        self._by_stages()
        tokenized = self.text.tokenize(prompts)
        with self._turn() as caller:
            return self.text.encode(tokenized).map(lambda tensor: hand_out(tensor.clone(), caller))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, 4, h, w] to images [B, 3, H, W] in -1..1, a tensor of the caller's own."""
        with self._turn() as caller:
            return hand_out(self._by_stages().decode(latents).clone(), caller)  # the next turn may be another thread's

    def _by_stages(self) -> Painter:
        """The image function of all components, which runs stage by stage."""
        if isinstance(self._painter, OneGraphFunction):
            raise RequestError(f"{self.one_graph} has no stages of its own: load the bundle without one_graph")
        return self._painter

    def _turn(self) -> AbstractContextManager[torch.cuda.Stream | None]:
        return nullcontext() if self._turns is None else self._turns.turn()

    def _draw_graphed(
        self, graphed: GraphedFunction | ImageOfTensors, call: _Call, clock: Clock, caller: torch.cuda.Stream | None
    ) -> Any:
        """All at once; the random numbers are drawn here, in the same order as step by step."""
        with clock.stage("generate"):
            inputs = {**self._inputs(call), **self._text_inputs(call)}
            inputs |= self._painter.draw_noise(call.settings, inputs["latents"], call.generator)
            output = graphed(call.settings, inputs)["output"]
            if call.settings.output_type in ("pt", "latent"):
                return hand_out(output.clone(), caller)  # the graph's own memory stays here
            pixels = self._to_host(output)
        with clock.stage("convert"):
            return self._images(pixels, call.settings.output_type)

    def _draw_by_stages(
        self,
        call: _Call,
        clock: Clock,
        callback: Callable[[Denoiser, int, int, Tensor], Tensor | None] | None,
        caller: torch.cuda.Stream | None,
    ) -> Any:
        """Stage by stage; on a GPU each is waited for, so that its time is its own."""
        settings = call.settings
        with clock.stage("encode", self.device):
            inputs = self._inputs(call)
            embeddings = self._embeddings(call)
            controls = self._by_stages().embed_controls(settings, inputs)
        with clock.stage("denoise", self.device):
            steps = Steps(self.device)

            def after_step(denoiser: Denoiser, i: int, t: int, latents: Tensor) -> Tensor | None:
                replaced = callback and callback(denoiser, i, t, latents)
                steps.mark()
                return replaced

            latents = self._by_stages().denoise(
                settings, embeddings, controls, inputs, generator=call.generator, callback=after_step
            )
        clock.add_steps(steps)
        if settings.output_type == "latent":
            return hand_out(latents, caller)
        with clock.stage("decode", self.device):
            sample = self._by_stages().decode(latents)
        with clock.stage("convert", self.device):
            pixels = to_pixels(sample, settings.output_type)
            if settings.output_type == "pt":
                return hand_out(pixels, caller)
            return self._images(self._to_host(pixels), settings.output_type)

    def _to_host(self, pixels: Tensor) -> Tensor:
        return pixels if self._turns is None else self._turns.to_host(pixels)

    def _images(self, pixels: Tensor, output_type: str) -> Any:
        """Images of the caller's own: with turns ``pixels`` are memory that the next one overwrites."""
        images = to_images(pixels, output_type)
        return images.copy() if output_type == "np" and self._turns is not None else images

    def _inputs(self, call: _Call) -> dict[str, Tensor]:
        """The painter's inputs, prompts and noise apart, on the device."""
        return {
            **{f"{CONDITION}{name}": self._condition(call, name) for name in call.settings.controlnets},
            "latents": self._latents(call.request, call.generator, call.latents),
            **self._painter.make_constants(call.request, call.settings),
        }

    def _condition(self, call: _Call, name: str) -> Tensor:
        return call.conditions[name].to(self.device, self.dtype)

    def _text_inputs(self, call: _Call) -> Mapping[str, Tensor]:
        if isinstance(self._painter, OneGraphFunction):
            return self._painter.text_inputs(call.settings, call.tokenized)
        return self._embeddings(call).named()

    def _embeddings(self, call: _Call) -> TextEmbeddings:
        return self._by_stages().arrange(call.settings, self.text.encode(call.tokenized))

    def _tokenize(self, request: Request, settings: ImageSettings) -> TokenizedTexts:
        """The negative prompts, if the text encoders have to see them, then the prompts."""
        negatives: tuple[str, ...] = ()
        if settings.is_guided and not settings.zeroed_negatives:
            negatives = request.negative_prompts or ("",) * len(request.prompts)
        return self.text.tokenize([*negatives, *request.prompts])

    def _latents(self, request: Request, generator: Generators, latents: Tensor | None) -> Tensor:
        scale = self.manifest.vae.spatial
        shape = (request.batch, self.manifest.vae.latent_channels, request.height // scale, request.width // scale)
        if latents is None:
            return randn(shape, generator=generator, device=self.device, dtype=self.dtype)
        if not isinstance(latents, Tensor) or tuple(latents.shape) != shape:
            received = list(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
            raise RequestError(f"latents: expected a tensor of the shape {list(shape)}, got {received}")
        return latents.to(self.device, self.dtype)

    def _step_callback(
        self, callback: StepCallback, names: Sequence[str]
    ) -> Callable[[Denoiser, int, int, Tensor], Tensor | None]:
        """The user's callback in the form that the painter takes."""

        def call(denoiser: Denoiser, i: int, t: int, latents: Tensor) -> Tensor | None:
            tensors = {"latents": latents, "prompt_embeds": denoiser.feeds["encoder_hidden_states"]}
            if i == 0 and "prompt_embeds" in names:  # the callback may change it in place, and the next call knows it
                tensors["prompt_embeds"] = denoiser.feeds["encoder_hidden_states"] = tensors["prompt_embeds"].clone()
            replaced = callback(self, i, t, {name: tensors[name] for name in names}) or {}
            if "prompt_embeds" in replaced:
                denoiser.feeds["encoder_hidden_states"] = replaced["prompt_embeds"].to(self.device).contiguous()
            return replaced["latents"].to(self.device) if "latents" in replaced else None

        return call


@dataclasses.dataclass(frozen=True)
class _Call:
    """What one call draws from."""

    request: Request
    settings: ImageSettings
    tokenized: TokenizedTexts
    conditions: dict[str, Tensor]
    generator: Generators
    latents: Tensor | None


@contextmanager
def _out_of_memory_in_words(request: Request) -> Iterator[None]:
    """Where the device's memory is not enough: say for what, in torch's words, and what to do."""
    try:
        yield
    except RuntimeError as error:
        # Memory of the host that the device is to read, torch refuses with CUDA's error and not with its own.
        if not isinstance(error, torch.OutOfMemoryError) and "CUDA error: out of memory" not in str(error):
            raise
        what = f"{request.batch} of {request.width}x{request.height}"
        raise EngineError(
            f"out of device memory, generating {what} ({one_line(error)}): "
            "generate smaller images or fewer at a time, or free the device"
        ) from error


def _random_numbers(request: Request, generator: Generators) -> tuple[Generators, int | tuple[int, ...] | None]:
    """The generators to draw from, and the seeds of those that are made here."""
    if generator is not None:
        return generator, None
    seeds = request.seeds or (random_seed(),)
    return make_generators(seeds), (seeds[0] if len(seeds) == 1 else seeds)


def _check_callback_tensors(names: Sequence[str]) -> None:
    if unknown := sorted(set(names) - set(CALLBACK_TENSORS)):
        raise RequestError(
            f"callback_on_step_end_tensor_inputs {', '.join(unknown)}: expected some of {', '.join(CALLBACK_TENSORS)}"
        )
