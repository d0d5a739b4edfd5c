#!/usr/bin/env python
"""Print the least time that the stages of an image could take on a machine: their work, over the measured rates.

    python scripts/measure_floor.py bundles/NAME --steps 1 4 --dtype bfloat16

The count includes products, and of memory only the weights: no engine does without them. Two effects can beat a floor
all the same: convolutions by algorithms that multiply less (Winograd's), and weights that stay in a cache between runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from floor.graph_work import Work, graph_work
from floor.rates import DTYPES, Rates, machine_rates

from hypersd.engines import Bundle
from hypersd.engines.engine import TORCH_DTYPES
from hypersd.engines.specs import Component, Range, dim_range
from hypersd.families import find_family
from hypersd.runtime.params import Params, decide
from hypersd.tools.bench.protocol import DECODE, TEXT_ENCODERS, step_name


def main() -> None:
    """Measure the rates, count the work, print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--steps", type=int, nargs="+", help="default: the bundle's")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    bundle, rates = Bundle.load(args.bundle), machine_rates(args.device, args.dtype)
    shapes = bundle.manifest.shapes
    flops = f"{rates.flops_per_second / 1e12:.3f} TFLOP/s ({rates.library})"
    print(f"{flops}, {rates.bytes_per_second / 1e9:.1f} GB/s in {args.dtype}")
    for steps in args.steps or [bundle.manifest.sampler.num_inference_steps]:
        floor = image_floor(bundle, steps, shapes.height.opt, shapes.width.opt, 1, rates)
        stages = ", ".join(f"{stage} {seconds:.3f}" for stage, seconds in floor.items())
        print(f"{steps} step(s): {sum(floor.values()):.3f} s ({stages})")


def floor_seconds(work: Work, rates: Rates) -> float:
    """Computing and reading can overlap: the longer of the two."""
    return max(work.flops / rates.flops_per_second, work.weight_bytes / rates.bytes_per_second)


def image_floor(bundle: Bundle, steps: int, height: int, width: int, batch: int, rates: Rates) -> dict[str, float]:
    """Seconds by stage: ``text encoders``, ``step 1`` and so on, and ``decode``.

    A checkpoint with guidance takes two rows of the UNet for an image. The negative prompt is the same for all images
    and need not be encoded again.

    Args:
        bundle: whose graphs are counted.
        steps: how often the UNet runs.
        height: of the images, in pixels.
        width: likewise.
        batch: images, each of a prompt of its own.
        rates: of the machine; weights count in the narrower of their own type and that of the rates.

    Raises:
        BundleError: a graph's work cannot be counted.
        RequestError: the size is outside the bundle's range.
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

    encoders = find_family(manifest.family).encoder_names
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


if __name__ == "__main__":
    main()
