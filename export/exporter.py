"""Exports a Hyper-SD checkpoint to a bundle."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec

from ..engines.bundle import Bundle
from ..engines.lora_slot import LoraSlot
from ..engines.manifest import MANIFEST_NAME, FileRecord, Manifest, SourceFile
from ..engines.precision import PRECISIONS, PrecisionName
from ..engines.progress import Progress, Silent, Stage
from ..engines.specs import Component
from ..errors import RequestError, UserError
from ..families import find_family
from ..weights.lora_file import LoraFile
from ..weights.safetensors_file import SafetensorsFile
from .check import check_graph, check_outputs, reference_cases
from .checkpoints import Checkpoint, find_checkpoint
from .component_exports import ComponentExport, component_exports, tool_versions
from .components import ComponentModule
from .controlnet_sources import settings_of
from .graph_weights import read_graph, write_graph
from .libraries import quiet, release_memory
from .lora_slot import SlotOptions, make_slot
from .lora_sources import check_scale
from .manifest_parts import default_size, origin, sampler_settings, scheduler_constants, source_records, vae_settings
from .models import check_sources
from .random_weights import RandomWeights, check_random_weights, random_sources
from .shapes import ShapeOptions, image_shapes
from .sources import SourceOptions, Sources, find_sources
from .tokenizer import write_tokenizer
from .trace import OPSET, trace
from .workspace import Workspace, check_place, check_space


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of an export, besides the checkpoint and the output.

    Attributes:
        sources: replacements for the checkpoint's own base, file or VAE, and the ControlNets.
        shapes: image sizes and batch.
        precision: type of weights and activations; sampling arithmetic runs in it too, as in diffusers.
        lora_scale: factor on top of the LoRA's own alpha/rank.
        text_only: leave out the VAE's encoder, so that no image can come in: the bundle is for text to image alone.
        lora_slot: through which UNet and text encoders take LoRAs at run time; None for no slot.
        random_weights: random weights in the place of all but the ControlNets', for measurements.
        replace: whether to replace a bundle that was made from other inputs.
    """

    sources: SourceOptions = dataclasses.field(default_factory=SourceOptions)
    shapes: ShapeOptions = dataclasses.field(default_factory=ShapeOptions)
    precision: PrecisionName = "fp16"
    lora_scale: float = 1.0
    text_only: bool = False
    lora_slot: SlotOptions | None = None
    random_weights: RandomWeights | None = None
    replace: bool = False


