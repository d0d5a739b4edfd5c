"""What is in a bundle: settings, networks with inputs and outputs, sizes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..engines import Bundle


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which bundle."""
    parser.add_argument("bundle", type=Path, help="the folder that `hypersd export` wrote")
    parser.add_argument("--hashes", action="store_true", help="read every file and compare its SHA-256")


def run(args: argparse.Namespace) -> None:
    """Print what the manifest says, after checking the files against it."""
    from rich import box
    from rich.table import Table

    from ..engines.bundle import Bundle
    from .console import out

    bundle = Bundle.load(args.bundle, hashes=args.hashes)
    manifest, console = bundle.manifest, out()
    facts = Table(box=None, show_header=False, pad_edge=False)
    for name, value in _facts(bundle).items():
        facts.add_row(name, value)
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
    checked = (
        "sizes and SHA-256 of all files are" if args.hashes else "sizes of all files are (--hashes checks contents)"
    )
    console.print(f"{checked} as written", markup=False)


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
        "engines": "onnxruntime",
    }
