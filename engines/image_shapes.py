"""Parts of the shapes of a bundle's images, and the shapes of tensors that follow from them."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from ..errors import RequestError
from .manifest import Manifest
from .specs import ImageShapes, Range, TensorSpec, dim_range
from .vocabulary import DIMS

MOST_HALVINGS = 5  # of a latent's sides, on the way down a UNet: three in SD1.5's, two in SDXL's


def choose_shapes(manifest: Manifest, spans: Mapping[str, tuple[int, int, int]]) -> ImageShapes:
    """A part of a bundle's shapes.

    Args:
        manifest: the bundle's.
        spans: ``batch``, ``height`` and ``width`` as (min, opt, max); others keep the bundle's range.

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
    """The manifest narrowed to ``shapes``; the result has no engines unless the shapes are the bundle's.

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
            inputs=_narrowed_specs(component.inputs, extents),
            outputs=_narrowed_specs(component.outputs, extents),
        )
        for name, component in manifest.components.items()
    }
    return msgspec.structs.replace(manifest, shapes=shapes, components=components, one_graphs=one_graphs, engines={})


def _narrowed_specs(specs: Mapping[str, TensorSpec], extents: Mapping[str, Range]) -> dict[str, TensorSpec]:
    return {
        name: msgspec.structs.replace(
            spec, shape=tuple(_narrowed_dim(dim, spec.rows_per_image, extents) for dim in spec.shape)
        )
        for name, spec in specs.items()
    }


def _narrowed_dim(dim: int | Range, rows: int, extents: Mapping[str, Range]) -> int | Range:
    if isinstance(dim, int):
        return dim
    extent = extents.get(dim.name, dim)
    if dim.name == "batch":
        extent = Range(name=dim.name, min=extent.min, opt=rows * extent.opt, max=rows * extent.max)
    return extent.opt if extent.min == extent.max else extent


def extents_of(spec: TensorSpec) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """A tensor's smallest, usual and largest shape."""
    ranges = [dim_range(dim) for dim in spec.shape]
    return tuple(r.min for r in ranges), tuple(r.opt for r in ranges), tuple(r.max for r in ranges)
