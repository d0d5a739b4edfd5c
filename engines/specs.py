"""Types of the manifest that describe tensors, components and the plans built from them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import msgspec

from .precision import PrecisionName
from .vocabulary import OPTIMIZATION_LEVELS, SHA256, TensorRTBackend

HALVED = re.compile(r"(\w+)_div([1-9]\d{0,2})", re.ASCII)  # a dimension's name: the whole dimension and the divisor
DType = Literal["float32", "float16", "int64", "uint8"]
Sha256 = Annotated[str, msgspec.Meta(pattern=rf"^{SHA256}\Z")]
LARGEST_SIDE, LARGEST_BATCH = 4096, 64  # pixels and images of a bundle
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
Size = Annotated[int, msgspec.Meta(ge=0, le=2**53)]  # bytes; larger integers are not exact in every reader of JSON
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
OptimizationLevel = Annotated[int, msgspec.Meta(ge=OPTIMIZATION_LEVELS[0], le=OPTIMIZATION_LEVELS[-1])]


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all parts of the manifest: immutable, and unknown fields are rejected."""


class Range(Record, frozen=True, kw_only=True):
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
        """Whether it was made by :meth:`halved`, so that it follows from another dimension."""
        return self.base != self.name

    @property
    def base(self) -> str:
        """The name of the dimension that this one follows: its own, unless it was made by :meth:`halved`."""
        halved = HALVED.fullmatch(self.name)
        return self.name if halved is None else halved[1]

    def extent(self, extents: Mapping[str, int]) -> int | None:
        """Its extent where some dimensions' extents are known by name; None if it does not follow from them."""
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


class TensorSpec(Record, frozen=True, kw_only=True):
    """Type and shape of one input or output of an engine.

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
        for dim, extent in zip(self.shape, shape, strict=True):  # called at every run: it allocates nothing
            if not (dim == extent if isinstance(dim, int) else dim.min <= extent <= dim.max):
                return False
        return True

    def extents(self, shape: Sequence[int]) -> dict[str, int]:
        """The extents of the varying dimensions, by name, in a tensor of ``shape``."""
        pairs = zip(self.shape, shape, strict=False)  # the engine rejects a tensor that does not fit
        return {dim.name: extent for dim, extent in pairs if not isinstance(dim, int)}

    def shape_at(self, extents: Mapping[str, int]) -> tuple[int, ...]:
        """The shape where these dimensions are known; others have their usual extent."""
        return tuple(dim if isinstance(dim, int) else dim.extent(extents) or dim.opt for dim in self.shape)


class Component(Record, frozen=True, kw_only=True):
    """One component of the bundle.

    ``key`` is the hash of everything that its ONNX file was made from: components of one key are interchangeable.
    ``graph`` is the hash of that without the weights: components of one graph differ in nothing else.
    """

    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    files: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    key: Sha256
    graph: Sha256 | None = None

    def __post_init__(self) -> None:
        if len(set(self.files)) != len(self.files):
            raise ValueError(f"files named twice: {', '.join(self.files)}")

    @property
    def onnx(self) -> str:
        """The ONNX file, relative to the bundle; the other files are its external data."""
        return self.files[0]


class ImageShapes(Record, frozen=True, kw_only=True):
    """Images per call of a component, and their size in pixels."""

    batch: Range
    height: Range
    width: Range

    def __post_init__(self) -> None:
        for extent, largest in zip(self.extents, (LARGEST_BATCH, LARGEST_SIDE, LARGEST_SIDE), strict=True):
            if extent.max > largest:
                raise ValueError(f"{extent.name} up to {extent.max}: expected at most {largest}")

    @property
    def extents(self) -> tuple[Range, Range, Range]:
        return self.batch, self.height, self.width


class OneGraph(Record, frozen=True, kw_only=True):
    """The whole image as one graph, for fixed settings: tokens and noise in, finished pixels out.

    Attributes:
        network: its tensors and files: the graph, and the files of the components' weights, which it reads.
        num_inference_steps: number of steps; None with ``timesteps``.
        timesteps: custom timesteps; None with ``num_inference_steps``.
        eta: 0..1, stochasticity (DDIM's eta, TCD's gamma).
        batch: images per run.
        height: in pixels.
        width: in pixels.
    """

    network: Component
    num_inference_steps: Positive | None = None
    timesteps: tuple[Size, ...] | None = None
    eta: Share
    batch: Positive
    height: Positive
    width: Positive

    def __post_init__(self) -> None:
        if (self.num_inference_steps is None) == (not self.timesteps):
            raise ValueError("a one-graph has either num_inference_steps or timesteps")

    @property
    def steps(self) -> int:
        """The number of steps, each of which contains the UNet."""
        return len(self.timesteps) if self.timesteps else self.num_inference_steps or 0

    @property
    def extents(self) -> tuple[int, int, int]:
        """Images, height and width, as in :class:`ImageShapes`."""
        return self.batch, self.height, self.width


class Plan(Record, frozen=True, kw_only=True):
    """A TensorRT plan of one component.

    Attributes:
        file: the plan, relative to the bundle.
        onnx: hash of the component's files that it was built from.
        key: hash of everything that it was built from, options included: plans of one key are interchangeable.
        seconds: duration of the build.
        host_memory: largest resident size of the building process, in bytes.
        weights_memory: device memory that the weights take, in bytes, as TensorRT reported it.
        activation_memory: device memory that a run takes in addition, in bytes, at the largest shapes.
        decomposed_attention: attention nodes built from plain layers, because TensorRT has no fused kernel for them.
        error: maximum error relative to ONNX Runtime's largest value; None if the plan was built on a machine that
            cannot run it.
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


class EngineTarget(Record, frozen=True, kw_only=True):
    """Plans that run on the same machines, and the properties that decide which machines.

    Attributes:
        backend: ``"tensorrt"`` or ``"tensorrt-rtx"``.
        version: the backend's version; a plan runs on no other.
        compute_capabilities: GPUs such as ``"8.9"``; empty for a portable target, which RTX compiles when it is loaded.
        platform: operating system and processor, such as ``"linux-x86_64"``; the processor alone for RTX.
        precision: the bundle's.
        shapes: images that the plans are built for: the bundle's shapes or a part of them.
        optimization_level: TensorRT's, 0 to 5; None for its default.
        stripped: the plans hold no weights; a load takes them from the ONNX files.
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
