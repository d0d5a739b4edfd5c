"""From a Hyper-SD checkpoint to a bundle."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

import msgspec

from ..engines.bundle import Bundle
from ..engines.component_names import controlnet
from ..engines.manifest import (
    MANIFEST_NAME,
    Component,
    FileRecord,
    Manifest,
    Origin,
    SamplerSettings,
    SourceFile,
    VaeSettings,
)
from ..engines.progress import Stage
from ..errors import RequestError, UserError
from ..families import find_family
from ..weights.safetensors_file import SafetensorsFile
from .check import check_graph, check_outputs, reference_cases
from .checkpoints import Checkpoint, find_checkpoint
from .controlnet_sources import settings_of
from .layout import Found
from .libraries import quiet
from .memory import release_memory
from .models import check_controlnet_sources, check_unet_sources, is_tiny
from .progress import ExportProgress, Silent
from .random_weights import RandomWeights, check_random_weights, random_sources
from .recipes import Recipe, latent_scale, make_recipes, tool_versions
from .scheduler import scheduler_constants
from .shapes import ShapeOptions, image_shapes
from .sources import SourceOptions, Sources, find_sources
from .tokenizer import write_tokenizer
from .trace import OPSET, trace
from .workspace import Workspace, check_place, check_space

BYTES = {"fp16": 2, "fp32": 4}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How to export, besides which checkpoint and where to.

    Attributes:
        sources: what replaces the checkpoint's own base, LoRA or VAE, and its ControlNets.
        shapes: image sizes and batch.
        precision: type of weights and activations; sampling arithmetic runs in it too, as in diffusers.
        lora_scale: factor on top of the LoRA's own alpha/rank.
        random_weights: random weights in the place of all but the ControlNets', for measurements.
        replace: replace a bundle that was made from other inputs.
    """

    sources: SourceOptions = dataclasses.field(default_factory=SourceOptions)
    shapes: ShapeOptions = dataclasses.field(default_factory=ShapeOptions)
    precision: Literal["fp16", "fp32"] = "fp16"
    lora_scale: float = 1.0
    random_weights: RandomWeights | None = None
    replace: bool = False


def export_bundle(
    checkpoint: str,
    out: str | Path | None = None,
    options: ExportOptions | None = None,
    progress: ExportProgress | None = None,
) -> Bundle:
    """Export a checkpoint, or open the bundle if it is there already, made from the same inputs.

    Args:
        checkpoint: a name that ``hypersd list`` shows.
        out: the bundle's folder; ``bundles/NAME`` if not given, ``bundles/NAME-random`` with random weights.
        options: everything else.
        progress: told what happens.

    Raises:
        UserError: an argument or a source is wrong; nothing was written.
        ExportError: an exported network is not the one it was traced from.
    """
    entry = find_checkpoint(checkpoint)
    options = options or ExportOptions()
    progress = progress or Silent()
    _check_options(entry, options)
    out = Path(out) if out is not None else _default_out(entry, options)
    if out.name in ("", ".."):  # "." and such, beside which nothing can be named
        out = out.resolve()
    check_place(out)
    with quiet():
        given = options.sources
        if options.random_weights is not None:
            given = random_sources(entry, given, options.random_weights, progress)
        sources = find_sources(entry, given, options.precision, progress.downloads)
        check_unet_sources(sources.parts["unet"], sources.lora, entry.family)
        for name in sources.controlnets:
            check_controlnet_sources(sources.parts[controlnet(name)])
        return _Export(entry, sources, options, progress).run(out)


def _default_out(entry: Checkpoint, options: ExportOptions) -> Path:
    """Random weights never lie where the real ones are looked for."""
    return Path("bundles") / (entry.name if options.random_weights is None else f"{entry.name}-random")


