"""Prompt to picture."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engines import Bundle, Engine, Manifest, load_engines
from ..engines.engine import TORCH_DTYPES
from ..errors import BundleError, RequestError
from .batching import run_rows
from .images import check_output_type, to_output
from .noise import Generators, randn
from .request import Request, make_request
from .samplers import Sampler, make_sampler
from .text import ENCODERS, ClipTokenizer, TextConditioner, TextEmbeddings

StepCallback = Callable[["Pipeline", int, int, dict[str, Tensor]], "dict[str, Tensor] | None"]
CALLBACK_TENSORS = ("latents", "prompt_embeds")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineOutput:
    """What a call returns.

    Attributes:
        images: a list of ``PIL.Image``, an array or a tensor, as ``output_type`` asked.
        timings: seconds by stage: ``tokenize``, ``encode``, ``denoise``, ``decode``, ``convert``; and ``total``.
        request: what was drawn: the call's arguments, the manifest's where they were left out.
        seed: the seed of the noise, also if the call left it open; None if the caller brought generators.
    """

    images: Any
    timings: dict[str, float]
    request: Request
    seed: int | tuple[int, ...] | None


class Pipeline:
    """A bundle that is ready to draw.

    Calls share no state but the engines, which keep buffers per thread: several threads may call one pipeline.
    """

    def __init__(
        self, manifest: Manifest, engines: Mapping[str, Engine], tokenizers: Mapping[str, ClipTokenizer]
    ) -> None:
        self.manifest = manifest
        self.engines = engines
        self.sampler: Sampler = make_sampler(manifest.sampler.kind, **manifest.scheduler)
        self.text = TextConditioner(tokenizers, engines)
        self.unet = engines["unet"]
        self.vae_decoder = engines["vae_decoder"]
        self.device = self.unet.device
        self.dtype = TORCH_DTYPES[self.unet.inputs["sample"].dtype]

    @classmethod
    def load(cls, bundle: str | Path, backend: str = "auto", device: str = "auto") -> Pipeline:
        """Load a bundle.

        Args:
            bundle: the folder that ``hypersd export`` wrote.
            backend: ``"auto"`` or ``"onnxruntime"``; ``"null"`` computes nothing, to measure the loop itself.
            device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.

        Raises:
            BundleError: the bundle is missing, damaged, altered or of another version.
            EngineError: the backend or device cannot be used here.
        """
        opened = Bundle.load(bundle)
        tokenizers = {}
        for name, encoder in ENCODERS.items():
            if encoder in opened.manifest.components:
                file = f"{name}/tokenizer.json"
                if file not in opened.manifest.files:
                    raise BundleError(f"{opened.root} has no {file}: export the bundle again")
                tokenizers[name] = ClipTokenizer(opened.path(file))
        for name in ("text_encoder", "unet", "vae_decoder"):
            opened.component(name)
        engines = load_engines(opened, backend, device)
        try:
            return cls(opened.manifest, engines, tokenizers)
        except RequestError as error:  # the manifest's scheduler is none
            raise BundleError(f"{opened.root}: {error}; export the bundle again") from error

    @torch.no_grad()
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
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        force: bool = False,
    ) -> PipelineOutput:
        """Draw pictures. Arguments have diffusers' names and meaning; what is left out comes from the manifest.

        Args:
            prompt: one, or a list for several pictures.
            negative_prompt: what to keep away from; without effect unless ``guidance_scale`` is above 1.
            num_inference_steps: number of steps, one of those that the checkpoint was distilled for.
            timesteps: custom timesteps instead, strictly descending.
            eta: 0..1, stochasticity (DDIM's eta, TCD's gamma).
            guidance_scale: classifier-free guidance; 1 or less means none, at half the cost.
            height: in pixels, inside the bundle's range.
            width: likewise.
            num_images_per_prompt: pictures for each prompt.
            seed: short for a CPU generator of that seed (the same pictures on every device); a list holds one for
                each picture, which then does not depend on its neighbours.
            generator: a ``torch.Generator``, or a list of one for each picture.
            latents: unit-variance noise [B, 4, height/8, width/8] to start from.
            output_type: ``"pil"``, ``"np"``, ``"pt"`` or ``"latent"``.
            callback_on_step_end: called as ``callback(pipe, step_index, timestep, tensors)`` after every step; tensors
                in the dict that it returns replace the loop's.
            callback_on_step_end_tensor_inputs: which tensors it gets, of ``latents`` and ``prompt_embeds``.
            force: allow numbers of steps that the checkpoint was not distilled for.

        Raises:
            RequestError: an argument is out of range.
        """
        check_output_type(output_type)
        _check_callback_tensors(callback_on_step_end_tensor_inputs)
        request = make_request(
            self.manifest,
            prompt,
            negative_prompt=negative_prompt,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            eta=eta,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            num_images_per_prompt=num_images_per_prompt,
            seed=seed,
            force=force,
        )
        generator, used_seed = _generator(request, generator)
        clock = _Clock()
        with clock.stage("tokenize"):
            tokens = self._tokenize(request)
        with clock.stage("encode"):
            embeddings = self._embeddings(request, tokens)
        with clock.stage("denoise"):
            latents = self._latents(request, generator, latents)
            denoiser = _Denoiser(self.unet, embeddings, request, self._time_ids(request))
            callback = None
            if callback_on_step_end is not None:
                callback = denoiser.step_callback(self, callback_on_step_end, callback_on_step_end_tensor_inputs)
            latents = self.sampler.sample(
                denoiser,
                latents,
                num_inference_steps=request.num_inference_steps,
                timesteps=request.timesteps,
                eta=request.eta,
                generator=generator,
                callback=callback,
            )
        images: Any = latents
        if output_type != "latent":
            with clock.stage("decode"):
                sample = self.decode(latents)
            with clock.stage("convert"):
                images = to_output(sample, output_type)
        return PipelineOutput(images=images, timings=clock.timings(), request=request, seed=used_seed)

    def encode_prompt(self, prompts: Sequence[str]) -> TextEmbeddings:
        """The text encoders' outputs for some prompts, one row each."""
        return self.text.encode(self.text.tokenize(prompts))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, 4, h, w] to pictures [B, 3, H, W] in -1..1; the tensor may be the decoder's own buffer."""
        dtype = TORCH_DTYPES[self.vae_decoder.inputs["latent_sample"].dtype]
        scaled = latents.to(dtype) / self.manifest.vae.scaling_factor  # a float32 decoder's division is float32 too
        return run_rows(self.vae_decoder, {"latent_sample": scaled.contiguous()})["sample"]

    def _tokenize(self, request: Request) -> dict[str, Tensor]:
        """Token ids of the negative prompts, if the text encoders have to see them, then of the prompts."""
        negatives: tuple[str, ...] = ()
        if request.is_guided and not self._zeroed_negatives(request):
            negatives = request.negative_prompts or ("",) * len(request.prompts)
        return self.text.tokenize([*negatives, *request.prompts])

    def _zeroed_negatives(self, request: Request) -> bool:
        """SDXL's base was trained with zeros, not with an empty text, where no negative prompt is given."""
        is_sdxl = self.manifest.family == "sdxl"
        return is_sdxl and self.manifest.force_zeros_for_empty_prompt and request.negative_prompts is None

    def _embeddings(self, request: Request, tokens: dict[str, Tensor]) -> TextEmbeddings:
        """One row a picture; with guidance first those of the negative prompts, as diffusers orders them."""
        encoded, count = self.text.encode(tokens), len(request.prompts)

        def repeat(rows: Tensor) -> Tensor:
            return rows.repeat_interleave(request.num_images_per_prompt, dim=0)

        positive = encoded.map(lambda rows: repeat(rows[-count:]))
        if not request.is_guided:
            return positive
        if self._zeroed_negatives(request):
            return positive.map(torch.zeros_like).cat(positive)
        return encoded.map(lambda rows: repeat(rows[:count])).cat(positive)

    def _latents(self, request: Request, generator: Generators, latents: Tensor | None) -> Tensor:
        scale = self.manifest.vae.spatial
        shape = (request.batch, self.manifest.vae.latent_channels, request.height // scale, request.width // scale)
        if latents is None:
            return randn(shape, generator=generator, device=self.device, dtype=self.dtype)
        if not isinstance(latents, Tensor) or tuple(latents.shape) != shape:
            received = list(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
            raise RequestError(f"latents: expected a tensor of the shape {list(shape)}, got {received}")
        return latents.to(self.device, self.dtype)

    def _time_ids(self, request: Request) -> Tensor | None:
        """SDXL's size conditioning [B, 6]: original size, crop corner and target size (Podell et al., section 2.2)."""
        if "time_ids" not in self.unet.inputs:
            return None
        row = [request.height, request.width, 0, 0, request.height, request.width]
        return torch.tensor([row], dtype=self.dtype, device=self.device)


class _Denoiser:
    """The UNet under one call's conditioning, with classifier-free guidance if the call asks for it."""

    def __init__(self, unet: Engine, embeddings: TextEmbeddings, request: Request, time_ids: Tensor | None) -> None:
        self.unet = unet
        self.guidance_scale = request.guidance_scale
        self.is_guided = request.is_guided
        self.feeds: dict[str, Tensor] = {"encoder_hidden_states": embeddings.hidden_states}
        if embeddings.text_embeds is not None and time_ids is not None:
            self.feeds["text_embeds"] = embeddings.text_embeds
            self.feeds["time_ids"] = time_ids.repeat(len(embeddings.text_embeds), 1)

    def __call__(self, sample: Tensor, t: int) -> Tensor:
        """The UNet's output [B, 4, h, w] at timestep ``t``; it may be the engine's buffer."""
        rows = torch.cat([sample, sample]) if self.is_guided else sample.contiguous()
        timestep = torch.tensor([t], dtype=torch.float32, device=sample.device)
        output = run_rows(self.unet, {"sample": rows, "timestep": timestep, **self.feeds})["out_sample"]
        if not self.is_guided:
            return output
        negative, positive = output.chunk(2)
        return negative + self.guidance_scale * (positive - negative)

    def step_callback(
        self, pipe: Pipeline, callback: StepCallback, names: Sequence[str]
    ) -> Callable[[int, int, Tensor], Tensor | None]:
        """The user's callback in the form that samplers take."""

        def call(i: int, t: int, latents: Tensor) -> Tensor | None:
            tensors = {"latents": latents, "prompt_embeds": self.feeds["encoder_hidden_states"]}
            replaced = callback(pipe, i, t, {name: tensors[name] for name in names}) or {}
            if "prompt_embeds" in replaced:
                self.feeds["encoder_hidden_states"] = replaced["prompt_embeds"].to(pipe.device).contiguous()
            return replaced["latents"].to(pipe.device) if "latents" in replaced else None

        return call


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._stages: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._stages[name] = time.perf_counter() - began

    def timings(self) -> dict[str, float]:
        return {**self._stages, "total": time.perf_counter() - self._began}


def _generator(request: Request, generator: Generators) -> tuple[Generators, int | tuple[int, ...] | None]:
    """The generator to draw from, and the seed that made it if it was made here."""
    if generator is not None:
        if request.seeds is not None:
            raise RequestError("seed and generator: give one of the two")
        return generator, None
    seeds = request.seeds or (secrets.randbits(32),)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    return generators, (seeds[0] if len(seeds) == 1 else seeds)


def _check_callback_tensors(names: Sequence[str]) -> None:
    if unknown := sorted(set(names) - set(CALLBACK_TENSORS)):
        raise RequestError(
            f"callback_on_step_end_tensor_inputs {', '.join(unknown)}: expected some of {', '.join(CALLBACK_TENSORS)}"
        )
