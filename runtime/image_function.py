"""The image as a function of tensors: embedded prompts and noise in, pixels out, without waiting or random numbers.

Everything here enqueues on the current stream and copies nothing from or to the host, so that it can be recorded as one
CUDA graph. Values of the host come in as tensors, which ``make_constants`` and ``draw_noise`` make.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..engines import Engine, Manifest
from ..engines.engine import TORCH_DTYPES
from ..engines.lora_slot import LORA
from ..families import find_family
from ..samplers import Plan, Sampler
from ..samplers.loop import draw_noise, sample
from ..samplers.noise import Generators
from ..samplers.step import stacked_coefficients
from .adapters import PackedSlot
from .batching import run_rows
from .call import Call
from .controlled_unet import ControlledUnet
from .denoiser import Denoiser
from .image_encoder import make_encoder
from .pixels import to_pixels
from .request import GenerationSettings, Request, has_zeroed_negatives
from .starts import NOISE_LEVELS, Start, make_start
from .text import TextConditioner, TextEmbeddings, TokenizedTexts
from .tiling import least_latents, tiled_decode

# A row of one number is a multiple of 256 bytes, the alignment that TensorRT asks of an input's address.
NUMBER_ROW = 64
NOISE = "noise_"  # and the step's number: an input for every step that takes noise
CONDITION = "controlnet_cond/"  # and the ControlNet's name: its control images
# Inputs without a row for each image; the others have a row for each, or one for each init or control image.
SHARED = {"timesteps", "coefficients", "guidance_scale", "conditioning_scales", "time_ids", NOISE_LEVELS, LORA}
PER_HALF = {"prompt_embeds", "pooled_prompt_embeds"}  # with guidance the negative prompts' rows come first


class ImageFunction:
    """A bundle's components after the text encoders, as functions of tensors on their device.

    Args:
        manifest: the bundle's.
        engines: the components by name.
        plain_unet: the UNet where no ControlNet acts (:func:`.controlled_unet.without_residuals`).
        text: tokenizes and encodes prompts.
        sampler: plans the steps.
        vae_tile: decode images in tiles with sides of so many pixels (:mod:`.tiling`).
    """

    def __init__(
        self,
        manifest: Manifest,
        engines: Mapping[str, Engine],
        plain_unet: Engine | None,
        text: TextConditioner,
        sampler: Sampler,
        vae_tile: int | None = None,
    ) -> None:
        self.manifest = manifest
        self.text = text
        self.family = find_family(manifest.family)
        self.sampler = sampler
        self.unet = engines["unet"]
        self.controlled_unet = ControlledUnet(manifest, engines, plain_unet)
        self.vae_decoder = engines["vae_decoder"]
        self.image_encoder = make_encoder(manifest, engines, TORCH_DTYPES[self.unet.inputs["sample"].dtype])
        self.vae_tile = vae_tile

    def make_constants(self, call: Call) -> dict[str, Tensor]:
        """The inputs that follow from the call's request alone, on the device, all float32 but for ``time_ids``.

        ``timesteps`` [steps, 64], a row of one value each; ``coefficients`` [steps, N], the sampler's; with guidance
        ``guidance_scale`` [1]; for runs from an image ``noise_levels`` [steps, 2]; with ControlNets
        ``conditioning_scales`` [ControlNets, 64], a row of one value for each that acts; for SDXL ``time_ids`` [1, 6],
        the size conditioning: original size, crop corner and target size (Podell et al., section 2.2).
        """
        request, timesteps = call.request, [int(step.t) for step in call.plan]
        constants = {
            "timesteps": self._rows_of(timesteps),
            "coefficients": stacked_coefficients(call.plan).to(self.unet.device),
        }
        if request.is_guided:
            constants["guidance_scale"] = torch.tensor([request.guidance_scale]).to(self.unet.device)
        if request.starts_from != "noise":
            dtype = TORCH_DTYPES[self.unet.inputs["sample"].dtype]
            levels = torch.stack([self.sampler.noise_level(t, dtype) for t in timesteps])
            constants[NOISE_LEVELS] = levels.to(self.unet.device)
        if call.settings.controlnets:
            scales = {control.name: control.conditioning_scale for control in request.controls}
            constants["conditioning_scales"] = self._rows_of([scales[name] for name in call.settings.controlnets])
        if (spec := self.unet.inputs.get("time_ids")) is not None:
            assert self.family.size_conditioning is not None
            row = self.family.size_conditioning(request.height, request.width)
            constants["time_ids"] = torch.tensor([row], dtype=TORCH_DTYPES[spec.dtype]).to(self.unet.device)
        return constants

    def _rows_of(self, numbers: Sequence[float]) -> Tensor:
        """Numbers that engines take one of at a time: [N, 64] float32, a row of each."""
        rows = torch.tensor(numbers, dtype=torch.float32).unsqueeze(1).repeat(1, NUMBER_ROW)
        return rows.to(self.unet.device)

    def draw_noise(self, plan: Plan, latents: Tensor, generator: Generators) -> dict[str, Tensor]:
        """The inputs ``noise_0`` and so on, [B, 4, h, w] each, for the steps that take noise."""
        dtype = TORCH_DTYPES[self.unet.outputs["out_sample"].dtype]
        noises = draw_noise(latents, plan, generator=generator, output_dtype=dtype)
        return {f"{NOISE}{i}": noise for i, noise in enumerate(noises) if noise is not None}

    def generate(self, settings: GenerationSettings, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``output``: finished pixels, as ``to_pixels`` makes them, or latents.

        ``inputs`` are ``prompt_embeds`` and for SDXL ``pooled_prompt_embeds``, which ``embed`` orders, control images
        [1 or prompts, 3, H, W] as ``controlnet_cond/NAME``, an init image and a mask (:mod:`.starts`), and the results
        of :func:`.starts.draw` and of the two methods above.
        """
        embeddings = TextEmbeddings(inputs["prompt_embeds"], inputs.get("pooled_prompt_embeds"))
        controls = self.embed_controls(settings, inputs)
        latents = self.denoise(settings, embeddings, controls, self.start(settings, inputs), inputs)
        if settings.output_type == "latent":
            return {"output": latents}
        return {"output": to_pixels(self.decode(latents), settings.output_type)}

    def lora_inputs(self, slot: PackedSlot) -> dict[str, Tensor]:
        """The contents of the UNet's LoRA slot as ``lora``, if it has one."""
        return {LORA: slot.tensors["unet"]} if "unet" in slot.tensors else {}

    def text_inputs(self, request: Request, tokenized: TokenizedTexts) -> dict[str, Tensor]:
        """The inputs that follow from the prompts: their embeddings under diffusers' names."""
        return self.embed(request, tokenized).named()

    def embed(self, request: Request, tokenized: TokenizedTexts) -> TextEmbeddings:
        """One row an image; with guidance first those of the negative prompts, as diffusers orders them.

        ``tokenized`` has a text for each prompt, after those of the negative prompts if they are encoded.
        """
        encoded, count = self.text.encode(tokenized), len(request.prompts)

        def repeat(rows: Tensor) -> Tensor:
            repeats = request.num_images_per_prompt
            return rows if repeats == 1 else rows.repeat_interleave(repeats, dim=0)

        positive = encoded.map(lambda rows: repeat(rows[-count:]))
        if not request.is_guided:
            return positive
        if has_zeroed_negatives(self.manifest, request):
            return positive.map(torch.zeros_like).cat(positive)
        return encoded.map(lambda rows: repeat(rows[:count])).cat(positive)

    def embed_controls(self, settings: GenerationSettings, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The control images as the ControlNets that act see them, [B, C, h, w], by name: once for all steps."""
        images = len(inputs["latents"])
        return {
            name: self.controlled_unet.embed(name, inputs[f"{CONDITION}{name}"], images, settings.is_guided)
            for name in settings.controlnets
        }

    def start(self, settings: GenerationSettings, inputs: Mapping[str, Tensor]) -> Start:
        """The first latents, for which an init image is encoded."""
        return make_start(settings, inputs, self.image_encoder)

    def denoise(
        self,
        settings: GenerationSettings,
        embeddings: TextEmbeddings,
        controls: Mapping[str, Tensor],
        start: Start,
        inputs: Mapping[str, Tensor],
        *,
        generator: Generators = None,
        callback: Callable[[Denoiser, int, Tensor], Tensor | None] | None = None,
    ) -> Tensor:
        """Finished latents [B, 4, h, w]; with a ``generator`` noise is drawn step by step, else it is in ``inputs``.

        ``embeddings``, ``controls`` and ``start`` are the results of ``embed``, ``embed_controls`` and ``start``.
        ``callback(denoiser, step, latents)`` is called after every step and may return other latents.
        """
        timesteps = [row[:1] for row in inputs["timesteps"]]
        plan = self.sampler.steps_from(timesteps, inputs["coefficients"], settings.noisy)
        denoiser = Denoiser(self.controlled_unet, embeddings, controls, start.extra_channels, settings, inputs)

        def after_step(i: int, _: Any, latents: Tensor) -> Tensor:
            if NOISE_LEVELS in inputs:
                latents = start.restore(inputs[NOISE_LEVELS], i, latents)
            replaced = callback and callback(denoiser, i, latents)
            return latents if replaced is None else replaced

        return sample(
            denoiser,
            start.latents,
            plan,
            generator=generator,
            noises=[inputs.get(f"{NOISE}{i}") for i in range(len(plan))] if generator is None else None,
            callback=after_step,
        )

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, 4, h, w] to images [B, 3, H, W] in -1..1; the tensor may be the decoder's own buffer."""
        spec = self.vae_decoder.inputs["latent_sample"]
        # A float32 decoder's division is float32 too.
        scaled = latents.to(TORCH_DTYPES[spec.dtype]) / self.manifest.vae.scaling_factor

        def decode(rows: Tensor) -> Tensor:
            return run_rows(self.vae_decoder, {"latent_sample": rows})["sample"]

        if self.vae_tile is None:
            return decode(scaled.contiguous())
        return tiled_decode(scaled, decode, self.vae_tile, scale=self.manifest.vae.spatial, least=least_latents(spec))
