"""What a bundle says of itself: the schema of ``bundle.json``, its reading and its writing."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

import msgspec

from ..errors import BundleError, one_line
from .component_names import (
    check_controlnet_name,
    check_one_graph_name,
    cond_embedding,
    controlnet,
    one_graph_file,
    residual_input,
)
from .precision import PrecisionName
from .vocabulary import OPTIMIZATION_LEVELS, SHA256, Preprocess, TensorRTBackend

SCHEMA_VERSION = 2
MANIFEST_NAME = "bundle.json"
ENGINES_FOLDER = "engines"
HALVED = re.compile(r"(\w+)_div([1-9]\d{0,2})", re.ASCII)  # a dimension's name: what it is a part of, and the divisor

DType = Literal["float32", "float16", "int64", "uint8"]
Sha256 = Annotated[str, msgspec.Meta(pattern=rf"^{SHA256}\Z")]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Size = Annotated[int, msgspec.Meta(ge=0)]
LARGEST_SCALE = 10.0  # of a ControlNet's residuals; diffusers has no limit, people use up to 2
ConditioningScale = Annotated[float, msgspec.Meta(ge=0, le=LARGEST_SCALE)]
OptimizationLevel = Annotated[int, msgspec.Meta(ge=OPTIMIZATION_LEVELS[0], le=OPTIMIZATION_LEVELS[-1])]


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Immutable, and nothing in the file that the schema does not know."""


