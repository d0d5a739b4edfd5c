"""What a TensorRT plan was built for: its key, the folder of its target, and its inputs' and outputs' shapes."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Mapping

import msgspec

from ...errors import RequestError
from ..manifest import Component, EngineTarget, ImageShapes, Manifest, Range, TensorSpec, dim_range
from .api import TITLES

BUILDER_VERSION = 1  # raise it when the builder makes another plan from the same inputs
DIMS = ("batch", "height", "width")
MOST_HALVINGS = 5  # of a latent's sides, on the way down a UNet: three in SD1.5's, two in SDXL's


def this_platform(backend: str) -> str:
    """Where a flavour's plans run that are built here: ``linux-x86_64``; those of RTX on any system, ``x86_64``."""
    processor = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
    return processor if backend == "tensorrt-rtx" else f"{sys.platform}-{processor}"


def onnx_hash(manifest: Manifest, component: str) -> str:
    """The hash of a component's ONNX: of its graph and of its weights, from the manifest's records."""
    records = [manifest.files[file].sha256 for file in manifest.components[component].files]
    return hashlib.sha256("\n".join(records).encode()).hexdigest()


def target_name(target: EngineTarget, manifest: Manifest) -> str:
    """The folder's name: flavour, version, platform, GPU, precision, shapes, options, and the hash of all its ONNX."""
    onnx = "\n".join(f"{name} {onnx_hash(manifest, name)}" for name in sorted(manifest.components))
    shapes = target.shapes
    parts = [
        f"{target.backend}-{target.version}",
        target.platform,
        "sm" + "-".join(c.replace(".", "") for c in target.compute_capabilities)
        if target.compute_capabilities
        else "portable",
        target.precision,
        *(f"{name}{_span(extent)}" for name, extent in zip("bhw", shapes.extents, strict=True)),
        *([] if target.optimization_level is None else [f"level{target.optimization_level}"]),
        *(["stripped"] if target.stripped else []),
        *(["refittable"] if target.refittable else []),
        hashlib.sha256(onnx.encode()).hexdigest()[:8],
    ]
    return "_".join(parts)


def describe(target: EngineTarget) -> str:
    """A target in words, such as ``TensorRT-RTX 1.7.1.116, portable, 1 x 1024 x 1024``."""
    gpus = f"compute capability {', '.join(target.compute_capabilities)}" if target.compute_capabilities else "portable"
    shapes = target.shapes
    words = [f"{TITLES[target.backend]} {target.version}", gpus, f"{shapes.batch} of {shapes.width} x {shapes.height}"]
    return ", ".join([*words, *(["without weights"] if target.stripped else [])])


def _span(extent: Range) -> str:
    return str(extent.opt) if extent.min == extent.max else f"{extent.min}-{extent.opt}-{extent.max}"


def plan_key(target: EngineTarget, component: Component, onnx: str) -> str:
    """The hash of all that a plan is built from."""
    settings = {
        "builder": BUILDER_VERSION,
        **msgspec.to_builtins(msgspec.structs.replace(target, plans={})),
        "shapes": None,  # the component's inputs say it; two sizes of image share the text encoders
        "inputs": msgspec.to_builtins(component.inputs),
        "outputs": msgspec.to_builtins(component.outputs),
        "onnx": onnx,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def choose_shapes(manifest: Manifest, spans: Mapping[str, tuple[int, int, int]]) -> ImageShapes:
    """A part of a bundle's shapes.

    Args:
        manifest: the bundle's.
        spans: ``batch``, ``height`` and ``width`` as (min, opt, max); what is not named keeps the bundle's range.

    Raises:
        RequestError: a span is out of order or outside the bundle's, or a side is not a multiple of 8.
    """
    if unknown := sorted(spans.keys() - set(DIMS)):
        raise RequestError(f"dimension {unknown[0]!r} is not known: expected {', '.join(DIMS)}")
    extents = {name: getattr(manifest.shapes, name) for name in DIMS}
    return ImageShapes(**extents | {name: _part(extents[name], span, manifest) for name, span in spans.items()})


def _part(wide: Range, span: tuple[int, int, int], manifest: Manifest) -> Range:
    name, (low, usual, high) = wide.name, span
    multiple = 1 if name == "batch" else manifest.vae.spatial
    for extent in span:
        if not wide.min <= extent <= wide.max:
            raise RequestError(f"{name} {extent} is outside this bundle's {wide}: export one with --dynamic")
        if extent % multiple:
            nearest = max(wide.min, extent // multiple * multiple)
            raise RequestError(f"{name} {extent} is not a multiple of {multiple}: take {nearest}")
    if not low <= usual <= high:
        raise RequestError(f"{name} {low}:{usual}:{high}: expected MIN <= OPT <= MAX")
    return Range(name=name, min=low, opt=usual, max=high)


def narrowed(manifest: Manifest, shapes: ImageShapes) -> Manifest:
    """The manifest of a bundle that is made for ``shapes`` alone; a smaller one has no engines.

    Raises:
        RequestError: the shapes reach outside the bundle's, or a side is not a multiple of 8.
    """
    spans = {name: getattr(shapes, name) for name in DIMS}
    if shapes == manifest.shapes:
        return manifest
    shapes = choose_shapes(manifest, {name: (span.min, span.opt, span.max) for name, span in spans.items()})
    latents = [getattr(shapes, side).divided(manifest.vae.spatial, f"latent_{side}") for side in ("height", "width")]
    halved = [side.halved(times) for side in latents for times in range(MOST_HALVINGS + 1)]
    extents = {extent.name: extent for extent in (*shapes.extents, *halved)}
    one_graphs = {
        name: one_graph
        for name, one_graph in manifest.one_graphs.items()
        if all(span.min <= extent <= span.max for extent, span in zip(one_graph.extents, shapes.extents, strict=True))
    }
    components = {
        name: msgspec.structs.replace(
            component,
            inputs=_narrowed_specs(component.inputs, manifest.shapes, extents),
            outputs=_narrowed_specs(component.outputs, manifest.shapes, extents),
        )
        for name, component in manifest.components.items()
    }
    return msgspec.structs.replace(manifest, shapes=shapes, components=components, one_graphs=one_graphs, engines={})


def _narrowed_specs(
    specs: Mapping[str, TensorSpec], wide: ImageShapes, extents: Mapping[str, Range]
) -> dict[str, TensorSpec]:
    return {
        name: msgspec.structs.replace(spec, shape=tuple(_narrowed_dim(dim, wide, extents) for dim in spec.shape))
        for name, spec in specs.items()
    }


def _narrowed_dim(dim: int | Range, wide: ImageShapes, extents: Mapping[str, Range]) -> int | Range:
    if isinstance(dim, int):
        return dim
    extent = extents.get(dim.name, dim)
    if dim.name == "batch" and (copies := dim.max // wide.batch.max) > 1:  # guidance doubles the UNet's rows
        extent = Range(name=dim.name, min=extent.min, opt=copies * extent.opt, max=copies * extent.max)
    return extent.opt if extent.min == extent.max else extent


def extents_of(spec: TensorSpec) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """A tensor's smallest, usual and largest shape."""
    ranges = [dim_range(dim) for dim in spec.shape]
    return tuple(r.min for r in ranges), tuple(r.opt for r in ranges), tuple(r.max for r in ranges)
