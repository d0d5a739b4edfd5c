"""The least time that an image's stages could take on a machine: their work, over the rates that it reaches.

Only products are counted, and of memory only the weights: no engine does without them. Two things can beat a floor all
the same: convolutions by algorithms that multiply less (Winograd's), and weights that stay in a cache between runs.
"""

from __future__ import annotations

from pathlib import Path

from ...engines import Bundle
from ...engines.engine import TORCH_DTYPES
from ...engines.manifest import Component, Range, dim_range
from ...runtime.params import Params, decide
from ...runtime.text import ENCODERS
from .drawing import DECODE, TEXT_ENCODERS, step_name
from .graph_work import Work, graph_work
from .rates import Rates, machine_rates

__all__ = ["Rates", "Work", "floor_seconds", "graph_work", "image_floor", "machine_rates"]


def floor_seconds(work: Work, rates: Rates) -> float:
    """Computing and reading can overlap: the longer of the two."""
    return max(work.flops / rates.flops_per_second, work.weight_bytes / rates.bytes_per_second)


def image_floor(bundle: Bundle, steps: int, height: int, width: int, batch: int, rates: Rates) -> dict[str, float]:
    """Seconds by stage: ``text encoders``, ``step 1`` and so on, and ``decode``.

    A checkpoint that draws with guidance takes two rows of the UNet for an image. The text of what to keep away from
    is the same for all images and need not be encoded again.

    Args:
        bundle: whose graphs are counted.
        steps: how often the UNet runs.
        height: of the images, in pixels.
        width: likewise.
        batch: images, each of a prompt of its own.
        rates: of the machine; weights count in the narrower of their own type and that of the rates.

    Raises:
        BundleError: a graph's work cannot be told.
        RequestError: the bundle does not draw that size.
    """
    manifest = bundle.manifest
    request = decide(manifest, Params(prompt="", height=height, width=width))
    height, width = request.height, request.width
    scale = manifest.vae.spatial
    extents = {
        "height": height,
        "width": width,
        "latent_height": height // scale,
        "latent_width": width // scale,
    }

    def seconds(name: str, rows: int) -> float:
        component = bundle.component(name)
        work = _component_work(bundle.path(component.onnx), component, rows, extents)
        return floor_seconds(_as_computed(work, component, rates), rates)

    encoders = [name for name in ENCODERS.values() if name in manifest.components]
    step = seconds("unet", batch * (2 if manifest.sampler.guidance_scale > 1 else 1))
    return {
        TEXT_ENCODERS: sum(seconds(name, batch) for name in encoders),
        **{step_name(i): step for i in range(1, steps + 1)},
        DECODE: seconds("vae_decoder", batch),
    }


def _component_work(path: Path, component: Component, rows: int, extents: dict[str, int]) -> Work:
    """Of any number of rows, also of a graph that takes fewer at a time; the weights are read once."""
    batch = dim_range(next(iter(component.outputs.values())).shape[0])
    at_once = max(batch.min, min(rows, batch.max))
    known = {**extents, batch.name: at_once}
    named = {dim for spec in component.inputs.values() for dim in spec.shape if isinstance(dim, Range)}
    work = graph_work(path, {dim.name: dim.extent(known) or dim.opt for dim in named})
    return Work(work.flops * rows // at_once, work.weight_bytes)


def _as_computed(work: Work, component: Component, rates: Rates) -> Work:
    """The same work with weights in the type that is computed in, if that is narrower than their own."""
    own = TORCH_DTYPES[next(iter(component.outputs.values())).dtype].itemsize
    return Work(work.flops, work.weight_bytes * min(own, rates.itemsize or own) // own)
