"""Prompt to image."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engines import Bundle, Engine, Manifest
from ..engines.cuda.capture import Capture, capture_cuda_graph
from ..engines.cuda.device import out_of_memory_in_words
from ..engines.cuda.graphs import GraphedFunction
from ..engines.cuda.turns import hand_out
from ..engines.hub_bundles import find_bundle
from ..engines.load import Choice, choose, choose_one_graph, load_choice
from ..engines.progress import Progress
from ..engines.staged_engines import StagedEngines
from ..errors import BundleError, RequestError
from ..samplers import make_sampler
from ..samplers.noise import Generators, make_generators, random_seed
from .adapter import Adapter
from .adapters import Adapters, ChosenAdapter, PackedSlot
from .buckets import buckets
from .call import Call
from .clock import Clock
from .controls import PerControlNet, images_by_name, make_conditions
from .denoiser import Denoiser
from .image_function import CONDITION
from .init_images import crop_images, make_init_images
from .one_graph_function import fixed_params
from .params import Params, decide
from .request import GenerationSettings, Request, has_zeroed_negatives, make_plan, make_settings
from .runner import AfterStep, make_one_graph_runner, make_runner
from .stream import Stream
from .text import ClipTokenizer, TextEmbeddings, TokenizedTexts, load_tokenizers
from .tiling import check_tile

StepCallback = Callable[["Pipeline", int, int, dict[str, Tensor]], "dict[str, Tensor] | None"]
CALLBACK_TENSORS = ("latents", "prompt_embeds")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineOutput:
    """The result of a call.

    Attributes:
        images: a list of ``PIL.Image``, an array or a tensor, as ``output_type`` asked.
        timings: seconds by stage: ``tokenize``, ``encode``, ``denoise``, ``decode``, ``convert``;
            where there are images given, ``prepare``, which fits them, and ``encode_image``, the VAE's encoder; and
            ``total``. ``step_1`` and so on are the parts of
            ``denoise``, callbacks included. On a GPU with CUDA graphs the GPU's work is one stage, ``generate``, which
            ends when the image is on the host; for ``"pt"`` and ``"latent"`` it ends when the work is enqueued.
        request: the call's arguments, with the manifest's defaults.
        seed: the seed of the noise, also if the call left it open; None if the caller brought generators.
    """

    images: Any
    timings: dict[str, float]
    request: Request
    seed: int | tuple[int, ...] | None


class Pipeline:
    """A bundle that is ready to generate images.

    Several threads may call one pipeline. On the CPU their calls run side by side: they share no state but the engines,
    which keep buffers per thread; with ``low_memory`` they take turns. On a GPU they take turns on a stream of the
    pipeline's own, which starts after the work of the caller's current stream, and which that stream waits for. If the
    engines can be recorded there, the whole image is a CUDA graph (see :class:`..engines.cuda.graphs.GraphedFunction`)
    for each of the last few kinds of call, from the third call of a kind on; calls with a callback run step by step,
    with a graph for every network. The text encoders are graphs of their own: they do not run for prompts that were
    seen lately. What cannot be recorded after all runs without a graph, and a
    :class:`..engines.cuda.graphs.GraphWarning` says so once.
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
        self.tokenizers = tokenizers
        self.one_graph = one_graph
        self.choice: Choice | None = None  # of ``load``
        self._bundle_shapes = manifest.shapes  # engines may take a part of them
        self.sampler = make_sampler(manifest.sampler.kind, **manifest.scheduler)
        if one_graph is None:
            self._runner = make_runner(manifest, engines, tokenizers, self.sampler, capture, vae_tile)
        else:
            engine = engines[one_graph]
            self._runner = make_one_graph_runner(manifest, one_graph, engine, tokenizers)
        self.device, self.dtype = self._runner.device, self._runner.dtype
        slots = manifest.lora_slot.components if manifest.lora_slot else []
        with self._turn("making the LoRA slot"):
            self._adapters = Adapters(manifest, {name: engines[one_graph or name].device for name in slots})

    @property
    def _engines_name(self) -> str:
        return (self.choice and self.choice.target) or ""

    @classmethod
    def load(
        cls,
        bundle: Bundle | str | Path,
        backend: str = "auto",
        device: str = "auto",
        target: str | None = None,
        progress: Progress | None = None,
        cuda_graphs: bool = True,
        precision: str | None = None,
        vae_tile: int | None = None,
        one_graph: str | None = None,
        low_memory: bool = False,
    ) -> Pipeline:
        """Load a bundle.

        Args:
            bundle: the folder that ``hypersd export`` wrote, or ``owner/name`` of a bundle on the Hub (with a revision:
                ``owner/name@revision``), or a loaded bundle.
            backend: ``"tensorrt"``, ``"tensorrt-rtx"``, ``"onnxruntime"`` or ``"openvino"``; ``"auto"`` takes TensorRT
                engines of the bundle that can run here, else, for a bundle in half precision on a CPU, OpenVINO if it
                is installed, else ONNX Runtime; :attr:`choice` says which and why.
            device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
            target: which of the bundle's TensorRT engines, by the name that ``hypersd info`` shows or a part of it.
            progress: reports long work; TensorRT-RTX compiles its kernels at the first load on a machine.
            cuda_graphs: record the GPU's work and replay it; False enqueues every kernel again at every call.
            precision: the format in which OpenVINO computes, ``"fp32"`` or ``"bf16"``; by default ``"bf16"`` where the
                processor multiplies in it. The other backends compute in the bundle's precision.
            vae_tile: decode images in tiles with sides of so many pixels, which overlap by a quarter and are blended
                as diffusers' ``vae.enable_tiling()`` does it: less memory, more time, and seams that a smooth surface
                may show. For bundles that take a range of sizes.
            one_graph: run the bundle's one-graph of that name instead of its components; its settings are fixed.
            low_memory: load each component when a call needs it, and release it after its stage, so that memory holds
                the text encoders, or the VAE's encoder, or the UNet with the ControlNets that act, or the VAE's
                decoder. The images are the same; every call loads what it runs, calls take turns, and no CUDA graphs
                are recorded. The images of one call share its loads, and known prompts load no text encoder.

        Raises:
            BundleError: the bundle is missing, damaged, altered or of another version.
            DownloadError: the bundle cannot be fetched from the Hub.
            EngineError: the backend or device cannot be used here.
            RequestError: ``vae_tile`` is none that the decoder takes, or ``one_graph`` excludes another option.
        """
        downloads = None if progress is None else progress.downloads
        opened = bundle if isinstance(bundle, Bundle) else Bundle.load(find_bundle(bundle, downloads))
        tokenizers = load_tokenizers(opened)
        for name in (*tokenizers, "unet", "vae_decoder"):
            opened.component(name)
        if one_graph is None:
            choice = choose(opened, backend, device, target, precision, low_memory)
        elif target is not None or precision is not None or vae_tile is not None:
            raise RequestError("a one-graph has no target, precision or vae_tile: leave them or one_graph out")
        elif low_memory:
            raise RequestError("a one-graph holds all components at once: leave low_memory or one_graph out")
        else:
            choice = choose_one_graph(opened, one_graph, backend, device)
        if vae_tile is not None:
            latent_sample = choice.manifest.components["vae_decoder"].inputs["latent_sample"]
            vae_tile = check_tile(latent_sample, vae_tile, choice.manifest.vae.spatial)
        engines = load_choice(opened, choice, device, progress, one_graph, low_memory)
        try:
            capture = capture_cuda_graph if cuda_graphs else None
            pipe = cls(choice.manifest, engines, tokenizers, capture=capture, vae_tile=vae_tile, one_graph=one_graph)
        except RequestError as error:  # the manifest's scheduler is none
            raise BundleError(f"{opened.root}: {error}; export the bundle again") from error
        pipe.choice, pipe._bundle_shapes = choice, opened.manifest.shapes
        return pipe

    @property
    def is_low_memory(self) -> bool:
        """Whether every call loads the components that it runs, one stage at a time."""
        return isinstance(self.engines, StagedEngines)

    @property
    def is_graphed(self) -> bool:
        """Whether calls without a callback may run as one CUDA graph for the whole image."""
        return isinstance(self._runner.whole, GraphedFunction)

    def graph_batches(self, most: int) -> list[int]:
        """The batches at which calls of 1 to ``most`` images run as CUDA graphs; empty where they do not.

        A batch of 3 runs as one of 4, for example, and shares its graph: each of these is worth a warm-up.
        """
        return buckets(most, self._runner.padded_up_to) if self.is_graphed else []

    @property
    def recorded_graphs(self) -> list[bool]:
        """For each of the last kinds of call, whether a CUDA graph of its whole image was recorded."""
        whole = self._runner.whole
        return whole.recorded if isinstance(whole, GraphedFunction) else []

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
        image: Any = None,
        mask_image: Any = None,
        strength: float | None = None,
        keep_steps: bool = False,
        padding_mask_crop: int | None = None,
        mask_blur: int = 0,
        resize_mode: str = "crop",
        adapters: Mapping[str, float] | None = None,
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
            image=image,
            mask_image=mask_image,
            strength=strength,
            keep_steps=keep_steps,
            padding_mask_crop=padding_mask_crop,
            mask_blur=mask_blur,
            resize_mode=resize_mode,
            adapters=adapters,
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
        request, clock = self.decide(params), Clock()
        generator, used_seed = _random_numbers(request, params.generator)
        plan = make_plan(self.sampler, request)
        settings = make_settings(self.manifest, request, plan, params.output_type)
        with clock.stage("tokenize"):
            slot = self._pack(request.adapters)
            tokenized = self._tokenize(request, slot)
        images, crop = {}, None
        if params.control_image is not None or request.starts_from != "noise":
            with clock.stage("prepare"):
                params, crop = crop_images(params, request)
                images = {**self._conditions(params, request, settings), **make_init_images(params, request)}
        after_step = None
        if callback_on_step_end is not None:
            after_step = self._after_step(callback_on_step_end, callback_on_step_end_tensor_inputs)
        call = Call(request, plan, settings, tokenized, images, generator, params.latents, slot, clock)
        generated = self._runner.run(call, after_step)
        if crop is not None:
            generated = [crop.paste(image) for image in generated]
        return PipelineOutput(images=generated, timings=clock.timings(), request=request, seed=used_seed)

    def stream(
        self,
        frames: Iterable[Any],
        prompt: str,
        *,
        control: str | Sequence[str] = (),
        skip_similar: float | None = None,
        look_ahead: int = 1,
        **params: Any,
    ) -> Stream:
        """Iterate over images, one for each frame of a video or a camera: see :class:`.stream.Stream`.

        Raises:
            RequestError: a param is out of range.
        """
        given = Params(prompt=prompt, **params)
        return Stream(self, frames, given, control=control, skip_similar=skip_similar, look_ahead=look_ahead)

    @property
    def adapters(self) -> list[Adapter]:
        """The loaded LoRAs."""
        return list(self._adapters)

    def load_lora_weights(self, path: str | Path, adapter_name: str | None = None, strict: bool = False) -> Adapter:
        """Load a LoRA file, which calls then take by name: ``pipe(prompt, adapters={"style": 0.8})``.

        Layers without a place in the bundle's LoRA slot (convolutions, or the text encoders', as the export decided)
        are left out, and a rank above the slot's is reduced to it; an :class:`.adapter.AdapterWarning` says so.

        Args:
            path: a ``.safetensors`` file in any layout that ``hypersd export --add-lora`` takes, except DoRA.
            adapter_name: by default the file's name without its ending.
            strict: raise an error instead of leaving anything out.

        Raises:
            RequestError: the bundle has no LoRA slot, or the name is taken.
            WeightsError: the file is damaged, or does not fit the bundle.
        """
        return self._adapters.load(path, adapter_name, strict)

    def add_adapter(self, adapter: Adapter) -> None:
        """Take in a LoRA that :func:`.adapter.load_adapter` or another pipeline of the bundle has loaded.

        It takes the place of another of its name; calls that run keep theirs.
        """
        self._adapters.add(adapter)

    def unload_lora_weights(self, adapter_name: str | None = None) -> None:
        """Forget a loaded LoRA, or all of them; calls that run keep theirs.

        Raises:
            RequestError: there is none of that name.
        """
        self._adapters.unload(adapter_name)

    def decide(self, params: Params) -> Request:
        """Check ``params``, and make every decision that :meth:`generate` would make, without generating.

        Raises:
            RequestError: an argument is out of range.
        """
        if self.one_graph is not None:
            params = fixed_params(self.manifest, self.one_graph, params)
        request = decide(self.manifest, params, self._bundle_shapes, self._engines_name)
        return dataclasses.replace(request, adapters=self._adapters.resolve(request.adapters))

    def encode_prompt(self, prompts: Sequence[str]) -> TextEmbeddings:
        """The text encoders' outputs for some prompts, one row each; those of recent prompts are cached."""
        self._runner.by_stages()
        tokenized = self._runner.text.tokenize(prompts, self._adapters.pack(()))
        with self._turn("encoding prompts") as caller:
            return self._runner.text.encode(tokenized).map(lambda tensor: hand_out(tensor.clone(), caller))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, 4, h, w] to images [B, 3, H, W] in -1..1, a tensor of the caller's own."""
        stages = self._runner.by_stages()
        with self._turn("decoding latents") as caller:
            return hand_out(stages.decode(latents).clone(), caller)  # the next turn may be another thread's

    @contextmanager
    def _turn(self, doing: str) -> Iterator[torch.cuda.Stream | None]:
        """A turn of the runner's, with words for the case that memory is exhausted inside."""
        with out_of_memory_in_words(doing), self._runner.turn() as caller:
            yield caller

    def _pack(self, adapters: Sequence[ChosenAdapter]) -> PackedSlot:
        """The LoRA slot's tensors, made on the stream that reads them: other threads' calls find them cached.

        Else a call could read them before the copy to the device is done, or after their memory is another tensor's.
        """
        if not adapters:
            return self._adapters.pack(())
        with self._turn("filling the LoRA slot"):
            return self._adapters.pack(adapters)

    def _tokenize(self, request: Request, slot: PackedSlot) -> TokenizedTexts:
        """The negative prompts, if the text encoders have to see them, then the prompts."""
        negatives: tuple[str, ...] = ()
        if request.is_guided and not has_zeroed_negatives(self.manifest, request):
            negatives = request.negative_prompts or ("",) * len(request.prompts)
        return self._runner.text.tokenize([*negatives, *request.prompts], slot)

    def _conditions(self, params: Params, request: Request, settings: GenerationSettings) -> dict[str, Tensor]:
        """The control images of the ControlNets that act, by the image function's input."""
        if params.control_image is None:
            return {}
        images = images_by_name(self.manifest, params.control_image)
        size = request.width, request.height
        conditions = make_conditions(images, *size, params.resize_mode, len(request.prompts))
        return {f"{CONDITION}{name}": conditions[name] for name in settings.controlnets}

    def _after_step(self, callback: StepCallback, names: Sequence[str]) -> AfterStep:
        """The caller's callback in the form that the runner calls."""

        def call(denoiser: Denoiser, i: int, t: int, latents: Tensor) -> Tensor | None:
            tensors = {"latents": latents, "prompt_embeds": denoiser.feeds["encoder_hidden_states"]}
            if i == 0 and "prompt_embeds" in names:  # the callback may change it in place, and the next call knows it
                tensors["prompt_embeds"] = denoiser.feeds["encoder_hidden_states"] = tensors["prompt_embeds"].clone()
            replaced = callback(self, i, t, {name: tensors[name] for name in names}) or {}
            if "prompt_embeds" in replaced:
                denoiser.feeds["encoder_hidden_states"] = replaced["prompt_embeds"].to(self.device).contiguous()
            return replaced["latents"].to(self.device) if "latents" in replaced else None

        return call


def _random_numbers(request: Request, generator: Generators) -> tuple[Generators, int | tuple[int, ...] | None]:
    """The noise's generators, and the seeds of those made here."""
    if generator is not None:
        return generator, None
    seeds = request.seeds or (random_seed(),)
    return make_generators(seeds), (seeds[0] if len(seeds) == 1 else seeds)


def _check_callback_tensors(names: Sequence[str]) -> None:
    if unknown := sorted(set(names) - set(CALLBACK_TENSORS)):
        raise RequestError(
            f"callback_on_step_end_tensor_inputs {', '.join(unknown)}: expected some of {', '.join(CALLBACK_TENSORS)}"
        )
