"""The whole image as one ONNX graph, as an addition to a bundle.

The graph is put together from the bundle's components and from the runtime's own arithmetic between them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import msgspec

from ..engines import Bundle, Manifest
from ..engines.bundle import write_manifest
from ..engines.component_names import one_graph_file
from ..engines.files import lock_file, sha256_file, write_whole
from ..engines.manifest import FileRecord
from ..engines.progress import Progress, Silent, Stage
from ..engines.specs import Component, OneGraph
from ..errors import BundleError, RequestError
from ..export.check import check_types
from ..export.component_exports import tool_versions
from ..runtime.params import Params, decide
from ..runtime.request import Request
from .one_graph_build import compose

COMPOSER_VERSION = 1  # raise it when the same components and settings make another graph


def add_one_graph(bundle: Bundle | str | Path, params: Params, progress: Progress | None = None) -> Bundle:
    """Compose one graph of a whole image, and add it to a bundle.

    The graph reads its weights from the files of the components, so that it takes about a megabyte.

    Args:
        bundle: the bundle or its folder.
        params: steps, eta, size and number of images, which the graph fixes; its texts have no effect. As in a call of
            the pipeline the manifest has the defaults.
        progress: told what happens.

    Returns:
        The bundle with the graph. A graph of the same components and settings is not composed again.

    Raises:
        RequestError: a setting is out of range, or the bundle's images need guidance, ControlNets or a mask.
    """
    root, progress = bundle.root if isinstance(bundle, Bundle) else Path(bundle), progress or Silent()
    with lock_file(root, lambda: progress.note(f"waiting for another build in {root} to end")):
        bundle = Bundle.load(root)
        manifest = bundle.manifest
        check_can_compose(manifest.checkpoint, manifest.sampler.guidance_scale, list(manifest.controlnets))
        if manifest.is_inpainting:
            raise RequestError(
                f"{bundle.root} is made of a base for inpainting, {manifest.origin.base}, which a one-graph does not "
                "support: export a --base for text to image"
            )
        request, wide = decide(manifest, params), manifest.shapes.batch
        if not wide.min <= request.batch <= wide.max:
            raise RequestError(f"batch {request.batch} is outside this bundle's {wide}: export one with --batch")
        name, key = one_graph_name(manifest, request), _key(manifest, request)
        if _has(bundle, name, key):
            progress.note(f"{name} exists already, composed from the same components")
            return bundle
        with Stage(progress, f"{name}: compose"):
            return _add(bundle, name, key, request)


def check_can_compose(checkpoint: str, guidance_scale: float, controlnets: list[str]) -> None:
    """Reject checkpoints and bundles that a one-graph does not support.

    Raises:
        RequestError: guidance or ControlNets.
    """
    if guidance_scale > 1:
        raise RequestError(
            f"{checkpoint} uses guidance {guidance_scale:g}, which a one-graph does not support: "
            "choose a checkpoint without CFG in its name, or no one-graph"
        )
    if controlnets:
        raise RequestError(
            f"a one-graph supports no ControlNet, the bundle has {', '.join(controlnets)}: export one without"
        )


def one_graph_name(manifest: Manifest, request: Request) -> str:
    """The name of a one-graph: its steps, and the other settings that differ from the bundle's defaults."""
    shapes, steps = manifest.shapes, request.steps
    is_usual_size = (request.height, request.width) == (shapes.height.opt, shapes.width.opt)
    parts = [
        f"one-graph-{steps}step{'s' if steps != 1 else ''}",
        *([] if request.eta == manifest.sampler.eta else [f"eta{request.eta:g}"]),
        *([] if is_usual_size else [f"{request.width}x{request.height}"]),
        *([] if request.batch == shapes.batch.opt else [f"batch{request.batch}"]),
    ]
    return "-".join(parts)


def _key(manifest: Manifest, request: Request) -> str:
    """The hash of everything that determines the graph."""
    inputs = {
        "composer": COMPOSER_VERSION,
        "tools": tool_versions(),
        "components": {name: component.key for name, component in manifest.components.items()},
        "sampler": manifest.sampler.kind,
        "scheduler": manifest.scheduler,
        "scaling_factor": manifest.vae.scaling_factor,
        "settings": [request.num_inference_steps, request.timesteps, request.eta],
        "shapes": [request.batch, request.height, request.width],
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _has(bundle: Bundle, name: str, key: str) -> bool:
    """Whether the bundle has the graph, unaltered."""
    one_graph = bundle.manifest.one_graphs.get(name)
    if one_graph is None or one_graph.network.key != key:
        return False
    try:
        bundle.check_file(one_graph.network.onnx, hashes=True)
    except BundleError:
        return False
    return True


def _add(bundle: Bundle, name: str, key: str, request: Request) -> Bundle:
    composed = compose(bundle, request)
    path, proto = bundle.root / one_graph_file(name), composed.proto()
    check_types(proto, path)
    write_whole(path, proto.SerializeToString())
    files = (path.name, *composed.weight_files)
    one_graph = OneGraph(
        network=Component(inputs=composed.inputs, outputs=composed.outputs, files=files, key=key),
        num_inference_steps=request.num_inference_steps,
        timesteps=request.timesteps,
        eta=request.eta,
        batch=request.batch,
        height=request.height,
        width=request.width,
    )
    record = FileRecord(size=path.stat().st_size, sha256=sha256_file(path))
    manifest = msgspec.structs.replace(
        bundle.manifest,
        one_graphs={**bundle.manifest.one_graphs, name: one_graph},
        files={**bundle.manifest.files, path.name: record},
    )
    write_manifest(bundle.root, manifest)
    return Bundle(bundle.root, manifest)
