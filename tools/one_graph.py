"""The whole image as one ONNX graph: a bundle's networks, put together with what the runtime computes between them.

The sampler that is recorded in the graph is the runtime's own.
"""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from ..engines import Bundle, Manifest
from ..engines.bundle import write_manifest
from ..engines.component_names import one_graph_file
from ..engines.files import lock_file, sha256_file, write_whole
from ..engines.image_shapes import narrowed
from ..engines.manifest import Component, FileRecord, ImageShapes, OneGraph, Range
from ..engines.progress import BuildProgress, Silent, Stage
from ..errors import BundleError, RequestError
from ..export.check import check_types
from ..export.recipes import tool_versions
from ..runtime.params import Params, decide
from ..runtime.request import Request
from ..samplers import make_sampler
from ..samplers.loop import sample
from .one_graph_build import Composed, Sampling, compose

COMPOSER_VERSION = 1  # raise it when the same networks and settings make another graph


def add_one_graph(
    bundle: Bundle | str | Path,
    num_inference_steps: int | None = None,
    *,
    eta: float | None = None,
    height: int | None = None,
    width: int | None = None,
    batch: int | None = None,
    force: bool = False,
    progress: BuildProgress | None = None,
) -> Bundle:
    """Compose one graph of all that an image takes, and add it to a bundle.

    It reads the weights from the files of the separate networks, so that it takes about a megabyte. What is left out
    comes from the manifest, as in a call of the pipeline.

    Args:
        bundle: the bundle or its folder.
        num_inference_steps: of the sampler's schedule.
        eta: 0..1, stochasticity (DDIM's eta, TCD's gamma).
        height: in pixels, inside the bundle's range.
        width: likewise.
        batch: images per run, inside the bundle's range.
        force: allow numbers of steps that the checkpoint was not distilled for.
        progress: told what happens.

    Returns:
        The bundle with the graph; it has it already if it was composed from the same networks and settings.

    Raises:
        RequestError: an argument is out of range, or the bundle's images need guidance or ControlNets.
    """
    root, progress = bundle.root if isinstance(bundle, Bundle) else Path(bundle), progress or Silent()
    with lock_file(root, lambda: progress.note(f"waiting for another build in {root} to end")):
        bundle = Bundle.load(root)
        manifest = bundle.manifest
        check_can_compose(manifest.checkpoint, manifest.sampler.guidance_scale, list(manifest.controlnets))
        request = _request(manifest, num_inference_steps, eta, height, width, batch, force)
        name, key = one_graph_name(manifest, request), _key(manifest, request)
        if _is_there(bundle, name, key):
            progress.note(f"{name} is there already, composed from the same networks")
            return bundle
        with Stage(progress, f"{name}: compose"):
            return _add(bundle, name, key, request)


def check_can_compose(checkpoint: str, guidance_scale: float, controlnets: list[str]) -> None:
    """Refuse what a one-graph does not do.

    Raises:
        RequestError: guidance or ControlNets.
    """
    if guidance_scale > 1:
        raise RequestError(
            f"{checkpoint} draws with guidance {guidance_scale:g}, which a one-graph does not do: "
            "take a checkpoint without CFG in its name, or no one-graph"
        )
    if controlnets:
        raise RequestError(
            f"a one-graph takes no ControlNet, the bundle has {', '.join(controlnets)}: export one without"
        )


def one_graph_name(manifest: Manifest, request: Request) -> str:
    """What a one-graph is called: its steps, and of the other settings those that are not the bundle's usual ones."""
    shapes, steps = manifest.shapes, len(request.timesteps or ()) or request.num_inference_steps
    is_usual_size = (request.height, request.width) == (shapes.height.opt, shapes.width.opt)
    parts = [
        f"one-graph-{steps}step{'s' if steps != 1 else ''}",
        *([] if request.eta == manifest.sampler.eta else [f"eta{request.eta:g}"]),
        *([] if is_usual_size else [f"{request.width}x{request.height}"]),
        *([] if request.batch == shapes.batch.opt else [f"batch{request.batch}"]),
    ]
    return "-".join(parts)


def _request(
    manifest: Manifest,
    num_inference_steps: int | None,
    eta: float | None,
    height: int | None,
    width: int | None,
    batch: int | None,
    force: bool,
) -> Request:
    """The call that the graph will draw, checked as a pipeline's."""
    wide = manifest.shapes.batch
    batch = wide.opt if batch is None else batch
    if not wide.min <= batch <= wide.max:
        raise RequestError(f"batch {batch} is outside this bundle's {wide}: export one with --batch {batch}")
    params = Params(
        prompt="",
        num_inference_steps=num_inference_steps,
        eta=eta,
        height=height,
        width=width,
        num_images_per_prompt=batch,
        force=force,
    )
    return decide(manifest, params)


def _key(manifest: Manifest, request: Request) -> str:
    """The hash of all that the graph is composed from."""
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


def _is_there(bundle: Bundle, name: str, key: str) -> bool:
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
    composed = compose(bundle, narrowed(bundle.manifest, _fixed_shapes(request)), _sampling(bundle.manifest, request))
    path = bundle.root / one_graph_file(name)
    proto = composed.proto()
    check_types(proto, path)
    write_whole(path, proto.SerializeToString())
    record = FileRecord(size=path.stat().st_size, sha256=sha256_file(path))
    one_graph = OneGraph(
        network=_network(bundle, composed, path.name, key),
        num_inference_steps=request.num_inference_steps,
        timesteps=request.timesteps,
        eta=request.eta,
        batch=request.batch,
        height=request.height,
        width=request.width,
    )
    manifest = msgspec.structs.replace(
        bundle.manifest,
        one_graphs={**bundle.manifest.one_graphs, name: one_graph},
        files={**bundle.manifest.files, path.name: record},
    )
    write_manifest(bundle.root, manifest)
    return Bundle(bundle.root, manifest)


def _network(bundle: Bundle, composed: Composed, file: str, key: str) -> Component:
    return Component(inputs=composed.inputs, outputs=composed.outputs, files=(file, *composed.weight_files), key=key)


def _fixed_shapes(request: Request) -> ImageShapes:
    extents = {"batch": request.batch, "height": request.height, "width": request.width}
    return ImageShapes(**{name: Range(name=name, min=size, opt=size, max=size) for name, size in extents.items()})


def _sampling(manifest: Manifest, request: Request) -> Sampling:
    """The runtime's own sampler, which computes with whatever has a tensor's operators."""
    sampler = make_sampler(manifest.sampler.kind, **manifest.scheduler)
    plan = sampler.plan(request.num_inference_steps, request.timesteps, request.eta)
    run: Any = partial(sample, plan=plan)  # typed for tensors
    return Sampling(noisy=tuple(step.noisy for step in plan), sample=run)
