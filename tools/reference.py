"""A bundle's sources as diffusers' own pipelines, in the bundle's precision.

diffusers fuses the LoRA with peft and makes the scheduler. Only the reading of the base's weight files is shared with
the exporter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..engines import Manifest
from ..engines.component_names import controlnet
from ..engines.manifest import SourceFile
from ..engines.precision import PRECISIONS
from ..engines.progress import DownloadProgress
from ..errors import WeightsError
from ..export.checkpoints import find_checkpoint
from ..export.controlnet_sources import ControlNetSource
from ..export.libraries import quiet
from ..export.lora_sources import LoraSource
from ..export.manifest_parts import make_scheduler
from ..export.models import check_sources, load_controlnet, load_text_encoder, load_unet, load_vae
from ..export.sources import SourceOptions, Sources, find_sources
from ..families import find_family
from ..runtime.request import Request
from .reference_loras import fuse_lora
from .verify_cases import Case, control_image


@dataclasses.dataclass(frozen=True)
class Reference:
    """diffusers' pipelines of a bundle's sources.

    Attributes:
        plain: from the text alone; for a base that was trained for inpainting, with an init image and a mask.
        controlled: the same with all of the bundle's ControlNets.
        from_image: from an init image.
        controlnets: the ControlNets' names.
    """

    plain: Any
    controlled: Any | None = None
    from_image: Any | None = None
    controlnets: tuple[str, ...] = ()

    def for_case(self, case: Case, request: Request, manifest: Manifest) -> tuple[Any, dict[str, Any]]:
        """The pipeline for a case, and its arguments for images; ``request`` is the case's."""
        arguments = case.images(manifest)
        if case.starts_from != "noise":
            arguments["strength"] = request.strength
        if case.starts_from == "image":
            return self.from_image, arguments  # which takes its size from the image
        arguments |= {"height": request.height, "width": request.width}
        if not case.controlnets:
            return self.plain, arguments
        # diffusers runs all ControlNets: those that take no part see the same image, at strength 0
        used, image = {c.name: c.conditioning_scale for c in request.controls}, control_image(manifest)
        scales = [used.get(name, 0.0) for name in self.controlnets]
        is_one = len(scales) == 1  # which diffusers takes without a list
        name = "control_image" if case.starts_from == "mask" else "image"
        arguments[name] = image if is_one else [image] * len(scales)
        arguments["controlnet_conditioning_scale"] = scales[0] if is_one else scales
        return self.controlled, arguments


def load_reference(manifest: Manifest, progress: DownloadProgress | None = None) -> Reference:
    """Load a bundle's sources with diffusers.

    Raises:
        WeightsError: a source has changed since the export.
        DownloadError: a source is not available any more.
    """
    sources = find_reference_sources(manifest, progress)
    family, pipe = find_family(manifest.family), load_pipeline(manifest, sources)
    controlled = from_image = None
    with quiet():
        if manifest.has_encoder and not manifest.is_inpainting:
            from_image = _in_pipeline(family.img2img_pipeline_class, manifest, pipe.components)
        if manifest.controlnets:
            dtype = PRECISIONS[manifest.precision].dtype
            nets = [load_controlnet(sources.parts[controlnet(name)], dtype) for name in manifest.controlnets]
            parts = {**pipe.components, "controlnet": nets if len(nets) > 1 else nets[0]}
            controlled = _in_pipeline(_controlled_class(manifest), manifest, parts)
    return Reference(pipe, controlled, from_image, tuple(manifest.controlnets))


def _controlled_class(manifest: Manifest) -> str:
    family = find_family(manifest.family)
    return family.controlnet_inpaint_pipeline_class if manifest.is_inpainting else family.controlnet_pipeline_class


