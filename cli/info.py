"""What is in a bundle: settings, networks with inputs and outputs, sizes, TensorRT engines.

Engines come in targets: one engine for every network, for one version of TensorRT, kind of GPU and range of pictures.
It says of each target whether it runs on this machine, and if not, why. `hypersd generate --target` takes its name.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..engines import Bundle
    from ..engines.manifest import EngineTarget

FACT_WIDTH, TARGET_WIDTH = 18, 26  # columns that a table of targets takes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which bundle."""
    parser.add_argument("bundle", type=Path, help="the folder that `hypersd export` wrote")
    parser.add_argument("--hashes", action="store_true", help="read every file and compare its SHA-256")


def run(args: argparse.Namespace) -> None:
    """Print what the manifest says, after checking the files against it."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from ..engines.bundle import Bundle
    from .console import out

    bundle = Bundle.load(args.bundle, hashes=args.hashes)
    manifest, console = bundle.manifest, out()
    facts = Table(box=None, show_header=False, pad_edge=False)
    for name, value in _facts(bundle).items():
        facts.add_row(name, Text(value))  # not markup, whatever brackets a path has
    console.print(facts)
    networks = Table(box=box.SIMPLE_HEAD)
    for heading in ("network", "MB", "inputs", "outputs"):
        networks.add_column(heading, justify="right" if heading == "MB" else "left")
    for name, component in manifest.components.items():
        size = sum(manifest.files[file].size for file in component.files)
        networks.add_row(
            name,
            f"{size / 1e6:,.1f}",
            "\n".join(f"{key} {spec}" for key, spec in component.inputs.items()),
            "\n".join(f"{key} {spec}" for key, spec in component.outputs.items()),
        )
    console.print(networks)
    if manifest.engines:
        _print_targets(bundle, console)
    else:
        line = f"no TensorRT engines: hypersd build {bundle.root} makes some"
        console.print(line, markup=False, soft_wrap=True)
    checked = "sizes and SHA-256" if args.hashes else "sizes"
    hint = "" if args.hashes else " (--hashes checks contents)"
    console.print(f"{checked} of {_checked_files(bundle)} are as written{hint}", markup=False)


def _checked_files(bundle: Bundle) -> str:
    """Plans may be missing from a bundle that is whole without them."""
    plans = [plan for target in bundle.manifest.engines.values() for plan in target.plans.values()]
    if broken := sum(not bundle.is_whole(plan) for plan in plans):
        return f"all files but {broken} engine{'s' if broken > 1 else ''}"
    return "all files"


def _print_targets(bundle: Bundle, console: Console) -> None:
    """Tables of the targets, one a column, and then their names and why they do not run here, which are long."""
    from ..engines.load import why_not
    from ..engines.tensorrt.machine import this_machine

    machine, targets = this_machine(), bundle.manifest.engines
    reasons = {name: why_not(bundle, name, machine) for name in targets}
    columns = [_target_facts(bundle, name, "no" if reasons[name] else "yes") for name in targets]
    abreast = max(1, (console.width - FACT_WIDTH) // TARGET_WIDTH)
    for first in range(0, len(columns), abreast):
        console.print(_target_table(columns[first : first + abreast], first + 1))
    for i, (name, reason) in enumerate(reasons.items(), 1):
        why = f"\n   does not run here: {reason}" if reason else ""
        console.print(f"{i}  {name}{why}", markup=False, soft_wrap=True)
    console.print()


def _target_table(columns: list[dict[str, str]], number: int) -> Table:
    """Targets side by side, numbered from ``number``."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table("target", *(str(number + i) for i in range(len(columns))), box=box.SIMPLE_HEAD)
    for fact in columns[0]:
        table.add_row(fact, *(Text(column[fact]) for column in columns))
    return table


def _target_facts(bundle: Bundle, name: str, runs_here: str) -> dict[str, str]:
    from ..engines.tensorrt.api import TITLES
    from ..engines.tensorrt.machine import memory_needed

    target = bundle.manifest.engines[name]
    shapes, is_whole = target.shapes, len(target.plans) == len(bundle.manifest.components)
    memory = memory_needed(target) if is_whole else None
    size = sum(bundle.manifest.files[plan.file].size for plan in target.plans.values())
    return {
        "built for": f"{TITLES[target.backend]} {target.version}",
        "GPUs": ", ".join(target.compute_capabilities) or "portable",
        "pictures": f"{shapes.batch} of {shapes.width} x {shapes.height}",
        "networks": f"{len(target.plans)} of {len(bundle.manifest.components)}",
        "options": _target_options(target),
        "size": f"{size / 1e6:,.1f} MB",
        "device memory": "unknown" if memory is None else f"{memory / 1e6:,.1f} MB",
        "built in": f"{sum(plan.seconds for plan in target.plans.values()):,.1f} s",
        "runs here": runs_here,
    }


def _target_options(target: EngineTarget) -> str:
    level = target.optimization_level
    words = [
        *([] if level is None else [f"optimization level {level}"]),
        *(["weights from the ONNX files"] if target.stripped else []),
        *(["refittable"] if target.refittable else []),
    ]
    return ", ".join(words) or "none"


def _facts(bundle: Bundle) -> dict[str, str]:
    manifest = bundle.manifest
    sampler, origin, shapes = manifest.sampler, manifest.origin, manifest.shapes
    weights = sum(manifest.files[file].size for c in manifest.components.values() for file in c.files)
    steps = ", ".join(map(str, sorted(sampler.allowed_steps)))
    timesteps = f", timesteps {list(sampler.timesteps)}" if sampler.timesteps else ""
    guidance = f"{sampler.guidance_scale:g}" if sampler.guidance_scale > 1 else "none"
    scale = "" if origin.lora_scale is None else f", LoRA scale {origin.lora_scale:g}"
    base = origin.base + (f" at {origin.revision}" if origin.revision else "")
    return {
        "checkpoint": manifest.checkpoint + scale,
        "base": base + (f", VAE of {origin.vae}" if origin.vae else ""),
        "decoder": f"{'tiny (TAESD)' if manifest.vae.tiny else 'full'}, scaling factor {manifest.vae.scaling_factor:g}",
        "precision": f"{manifest.precision}, ONNX opset {manifest.opset}",
        "pictures": f"{shapes.width} x {shapes.height} pixels, {shapes.batch} at a time",
        "sampler": f"{sampler.kind}, steps {steps}{timesteps}, eta {sampler.eta:g}, guidance {guidance}",
        "weights": f"{weights / 1e6:,.1f} MB",
        "written by": ", ".join(f"{tool} {version}" for tool, version in manifest.versions.items()),
        "engines": ", ".join(["ONNX Runtime", *_backends(bundle)]),
    }


def _backends(bundle: Bundle) -> list[str]:
    """The flavours and versions of TensorRT that the bundle has engines for."""
    from ..engines.tensorrt.api import TITLES

    return sorted({f"{TITLES[target.backend]} {target.version}" for target in bundle.manifest.engines.values()})
