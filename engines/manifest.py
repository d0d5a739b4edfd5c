"""The manifest of a bundle: the schema of ``bundle.json``, its checks, reading and writing."""

from __future__ import annotations

import json
import re
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

import msgspec

from ..errors import BundleError, one_line, shown
from .component_names import (
    check_controlnet_name,
    check_one_graph_name,
    cond_embedding,
    controlnet,
    one_graph_file,
    residual_input,
)
from .lora_slot import LORA, LoraSlot
from .precision import PrecisionName
from .specs import (
    Component,
    EngineTarget,
    ImageShapes,
    OneGraph,
    Positive,
    Record,
    Sha256,
    Share,
    Size,
)
from .vocabulary import Preprocess

SCHEMA_VERSION = 5
MANIFEST_NAME = "bundle.json"
ENGINES_FOLDER = "engines"

LARGEST_SCALE = 10.0  # of a ControlNet's residuals; diffusers has no limit, people use up to 2
LARGEST_GUIDANCE = 50.0
ConditioningScale = Annotated[float, msgspec.Meta(ge=0, le=LARGEST_SCALE)]


class FileRecord(Record, frozen=True, kw_only=True):
    """Size and hash of a file of the bundle."""

    size: Size
    sha256: Sha256


class SourceFile(Record, frozen=True, kw_only=True):
    """A weight file that the bundle was made from.

    ``repo`` is its Hub repository or demonstration folder, ``path`` its place on the exporting machine if it has none.
    """

    filename: str
    size: Size
    sha256: Sha256
    repo: str | None = None
    revision: str | None = None
    path: str | None = None


class ControlNetOrigin(Record, frozen=True, kw_only=True):
    """Source of a ControlNet: a Hub repository, a folder or a demonstration folder; ``revision`` is its commit."""

    location: str
    revision: str | None = None


def added_lora(number: int) -> str:
    """The record of a LoRA that was fused after the checkpoint's own, counted from 1."""
    return f"added_lora/{number}"


class Origin(Record, frozen=True, kw_only=True):
    """Sources of the components, sufficient to load them again with diffusers (``hypersd verify``).

    Attributes:
        base: a Hub repository, a folder in diffusers layout, a demonstration folder or a single-file checkpoint.
        revision: the commit of ``base`` if it is on the Hub.
        variant: ``"fp16"`` if the half-precision weight files were used.
        vae: source of the VAE if it is not ``base``.
        lora_scale: factor of the LoRA before it was fused; None without a LoRA.
        added_lora_scales: factors of the LoRAs that were fused after it; their records are ``added_lora/1`` and so on.
        controlnets: source of each ControlNet, by its name.
        weights: the weight files of each component.
    """

    base: str
    revision: str | None = None
    variant: str | None = None
    vae: str | None = None
    vae_revision: str | None = None
    lora_scale: float | None = None
    added_lora_scales: tuple[float, ...] = ()
    controlnets: dict[str, ControlNetOrigin] = msgspec.field(default_factory=dict)
    weights: dict[str, tuple[SourceFile, ...]]

    def __post_init__(self) -> None:
        lost = [i for i in range(1, len(self.added_lora_scales) + 1) if not self.weights.get(added_lora(i))]
        if lost:
            raise ValueError(f"a scale without its LoRA: {', '.join(map(added_lora, lost))}")

    @property
    def added_loras(self) -> dict[str, float]:
        """The scales of the added LoRAs, by the names of their records in ``weights``."""
        return {added_lora(i): scale for i, scale in enumerate(self.added_lora_scales, 1)}

    @property
    def described_loras(self) -> list[str]:
        """The added LoRAs as ``--add-lora`` takes them, local files without their folders."""
        files = {name: self.weights[name][0] for name in self.added_loras}
        places = {name: f"{file.repo}/{file.filename}" if file.repo else file.filename for name, file in files.items()}
        return [f"{places[name]}:{scale:g}" for name, scale in self.added_loras.items()]


class SamplerSettings(Record, frozen=True, kw_only=True):
    """The sampler and its recommended settings, the defaults of a call; ``kind`` is the sampler's name."""

    kind: str
    num_inference_steps: Positive
    allowed_steps: tuple[Positive, ...]
    timesteps: tuple[Size, ...] | None = None
    eta: Share
    guidance_scale: Annotated[float, msgspec.Meta(ge=0, le=LARGEST_GUIDANCE)]


class VaeSettings(Record, frozen=True, kw_only=True):
    """``scaling_factor`` divides the latents before they are decoded; ``spatial`` is pixels per latent."""

    scaling_factor: Annotated[float, msgspec.Meta(gt=0, le=1e6)]
    spatial: Annotated[int, msgspec.Meta(ge=1, le=64)] = 8
    latent_channels: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 4
    tiny: bool = False


class ControlNetSettings(Record, frozen=True, kw_only=True):
    """Recommended settings of a ControlNet, the defaults of a call.

    ``preprocess`` names the filter that makes its control image from a photograph or a drawing.
    """

    conditioning_scale: ConditioningScale = 1.0
    preprocess: Preprocess = "none"


