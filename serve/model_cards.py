"""The served bundles, as the service describes them."""

from __future__ import annotations

from pathlib import Path

from ..engines.specs import Range
from ..runtime import Pipeline
from .schemas import ControlNet, Default, LoadedAdapter, ModelCard, Side, Steps


class LoadedManifest:
    """The manifest of a loaded bundle; notices when another takes its place, and reads it only if its file is new."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp, self._content = self._stamp_now(), self._content_now()
        self._is_other = False

    def has_changed(self) -> bool:
        """Whether the file differs from the one that was loaded."""
        stamp = self._stamp_now()
        if stamp != self._stamp:
            self._stamp, self._is_other = stamp, self._content_now() != self._content
        return self._is_other

    def _stamp_now(self) -> tuple[int, ...] | None:
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns

    def _content_now(self) -> bytes | None:
        try:
            return self._path.read_bytes()
        except OSError:
            return None


def model_card(name: str, pipe: Pipeline, created: int, has_changed: bool) -> ModelCard:
    """The description of a loaded bundle."""
    manifest, choice = pipe.manifest, pipe.choice
    return ModelCard(
        id=name,
        created=created,
        checkpoint=manifest.checkpoint,
        family=manifest.family,
        device=str(pipe.device),
        backend=choice.backend if choice else "",
        steps=Steps(
            default=manifest.sampler.num_inference_steps,
            allowed=sorted(manifest.sampler.allowed_steps),
        ),
        eta=Default(default=manifest.sampler.eta),
        guidance_scale=Default(default=manifest.sampler.guidance_scale),
        width=_side(manifest.shapes.width, manifest.vae.spatial),
        height=_side(manifest.shapes.height, manifest.vae.spatial),
        controlnets=[
            ControlNet(name=net, preprocess=settings.preprocess, control_scale=settings.conditioning_scale)
            for net, settings in manifest.controlnets.items()
        ],
        lora_rank=manifest.lora_slot and manifest.lora_slot.rank,
        adapters=[
            LoadedAdapter(name=adapter.name, rank=adapter.rank, notes=list(adapter.notes))
            for adapter in sorted(pipe.adapters, key=lambda adapter: adapter.name)
        ],
        has_encoder=manifest.has_encoder,
        changed_on_disk=has_changed,
    )


def _side(side: Range, multiple: int) -> Side:
    return Side(min=side.min, default=side.opt, max=side.max, multiple=multiple)
