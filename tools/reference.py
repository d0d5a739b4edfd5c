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
from PIL import Image

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


@dataclasses.dataclass(frozen=True)
class Reference:
    """diffusers' pipelines of a bundle's sources: without ControlNets, and with all of the bundle's."""

    plain: Any
    controlled: Any | None = None
    controlnets: tuple[str, ...] = ()

    def for_request(self, request: Request, images: Mapping[str, Image.Image]) -> tuple[Any, dict[str, Any]]:
        """The pipeline for a request with these control images, and its arguments for them."""
        if not images:
            return self.plain, {}
        # diffusers runs all ControlNets: one without an image gets another's image, at strength 0
        some, used = next(iter(images.values())), {c.name: c.conditioning_scale for c in request.controls}
        sources = [images.get(name, some) for name in self.controlnets]
        scales = [used.get(name, 0.0) for name in self.controlnets]
        is_one = len(scales) == 1  # which diffusers takes without a list
        return self.controlled, {
            "image": sources[0] if is_one else sources,
            "controlnet_conditioning_scale": scales[0] if is_one else scales,
        }


def load_reference(manifest: Manifest, progress: DownloadProgress | None = None) -> Reference:
    """Load a bundle's sources with diffusers.

    Raises:
        WeightsError: a source has changed since the export.
        DownloadError: a source is not available any more.
    """
    sources = find_reference_sources(manifest, progress)
    pipe = load_pipeline(manifest, sources)
    if not manifest.controlnets:
        return Reference(pipe)
    with quiet():
        dtype = PRECISIONS[manifest.precision].dtype
        nets = [load_controlnet(sources.parts[controlnet(name)], dtype) for name in manifest.controlnets]
        controlled = _with_controlnets(manifest, pipe, nets)
    controlled.set_progress_bar_config(disable=True)
    return Reference(pipe, controlled, tuple(manifest.controlnets))


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
        import diffusers
        from transformers import CLIPTokenizer

        family, dtype = find_family(manifest.family), PRECISIONS[manifest.precision].dtype
        loras = check_sources(
            sources, manifest.family, manifest.origin.lora_scale or 1.0, text_only=not manifest.has_encoder
        ).values()
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
        settings = _pipeline_settings(manifest)
        pipe: Any = getattr(diffusers, family.pipeline_class)(**modules, **family.pipeline_parts, **settings)
        for lora in loras:
            fuse_lora(pipe, lora)
        for name in ("unet", *family.encoder_names):
            getattr(pipe, name).to(dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _pipeline_settings(manifest: Manifest) -> dict[str, Any]:
    """Settings of diffusers' pipelines that are not components."""
    family = find_family(manifest.family)
    zeros = {"force_zeros_for_empty_prompt": manifest.force_zeros_for_empty_prompt}
    return {**family.pipeline_settings, **(zeros if family.has_zeroed_negatives else {})}


def _with_controlnets(manifest: Manifest, pipe: Any, nets: Sequence[Any]) -> Any:
    """The same components in a pipeline with ControlNets."""
    import diffusers

    parts = {**pipe.components, "controlnet": list(nets) if len(nets) > 1 else nets[0]}
    pipeline_class = getattr(diffusers, find_family(manifest.family).controlnet_pipeline_class)
    return pipeline_class(**parts, **_pipeline_settings(manifest))


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