def _check_options(entry: Checkpoint, options: ExportOptions) -> None:
    if options.precision not in BYTES:
        raise RequestError(f"precision {options.precision!r} is not known: expected fp16 or fp32")
    if not math.isfinite(options.lora_scale) or abs(options.lora_scale) > 10:
        raise RequestError(f"lora_scale {options.lora_scale} is out of range: expected -10 to 10, usually 1")
    if options.random_weights is not None:
        check_random_weights(entry, options.sources, options.lora_scale)
    image_shapes(options.shapes, 512)  # what is wrong with them is wrong at every default size
    if entry.kind == "unet" and options.lora_scale != 1.0:
        raise RequestError(f"{entry.name} is a whole UNet, not a LoRA: leave --lora-scale out")


class _Export:
    """One export, its inputs resolved."""

    def __init__(self, entry: Checkpoint, sources: Sources, options: ExportOptions, progress: ExportProgress) -> None:
        self.entry = entry
        self.sources = sources
        self.options = options
        self.progress = progress
        self.shapes = image_shapes(options.shapes, _default_size(sources))
        self.scheduler = scheduler_constants(entry.sampler, sources.scheduler_config)
        with Stage(progress, "hash the weight files"):
            self.records: dict[str, tuple[SourceFile, ...]] = _records(sources)
        self.recipes = make_recipes(entry, sources, self.records, self.shapes, options.precision, options.lora_scale)

    def run(self, out: Path) -> Bundle:
        with Workspace.open(
            out, lambda: self.progress.note(f"waiting for another export to {out} to end")
        ) as workspace:
            if bundle := self._finished(out):
                self.progress.note(f"{out} is done already, made from the same inputs")
                return bundle
            done = self._resume(workspace)
            for name, folder in self.sources.tokenizers.items():
                write_tokenizer(folder, workspace.root / name)
            components = self._components(workspace, done)
            return workspace.publish(lambda files: self._manifest(components, files), replace=self.options.replace)

    def _finished(self, out: Path) -> Bundle | None:
        """The bundle at ``out`` if it is the one that this export would make."""
        if not (out / MANIFEST_NAME).exists():
            return None
        try:
            bundle = Bundle.load(out)
        except UserError:
            if self.options.replace:
                return None
            raise
        wanted = self._manifest(bundle.manifest.components, bundle.manifest.files)
        wanted = msgspec.structs.replace(  # what is added to a bundle that is finished
            wanted, engines=bundle.manifest.engines, one_graphs=bundle.manifest.one_graphs
        )
        keys = {recipe.name: recipe.key for recipe in self.recipes}
        is_same = wanted == bundle.manifest and keys == {n: c.key for n, c in bundle.manifest.components.items()}
        if is_same and list(wanted.controlnets) == list(bundle.manifest.controlnets):  # calls' lists have their order
            return bundle
        if not self.options.replace:
            raise UserError(
                f"{out} holds a bundle made from other inputs or settings: choose another --out, or --replace it"
            )
        return None

    def _resume(self, workspace: Workspace) -> dict[str, Component]:
        """The components that an earlier run finished from the same inputs."""
        keys = {recipe.name: recipe.key for recipe in self.recipes}
        done = workspace.resume()
        for name in [name for name, component in done.items() if keys.get(name) != component.key]:
            workspace.discard(name)
            del done[name]
        return done

    def _components(self, workspace: Workspace, done: dict[str, Component]) -> dict[str, Component]:
        """Every component: what is done, what a bundle beside this one has, and the rest made now."""
        for recipe in self.recipes:
            if recipe.name not in done and (reused := workspace.reuse(recipe.name, recipe.key)):
                done[recipe.name] = reused
                self.progress.note(f"{recipe.name} taken from a bundle beside this one, made from the same inputs")
        missing = [recipe for recipe in self.recipes if recipe.name not in done]
        check_space(workspace.root, self._space(missing))
        for recipe in missing:
            done[recipe.name] = self._make(recipe, workspace)
        return {recipe.name: done[recipe.name] for recipe in self.recipes}

    def _space(self, recipes: list[Recipe]) -> int:
        """Bytes that the components' weights will take on disk."""
        sizes = {
            file.path: sum(SafetensorsFile(file.path).elements()) * BYTES[recipe.precision]
            for recipe in recipes
            for file in self.sources.parts[recipe.part].weights
        }
        return sum(sizes.values())

    def _make(self, recipe: Recipe, workspace: Workspace) -> Component:
        """Load, trace and check one network. The module is let go before its graph is run: one copy in memory."""
        with workspace.component_folder(recipe.name) as folder:
            with Stage(self.progress, f"{recipe.name}: load"):
                network = recipe.load()
            with Stage(self.progress, f"{recipe.name}: run in torch"):
                cases = reference_cases(network)
            with Stage(self.progress, f"{recipe.name}: trace to ONNX"):
                files = trace(network, folder / "model.onnx")
            inputs, outputs = network.inputs, network.outputs
            del network
            release_memory()
            with Stage(self.progress, f"{recipe.name}: check on ONNX Runtime") as stage:
                check_graph(files[0], BYTES[recipe.precision])
                stage.note = f"error at most {check_outputs(files[0], cases):.0e}"
            component = Component(
                inputs=inputs,
                outputs=outputs,
                files=tuple(file.relative_to(workspace.root).as_posix() for file in files),
                key=recipe.key,
            )
            with Stage(self.progress, f"{recipe.name}: hash"):
                workspace.finish_component(recipe.name, component)
        return component

    def _manifest(self, components: dict[str, Component], files: dict[str, FileRecord]) -> Manifest:
        entry, sources, options = self.entry, self.sources, self.options
        family = find_family(entry.family)
        vae = sources.parts["vae"]
        return Manifest(
            checkpoint=entry.name,
            random_weights=options.random_weights is not None,
            family=entry.family,
            precision=options.precision,
            opset=OPSET,
            shapes=self.shapes,
            sampler=SamplerSettings(
                kind=entry.sampler,
                num_inference_steps=entry.allowed_steps[0],
                allowed_steps=entry.allowed_steps,
                timesteps=entry.timesteps,
                eta=entry.eta,
                guidance_scale=entry.guidance_scale,
            ),
            scheduler=self.scheduler,
            vae=VaeSettings(
                scaling_factor=_scaling_factor(vae.config, 1.0 if is_tiny(vae) else family.scaling_factor),
                spatial=latent_scale(sources),
                tiny=is_tiny(vae),
            ),
            controlnets={name: settings_of(origin.location) for name, origin in sources.controlnets.items()},
            force_zeros_for_empty_prompt=bool(sources.model_index.get("force_zeros_for_empty_prompt", True)),
            components=components,
            files=files,
            origin=Origin(
                base=sources.base,
                revision=sources.base_revision,
                variant=self.options.sources.variant,
                vae=sources.vae,
                vae_revision=sources.vae_revision,
                lora_scale=options.lora_scale if sources.lora else None,
                controlnets=sources.controlnets,
                weights=self.records,
            ),
            versions=tool_versions(),
        )


def _records(sources: Sources) -> dict[str, tuple[SourceFile, ...]]:
    """The manifest's records of all weight files; each file is hashed once."""
    cache: dict[Found, SourceFile] = {}

    def record(found: Found) -> SourceFile:
        if found not in cache:
            cache[found] = found.record()
        return cache[found]

    return {name: tuple(map(record, files)) for name, files in sources.weights.items()}


def _default_size(sources: Sources) -> int:
    """Pixels of a side that the base was trained for, as diffusers takes it: from the UNet's sample_size."""
    size = sources.parts["unet"].config.get("sample_size") or 64
    return (size if isinstance(size, int) else size[0]) * latent_scale(sources)


def _scaling_factor(config: dict[str, Any], default: float) -> float:
    return float(config.get("scaling_factor", default))