def find_reference_sources(manifest: Manifest, progress: DownloadProgress | None = None) -> Sources:
    """Find a bundle's sources and check that they are unchanged; raises as :func:`load_reference`."""
    if manifest.random_weights and not Path(manifest.origin.base).is_dir():
        again = f"the same command, hypersd export --ckpt {manifest.checkpoint} --random-weights ..., writes them again"
        raise WeightsError(f"the bundle's random weights in {manifest.origin.base} are gone: {again}")
    with quiet():
        checkpoint = find_checkpoint(manifest.checkpoint)
        sources = find_sources(checkpoint, _source_options(manifest), manifest.precision, progress)
        _check_unchanged(manifest, sources)
    return sources


def load_pipeline(manifest: Manifest, sources: Sources) -> Any:
    """diffusers' own pipeline of these sources, in the bundle's precision and without ControlNets."""
    with quiet():
        from transformers import CLIPTokenizer

        family, dtype = find_family(manifest.family), PRECISIONS[manifest.precision].dtype
        loras = check_sources(
            sources, manifest.family, manifest.origin.lora_scale or 1.0, text_only=not manifest.has_encoder
        ).loras.values()
        # The base without LoRAs, for diffusers to fuse; in float32, because the sum must be rounded once.
        modules: dict[str, Any] = {
            encoder.component: load_text_encoder(sources.parts[encoder.component], encoder.class_name, torch.float32)
            for encoder in family.text_encoders
        }
        modules |= {name: CLIPTokenizer.from_pretrained(str(path)) for name, path in sources.tokenizers.items()}
        modules["unet"] = load_unet(sources.parts["unet"], torch.float32)
        modules["vae"] = load_vae(sources.parts["vae"], dtype, None if manifest.has_encoder else "decoder")
        # From the base's configuration, and not from the manifest's constants, which it is to check.
        modules["scheduler"] = make_scheduler(manifest.sampler.kind, sources.scheduler_config)
        class_name = family.inpaint_pipeline_class if manifest.is_inpainting else family.pipeline_class
        pipe = _in_pipeline(class_name, manifest, {**modules, **family.pipeline_parts})
        for lora in loras:
            fuse_lora(pipe, lora)
        for name in ("unet", *family.encoder_names):
            getattr(pipe, name).to(dtype)
    return pipe


def _pipeline_settings(manifest: Manifest) -> dict[str, Any]:
    """Settings of diffusers' pipelines that are not components."""
    family = find_family(manifest.family)
    zeros = {"force_zeros_for_empty_prompt": manifest.force_zeros_for_empty_prompt}
    return {**family.pipeline_settings, **(zeros if family.has_zeroed_negatives else {})}


def _in_pipeline(class_name: str, manifest: Manifest, parts: Mapping[str, Any]) -> Any:
    """Components in a pipeline of diffusers that prints no progress."""
    import diffusers

    pipe = getattr(diffusers, class_name)(**parts, **_pipeline_settings(manifest))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _source_options(manifest: Manifest) -> SourceOptions:
    origin = manifest.origin
    published = origin.weights["lora" if "lora" in origin.weights else "unet"][0]
    return SourceOptions(
        base=origin.base,
        revision=origin.revision,
        variant=origin.variant,
        checkpoint_file=published.path,
        checkpoint_revision=published.revision,
        vae=origin.vae,
        vae_revision=origin.vae_revision,
        controlnets=tuple(
            ControlNetSource(name=name, location=place.location, revision=place.revision)
            for name, place in origin.controlnets.items()
        ),
        added_loras=tuple(
            LoraSource(location=file.path or f"{file.repo}/{file.filename}", scale=scale, revision=file.revision)
            for file, scale in ((origin.weights[name][0], scale) for name, scale in origin.added_loras.items())
        ),
    )


def _check_unchanged(manifest: Manifest, sources: Sources) -> None:
    for part, files in sources.weights.items():
        recorded: Sequence[SourceFile] = manifest.origin.weights.get(part, ())
        if [file.record().sha256 for file in files] != [record.sha256 for record in recorded]:
            names = ", ".join(str(file.path) for file in files)
            raise WeightsError(f"{names} changed since the bundle was exported: export it again")
