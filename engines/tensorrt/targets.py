"""Names of targets and keys of plans."""

from __future__ import annotations

import hashlib
import json
import platform
import sys

import msgspec

from ..manifest import Manifest
from ..specs import Component, EngineTarget, Range
from .api import TITLES

BUILDER_VERSION = 2  # raise it when the builder makes a different plan from the same inputs


def this_platform(backend: str) -> str:
    """The platform tag of plans built on this machine: ``linux-x86_64``; RTX plans run on any system: ``x86_64``."""
    processor = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
    return processor if backend == "tensorrt-rtx" else f"{sys.platform}-{processor}"


def onnx_hash(manifest: Manifest, component: str) -> str:
    """The hash of a component's ONNX: of its graph and of its weights, from the manifest's records."""
    records = [manifest.files[file].sha256 for file in manifest.components[component].files]
    return hashlib.sha256("\n".join(records).encode()).hexdigest()


def target_name(target: EngineTarget, manifest: Manifest) -> str:
    """The folder's name: backend, version, platform, GPU, precision, shapes, options, and the hash of all its ONNX."""
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
        hashlib.sha256(onnx.encode()).hexdigest()[:8],
    ]
    return "_".join(parts)


def describe(target: EngineTarget) -> str:
    """A target for messages, such as ``TensorRT-RTX 1.7.1.116, portable, 1 x 1024 x 1024``."""
    gpus = f"compute capability {', '.join(target.compute_capabilities)}" if target.compute_capabilities else "portable"
    shapes = target.shapes
    words = [f"{TITLES[target.backend]} {target.version}", gpus, f"{shapes.batch} of {shapes.width} x {shapes.height}"]
    return ", ".join([*words, *(["without weights"] if target.stripped else [])])


def cost_of_ranges(target: EngineTarget) -> str | None:
    """A line on the speed that ranges of images cost, and how to build for one shape; None for one shape.

    Sources: ``IOptimizationProfile`` in TensorRT's Python API ("the lowest runtime for the optimum input tensor
    dimensions, and are valid for all"); "Dynamic Shape Specialization" in TensorRT-RTX' performance guide.
    """
    batch, height, width = target.shapes.extents
    ranges = [f"{extent.name} {extent}" for extent in (batch, height, width) if extent.min < extent.max]
    if not ranges:
        return None
    one = f"{width.opt}x{height.opt}"
    first = ", and each new shape is compiled at its first image" if target.backend == "tensorrt-rtx" else ""
    return (
        f"engines for ranges ({', '.join(ranges)}) are slower than for one shape: their kernels are chosen for {one} "
        f"and have to fit all{first}; `--batch {batch.opt} --size {one}` builds for one"
    )


def _span(extent: Range) -> str:
    return str(extent.opt) if extent.min == extent.max else f"{extent.min}-{extent.opt}-{extent.max}"


def plan_key(target: EngineTarget, component: Component, onnx: str) -> str:
    """The hash of everything that a plan is built from."""
    settings = {
        "builder": BUILDER_VERSION,
        **msgspec.to_builtins(msgspec.structs.replace(target, plans={})),
        "shapes": None,  # they are in the component's inputs; so two image sizes share the text encoders' plans
        "inputs": msgspec.to_builtins(component.inputs),
        "outputs": msgspec.to_builtins(component.outputs),
        "onnx": onnx,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