def export_bundle(
    checkpoint: str,
    out: str | Path | None = None,
    options: ExportOptions | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Export a checkpoint, or open the bundle if it is there already, made from the same inputs.

    Args:
        checkpoint: a name that ``hypersd list`` shows.
        out: the bundle's folder; ``bundles/NAME`` if not given, ``bundles/NAME-random`` with random weights.
        options: everything else.
        progress: told about the stages.

    Raises:
        UserError: an argument or a source is wrong; nothing was written.
        ExportError: an exported component does not compute what its module computes.
    """
    entry = find_checkpoint(checkpoint)
    options = options or ExportOptions()
    progress = progress or Silent()
    _check_options(entry, options)
    out = Path(out) if out is not None else _default_out(entry, options)
    if out.name in ("", ".."):  # "." and the like have no siblings
        out = out.resolve()
    check_place(out)
    with quiet():
        given = options.sources
        if options.random_weights is not None:
            given = random_sources(entry, given, options.random_weights, progress)
        sources = find_sources(entry, given, options.precision, progress.downloads)
        for note in sources.notes:
            progress.note(note)
        _check_text_only(options, sources, entry.family)
        checked = check_sources(sources, entry.family, options.lora_scale, options.text_only)
        for name, lora in checked.loras.items():
            if name != "lora" or not sources.lora or not sources.lora.repo:  # published ones are known to be whole
                progress.note(f"fuses {lora}")
        slot = None if options.lora_slot is None else make_slot(options.lora_slot, checked.shapes)
        return _Export(entry, sources, checked.loras, slot, options, progress).run(out)


def _default_out(entry: Checkpoint, options: ExportOptions) -> Path:
    """The bundle's folder; a bundle of random weights has its own."""
    return Path("bundles") / (entry.name if options.random_weights is None else f"{entry.name}-random")


def _check_options(entry: Checkpoint, options: ExportOptions) -> None:
    if options.precision not in PRECISIONS:
        raise RequestError(f"precision {options.precision!r} is not known: expected {' or '.join(PRECISIONS)}")
    if options.random_weights is not None:
        check_random_weights(entry, options.sources, options.lora_scale)
    image_shapes(options.shapes, 512)  # wrong shapes are wrong at every default size
    if entry.kind == "unet" and options.lora_scale != 1.0:
        raise RequestError(f"{entry.name} is a whole UNet, not a LoRA: leave --lora-scale out")
    check_scale(options.lora_scale, "lora_scale")
    if options.lora_slot is not None:
        options.lora_slot.check()
    for lora in options.sources.added_loras:
        check_scale(lora.scale, f"{lora.location}: the LoRA's scale")


def _check_text_only(options: ExportOptions, sources: Sources, family: str) -> None:
    """A UNet for inpainting has the latents of an image among its inputs, in every call."""
    if options.text_only and sources.parts["unet"].config.get("in_channels") == find_family(family).inpainting_channels:
        raise RequestError(f"{sources.base} is for inpainting, which needs the VAE's encoder: leave --text-only out")


class _Export:
    """One export, its inputs resolved."""

    def __init__(
        self,
        entry: Checkpoint,
        sources: Sources,
        loras: dict[str, LoraFile],
        slot: LoraSlot | None,
        options: ExportOptions,
        progress: Progress,
    ) -> None:
        self.entry = entry
        self.sources = sources
        self.slot = slot
        self.options = options
        self.progress = progress
        self.shapes = image_shapes(options.shapes, default_size(sources, entry.family))
        self.scheduler = scheduler_constants(entry.sampler, sources.scheduler_config)
        with Stage(progress, "hash the weight files"):
            self.records: dict[str, tuple[SourceFile, ...]] = source_records(sources)
        self.exports = component_exports(
            entry, sources, self.records, self.shapes, options.precision, loras, options.text_only, slot
        )

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
        wanted = msgspec.structs.replace(  # added to finished bundles later
            wanted, engines=bundle.manifest.engines, one_graphs=bundle.manifest.one_graphs
        )
        keys = {export.name: export.key for export in self.exports}
        is_same = wanted == bundle.manifest and keys == {n: c.key for n, c in bundle.manifest.components.items()}
        if is_same and list(wanted.controlnets) == list(bundle.manifest.controlnets):  # the order of a call's lists
            return bundle
        if not self.options.replace:
            raise UserError(
                f"{out} holds a bundle made from other inputs or settings: choose another --out, or --replace it"
            )
        return None

    def _resume(self, workspace: Workspace) -> dict[str, Component]:
        """The components that an earlier run finished from the same inputs."""
        keys = {export.name: export.key for export in self.exports}
        done = workspace.resume()
        for name in [name for name, component in done.items() if keys.get(name) != component.key]:
            workspace.discard(name)
            del done[name]
        return done

    def _components(self, workspace: Workspace, done: dict[str, Component]) -> dict[str, Component]:
        """Every component: finished earlier, reused from a bundle beside this one, or made now."""
        for export in self.exports:
            if export.name not in done and (reused := workspace.reuse(export.name, export.key)):
                done[export.name] = reused
                self.progress.note(f"{export.name} taken from a bundle beside this one, made from the same inputs")
        missing = [export for export in self.exports if export.name not in done]
        check_space(workspace.root, self._space(missing))
        for export in missing:
            done[export.name] = self._make(export, workspace)
        return {export.name: done[export.name] for export in self.exports}

    def _space(self, exports: list[ComponentExport]) -> int:
        """Bytes that the components' weights will occupy on disk."""
        sizes = {
            file.path: sum(SafetensorsFile(file.path).elements()) * export.precision.compute_bytes
            for export in exports
            for file in self.sources.parts[export.part].weights
        }
        return sum(sizes.values())

    def _make(self, export: ComponentExport, workspace: Workspace) -> Component:
        """Load, trace and check one component. The module is deleted before its graph is run: one copy in memory."""
        with workspace.component_folder(export.name) as folder:
            with Stage(self.progress, f"{export.name}: load"):
                module = export.load()
            with Stage(self.progress, f"{export.name}: run in torch"):
                cases = reference_cases(module)
            files = self._write(export, module, folder / "model.onnx", workspace)
            inputs, outputs = module.inputs, module.outputs
            del module
            release_memory()
            with Stage(self.progress, f"{export.name}: check on ONNX Runtime") as stage:
                check_graph(files[0], export.precision.compute_bytes)
                stage.note = f"error at most {check_outputs(files[0], cases, export.precision):.0e}"
            component = Component(
                inputs=inputs,
                outputs=outputs,
                files=tuple(file.relative_to(workspace.root).as_posix() for file in files),
                key=export.key,
                graph=export.graph,
            )
            with Stage(self.progress, f"{export.name}: hash"):
                workspace.finish_component(export.name, component)
        return component

    def _write(self, export: ComponentExport, module: ComponentModule, path: Path, workspace: Workspace) -> list[Path]:
        """Write the ONNX file: with the graph of a component that differs in weights alone, or with a traced one."""
        if found := workspace.find_graph(export.graph):
            content, where = found
            if (graph := read_graph(content, module.module)) is not None:
                with Stage(self.progress, f"{export.name}: graph of {where}, new weights"):
                    return write_graph(graph, module.module, path)
        with Stage(self.progress, f"{export.name}: trace to ONNX"):
            return trace(module, path)

    def _manifest(self, components: dict[str, Component], files: dict[str, FileRecord]) -> Manifest:
        options = self.options
        return Manifest(
            checkpoint=self.entry.name,
            random_weights=options.random_weights is not None,
            family=self.entry.family,
            precision=options.precision,
            opset=OPSET,
            shapes=self.shapes,
            sampler=sampler_settings(self.entry),
            scheduler=self.scheduler,
            vae=vae_settings(self.sources, self.entry.family),
            controlnets={name: settings_of(net.location) for name, net in self.sources.controlnets.items()},
            force_zeros_for_empty_prompt=bool(self.sources.model_index.get("force_zeros_for_empty_prompt", True)),
            components=components,
            lora_slot=self.slot,
            files=files,
            origin=origin(self.sources, self.records, options.sources.variant, options.lora_scale),
            versions=tool_versions(),
        )