class Manifest(Record, frozen=True, kw_only=True):
    """The whole of ``bundle.json``.

    ``random_weights`` means that the weights are not the checkpoint's: such a bundle is for measurements.
    """

    schema_version: Literal[5] = SCHEMA_VERSION
    checkpoint: str
    random_weights: bool = False
    family: str
    precision: PrecisionName
    opset: Positive
    shapes: ImageShapes
    sampler: SamplerSettings
    scheduler: dict[str, Any]
    vae: VaeSettings
    force_zeros_for_empty_prompt: bool
    controlnets: dict[str, ControlNetSettings] = msgspec.field(default_factory=dict)
    components: dict[str, Component]
    lora_slot: LoraSlot | None = None
    files: dict[str, FileRecord]
    origin: Origin
    versions: dict[str, str]
    one_graphs: dict[str, OneGraph] = msgspec.field(default_factory=dict)
    engines: dict[str, EngineTarget] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.files:
            check_relative(name)
        named = {file for component in self.components.values() for file in component.files}
        if unlisted := sorted(named - self.files.keys()):
            raise ValueError(f"component files without a record: {', '.join(unlisted)}")
        self._check_slot()
        for name in self.controlnets:
            self._check_controlnet(name)
        for name, one_graph in self.one_graphs.items():
            self._check_one_graph(name, one_graph)
        for name, target in self.engines.items():
            self._check_target(name, target)

    @property
    def is_inpainting(self) -> bool:
        """Whether the UNet was trained for inpainting: it takes a mask and a masked image as further channels."""
        unet = self.components.get("unet")
        return unet is not None and unet.inputs["sample"].shape[1] != self.vae.latent_channels

    @property
    def has_encoder(self) -> bool:
        """Whether the bundle encodes images, so that generation can start from one."""
        return "vae_encoder" in self.components

    def component_bytes(self, component: Component) -> int:
        """The size of a component's graph and weights on disk, in bytes."""
        return sum(self.files[file].size for file in component.files)

    def _check_slot(self) -> None:
        """A component takes ``lora`` if the slot gives it places, and of their size."""
        sizes = {name: self.lora_slot.size(name) for name in self.lora_slot.components} if self.lora_slot else {}
        inputs = {name: part.inputs[LORA].shape for name, part in self.components.items() if LORA in part.inputs}
        if inputs != {name: (size,) for name, size in sizes.items()}:
            raise ValueError(f"the inputs {LORA} {inputs} are not those of the LoRA slot, which has {sizes}")

    def _check_controlnet(self, name: str) -> None:
        """A ControlNet is two components, and a UNet that accepts its residuals."""
        check_controlnet_name(name)
        needed = {controlnet(name), cond_embedding(name), "unet"}
        if absent := sorted(needed - self.components.keys()):
            raise ValueError(f"ControlNet {name} without its {' and '.join(absent)}")
        made = {residual_input(output) for output in self.components[controlnet(name)].outputs}
        if lost := sorted(made - self.components["unet"].inputs.keys()):
            raise ValueError(f"ControlNet {name} has outputs that the UNet does not accept: {', '.join(lost)}")

    def _check_one_graph(self, name: str, one_graph: OneGraph) -> None:
        """A one-graph has a file of its own, and reads the components' files."""
        check_one_graph_name(name)
        graph, *weights = one_graph.network.files
        if graph != one_graph_file(name):
            raise ValueError(f"one-graph {name} in {graph!r}: expected {one_graph_file(name)}")
        if graph not in self.files:
            raise ValueError(f"one-graph {name} without a record of its file")
        named = {file for component in self.components.values() for file in component.files}
        if unknown := sorted(set(weights) - named):
            raise ValueError(f"one-graph {name} reads files of no component: {', '.join(unknown)}")
        for extent, wide in zip(one_graph.extents, self.shapes.extents, strict=True):
            if not wide.min <= extent <= wide.max:
                raise ValueError(f"one-graph {name}: {wide.name} {extent} is outside the bundle's {wide}")

    def _check_target(self, name: str, target: EngineTarget) -> None:
        """A target is one folder with plans and nothing else: commands delete it."""
        if not re.fullmatch(r"[\w.-]+", name, re.ASCII) or not name.strip("."):
            raise ValueError(f"target name {name!r} is not that of a folder")
        if not (target.version + target.platform + "".join(target.compute_capabilities)).isprintable():
            raise ValueError(f"target {name} holds characters that cannot be shown")
        for extent, wide in zip(target.shapes.extents, self.shapes.extents, strict=True):
            if extent.min < wide.min or extent.max > wide.max:
                raise ValueError(f"target {name}: {extent.name} {extent} is outside the bundle's {wide}")
        for component, plan in target.plans.items():
            if plan.file != (expected := f"{ENGINES_FOLDER}/{name}/{component}.engine"):
                raise ValueError(f"plan {plan.file!r} of {name}: expected {expected}")
        if unlisted := sorted({plan.file for plan in target.plans.values()} - self.files.keys()):
            raise ValueError(f"plans without a record: {', '.join(unlisted)}")
        if unknown := sorted(target.plans.keys() - self.components.keys()):
            raise ValueError(f"plans of components that are not there: {', '.join(unknown)}")


def check_relative(name: str) -> None:
    """Reject a file name that could lead out of the bundle's folder, on any system."""
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or "\0" in name:
        raise ValueError(f"file name {name!r} leads out of the bundle")
    if not name.isprintable():
        raise ValueError(f"file name {name!r} holds characters that cannot be shown")


def encode(manifest: msgspec.Struct) -> bytes:
    """The manifest as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"


def decode(text: bytes, where: str) -> Manifest:
    """Read a manifest, strictly.

    Raises:
        BundleError: not JSON, of another schema version, with unknown or missing keys, or with bad values.
    """
    try:
        version = json.loads(text)["schema_version"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BundleError(f"{where} is not a bundle manifest: expected JSON with a schema_version") from error
    if version != SCHEMA_VERSION:
        hint = "upgrade hypersd" if isinstance(version, int) and version > SCHEMA_VERSION else "export it again"
        raise BundleError(f"{where} has schema version {shown(version)}, this hypersd reads {SCHEMA_VERSION}: {hint}")
    try:
        return msgspec.json.decode(text, type=Manifest)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BundleError(f"{where} is not a valid manifest: {one_line(error)}; export the bundle again") from error
