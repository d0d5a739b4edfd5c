"""What a service tells of the bundles that it serves."""

from __future__ import annotations

import dataclasses

from ..engines.manifest import Range
from ..runtime import Pipeline


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extent:
    """A side that the bundle draws, in pixels."""

    min: int
    default: int
    max: int
    multiple: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlNetCard:
    """A ControlNet of a bundle, and how it wants to be used."""

    name: str
    preprocess: str
    control_scale: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelCard:
    """A bundle that is served, as ``GET /v1/models`` tells it.

    Attributes:
        id: what requests call it.
        created: when it was loaded, in seconds since 1970.
        changed_on_disk: another bundle lies in its folder by now; the service draws with what it has loaded.
    """

    id: str
    created: int
    checkpoint: str
    family: str
    device: str
    backend: str
    default_steps: int
    allowed_steps: tuple[int, ...]
    eta: float
    guidance_scale: float
    width: Extent
    height: Extent
    controlnets: tuple[ControlNetCard, ...] = ()
    changed_on_disk: bool = False


def make_card(name: str, pipe: Pipeline, created: int, changed: bool) -> ModelCard:
    """What is told of a bundle."""
    manifest, choice = pipe.manifest, pipe.choice
    return ModelCard(
        id=name,
        created=created,
        checkpoint=manifest.checkpoint,
        family=manifest.family,
        device=str(pipe.device),
        backend=choice.backend if choice else "",
        default_steps=manifest.sampler.num_inference_steps,
        allowed_steps=tuple(sorted(manifest.sampler.allowed_steps)),
        eta=manifest.sampler.eta,
        guidance_scale=manifest.sampler.guidance_scale,
        width=_extent(manifest.shapes.width, manifest.vae.spatial),
        height=_extent(manifest.shapes.height, manifest.vae.spatial),
        controlnets=tuple(
            ControlNetCard(name=net, preprocess=settings.preprocess, control_scale=settings.conditioning_scale)
            for net, settings in manifest.controlnets.items()
        ),
        changed_on_disk=changed,
    )


def _extent(side: Range, multiple: int) -> Extent:
    return Extent(min=side.min, default=side.opt, max=side.max, multiple=multiple)