class Range(_Record, frozen=True, kw_only=True):
    """A dimension that may vary: its smallest, its usual and its largest extent."""

    name: str
    min: Positive
    opt: Positive
    max: Positive

    def __post_init__(self) -> None:
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"{self.name}: expected min <= opt <= max, got {self.min}, {self.opt}, {self.max}")

    def __str__(self) -> str:
        return str(self.opt) if self.min == self.max else f"{self.min}..{self.max}"

    def divided(self, factor: int, name: str) -> Range:
        """The range of a dimension that is a ``factor``-th of this one, as latents are of pixels."""
        return Range(name=name, min=self.min // factor, opt=self.opt // factor, max=self.max // factor)

    def halved(self, times: int) -> Range:
        """This dimension after so many convolutions of stride 2, each of which rounds up: ``latent_height_div4``."""
        divisor = 2**times
        name = f"{self.name}_div{divisor}" if times else self.name
        return Range(name=name, min=-(-self.min // divisor), opt=-(-self.opt // divisor), max=-(-self.max // divisor))

    @property
    def is_halved(self) -> bool:
        """Whether it follows from another dimension, as :meth:`halved` makes it."""
        return HALVED.fullmatch(self.name) is not None

    def extent(self, extents: Mapping[str, int]) -> int | None:
        """What it is where some dimensions' extents are known by name; None if it does not follow from them."""
        if self.name in extents:
            return extents[self.name]
        halved = HALVED.fullmatch(self.name)
        if halved is None or halved[1] not in extents:
            return None
        return -(-extents[halved[1]] // int(halved[2]))


Dim = Positive | Range


def dim_range(dim: int | Range) -> Range:
    """Any dimension as a range; a fixed one has three equal ends."""
    return dim if isinstance(dim, Range) else Range(name="fixed", min=dim, opt=dim, max=dim)


class TensorSpec(_Record, frozen=True, kw_only=True):
    """Name apart, all that an engine promises of one input or output.

    ``rows_per_image`` is how many rows of a first axis named ``batch`` an image may take: 2 under guidance.
    """

    dtype: DType
    shape: tuple[Dim, ...]
    rows_per_image: Positive = 1

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(str(dim) for dim in self.shape)}]"

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of ``shape`` lies inside every range."""
        if len(shape) != len(self.shape):
            return False
        for dim, extent in zip(self.shape, shape, strict=True):  # at every run of an engine: nothing is made here
            if not (dim == extent if isinstance(dim, int) else dim.min <= extent <= dim.max):
                return False
        return True

    def extents(self, shape: Sequence[int]) -> dict[str, int]:
        """What the dimensions that vary are in a tensor of ``shape``, by name."""
        pairs = zip(self.shape, shape, strict=False)  # a tensor that does not fit, the engine refuses
        return {dim.name: extent for dim, extent in pairs if not isinstance(dim, int)}

    def shape_at(self, extents: Mapping[str, int]) -> tuple[int, ...]:
        """The shape where these dimensions are known; others have their usual extent."""
        return tuple(dim if isinstance(dim, int) else dim.extent(extents) or dim.opt for dim in self.shape)


class Component(_Record, frozen=True, kw_only=True):
    """One network of the bundle.

    ``key`` is the hash of all that its ONNX file was made from: two components of one key are interchangeable.
    """

    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    files: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    key: Sha256

    def __post_init__(self) -> None:
        if len(set(self.files)) != len(self.files):
            raise ValueError(f"files named twice: {', '.join(self.files)}")

    @property
    def onnx(self) -> str:
        """The ONNX file, relative to the bundle; the other files are its external data."""
        return self.files[0]


class FileRecord(_Record, frozen=True, kw_only=True):
    """A file of the bundle, as it was written."""

    size: Size
    sha256: Sha256


class SourceFile(_Record, frozen=True, kw_only=True):
    """A weight file that the bundle was made from.

    ``repo`` is its Hub repository or demonstration folder, ``path`` its place on the exporting machine if it has none.
    """

    filename: str
    size: Size
    sha256: Sha256
    repo: str | None = None
    revision: str | None = None
    path: str | None = None


class ControlNetOrigin(_Record, frozen=True, kw_only=True):
    """Where a ControlNet came from: a Hub repository, a folder or a demonstration folder; ``revision`` its commit."""

    location: str
    revision: str | None = None


class Origin(_Record, frozen=True, kw_only=True):
    """Where the parts came from, enough to load them again with diffusers (``hypersd verify``).

    Attributes:
        base: a Hub repository, a folder in diffusers layout, a demonstration folder or a single-file checkpoint.
        revision: the commit of ``base`` if it is on the Hub.
        variant: ``"fp16"`` if the half-precision weight files were taken.
        vae: where the VAE was taken from if not from ``base``.
        lora_scale: what the LoRA was scaled with before it was fused; None without a LoRA.
        controlnets: where each ControlNet came from, by its name.
        weights: for each component the files that its weights came from.
    """

    base: str
    revision: str | None = None
    variant: str | None = None
    vae: str | None = None
    vae_revision: str | None = None
    lora_scale: float | None = None
    controlnets: dict[str, ControlNetOrigin] = msgspec.field(default_factory=dict)
    weights: dict[str, tuple[SourceFile, ...]]


class SamplerSettings(_Record, frozen=True, kw_only=True):
    """The sampler and its recommended settings, the defaults of a call; ``kind`` is the sampler's name."""

    kind: str
    num_inference_steps: Positive
    allowed_steps: tuple[Positive, ...]
    timesteps: tuple[Size, ...] | None = None
    eta: float
    guidance_scale: float


class VaeSettings(_Record, frozen=True, kw_only=True):
    """``scaling_factor`` divides the latents before they are decoded; ``spatial`` is pixels per latent."""

    scaling_factor: float
    spatial: Positive = 8
    latent_channels: Positive = 4
    tiny: bool = False


class ControlNetSettings(_Record, frozen=True, kw_only=True):
    """How a ControlNet wants to be used; what a call leaves out comes from here.

    ``preprocess`` is what makes its control image from a photograph or a drawing.
    """

    conditioning_scale: ConditioningScale = 1.0
    preprocess: Preprocess = "none"


class ImageShapes(_Record, frozen=True, kw_only=True):
    """Images per call of a network, and their size in pixels."""

    batch: Range
    height: Range
    width: Range

    @property
    def extents(self) -> tuple[Range, Range, Range]:
        return self.batch, self.height, self.width


class OneGraph(_Record, frozen=True, kw_only=True):
    """The whole image as one network, for settings that are fixed: tokens and noise in, finished pixels out.

    Attributes:
        network: its tensors and files: its graph, and then the files of the components' weights, which it reads.
        num_inference_steps: None with ``timesteps``, and the other way round.
        timesteps: custom ones.
        eta: 0..1, stochasticity (DDIM's eta, TCD's gamma).
        batch: images per run.
        height: in pixels.
        width: in pixels.
    """

    network: Component
    num_inference_steps: Positive | None = None
    timesteps: tuple[Size, ...] | None = None
    eta: Annotated[float, msgspec.Meta(ge=0, le=1)]
    batch: Positive
    height: Positive
    width: Positive

    def __post_init__(self) -> None:
        if (self.num_inference_steps is None) == (not self.timesteps):
            raise ValueError("a one-graph has either num_inference_steps or timesteps")

    @property
    def steps(self) -> int:
        """How often the UNet is in it."""
        return len(self.timesteps) if self.timesteps else self.num_inference_steps or 0

    @property
    def extents(self) -> tuple[int, int, int]:
        """As those of :class:`ImageShapes`: images, height and width."""
        return self.batch, self.height, self.width


class Plan(_Record, frozen=True, kw_only=True):
    """One component as TensorRT built it.

    Attributes:
        file: the plan, relative to the bundle.
        onnx: hash of the component's files that it was built from.
        key: hash of all that it was built from, options included: plans of one key are interchangeable.
        seconds: what the build took.
        host_memory: largest resident size of the building process, in bytes.
        weights_memory: device memory that the weights take, in bytes, as TensorRT reported it.
        activation_memory: device memory that a run takes besides, in bytes, at the largest shapes.
        decomposed_attention: attention nodes for which TensorRT has no fused kernel and that became plain ones.
        error: largest difference from ONNX Runtime, as a part of its largest value; None where the plan was built
            on a machine that cannot run it.
    """

    file: str
    onnx: Sha256
    key: Sha256
    seconds: float
    host_memory: Size
    weights_memory: Size | None = None
    activation_memory: Size | None = None
    decomposed_attention: tuple[str, ...] = ()
    error: float | None = None


class EngineTarget(_Record, frozen=True, kw_only=True):
    """Plans that run on the same machines, and all that decides which those are.

    Attributes:
        backend: ``"tensorrt"`` or ``"tensorrt-rtx"``.
        version: its version; a plan runs on no other.
        compute_capabilities: GPUs such as ``"8.9"``; none for a portable target, which RTX compiles when it is loaded.
        platform: operating system and processor, such as ``"linux-x86_64"``; the processor alone for RTX.
        precision: the bundle's.
        shapes: images that the plans are built for, the bundle's or a part of them.
        optimization_level: TensorRT's, 0 to 5; None for its default.
        stripped: the plans hold no weights; they are taken from the ONNX files when a plan is loaded.
        plans: by component.
    """

    backend: TensorRTBackend
    version: str
    compute_capabilities: tuple[str, ...]
    platform: str
    precision: PrecisionName
    shapes: ImageShapes
    optimization_level: OptimizationLevel | None = None
    stripped: bool = False
    plans: dict[str, Plan]


class Manifest(_Record, frozen=True, kw_only=True):
    """The whole of ``bundle.json``.

    ``random_weights`` says that the weights are not the checkpoint's: such a bundle is for measurements.
    """

    schema_version: Literal[2] = SCHEMA_VERSION
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
        for name in self.controlnets:
            self._check_controlnet(name)
        for name, one_graph in self.one_graphs.items():
            self._check_one_graph(name, one_graph)
        for name, target in self.engines.items():
            self._check_target(name, target)

    def _check_controlnet(self, name: str) -> None:
        """A ControlNet is two networks, and a UNet that takes what they make."""
        check_controlnet_name(name)
        needed = {controlnet(name), cond_embedding(name), "unet"}
        if absent := sorted(needed - self.components.keys()):
            raise ValueError(f"ControlNet {name} without its {' and '.join(absent)}")
        made = {residual_input(output) for output in self.components[controlnet(name)].outputs}
        if lost := sorted(made - self.components["unet"].inputs.keys()):
            raise ValueError(f"ControlNet {name} makes what the UNet does not take: {', '.join(lost)}")

    def _check_one_graph(self, name: str, one_graph: OneGraph) -> None:
        """A one-graph is a file of its own, and otherwise made of the components' files."""
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
        """A target is one folder of plans, and of nothing else: commands delete it."""
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
    """Refuse a file name that could lead out of the bundle's folder, on any system."""
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
        raise BundleError(f"{where} has schema version {version!r}, this hypersd reads {SCHEMA_VERSION}: {hint}")
    try:
        return msgspec.json.decode(text, type=Manifest)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BundleError(f"{where} is not a valid manifest: {one_line(error)}; export the bundle again") from error
