"""Show a bundle: settings, components with inputs and outputs, sizes, memory, TensorRT engines.

Engines form targets: one engine for every component, for one version of TensorRT, kind of GPU and range of images. The
table says whether each target runs on this machine, and if not, why. `hypersd generate --target` takes its name.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from .arguments import BUNDLE_HELP, build_command, folder, open_bundle

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..engines import Bundle, Manifest
    from ..engines.memory_needs import Needs
    from ..engines.specs import EngineTarget, TensorSpec

FACT_WIDTH, TARGET_WIDTH = 18, 26  # columns that a table of targets takes
SHOWN_NAMES = 3  # of a component's attentions
MEMORY_REMARK = """\
memory: estimated from the files' sizes, weights alone; a run's intermediate results and the libraries come on top, and
during a load up to the component's size again. Targets: weights and activations as TensorRT reported them. OpenVINO
needs as much as ONNX Runtime where the processor does not multiply in bfloat16."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the bundle and the check of contents."""
    parser.add_argument("bundle", type=folder, help=BUNDLE_HELP)
    parser.add_argument("--hashes", action="store_true", help="read every file and compare its SHA-256")


def run(args: argparse.Namespace) -> None:
    """Check the files against the manifest, and print it."""
    from rich.table import Table
    from rich.text import Text

    from .console import out

    bundle, console = open_bundle(args.bundle, hashes=args.hashes), out()
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in _facts(bundle).items():
        facts.add_row(name, Text(value))  # not markup, whatever brackets a path has
    console.print(facts)
    console.print(_component_table(bundle))
    console.print(_memory_table(bundle.manifest))
    console.print(MEMORY_REMARK, soft_wrap=True)
    if bundle.manifest.engines:
        _print_targets(bundle, console)
    else:
        line = f"no TensorRT engines; make some with: {build_command(bundle.root)}"
        console.print(line, markup=False, soft_wrap=True)
    checked = "sizes and SHA-256" if args.hashes else "sizes"
    hint = "" if args.hashes else " (--hashes checks contents)"
    console.print(f"{checked} of {_checked_files(bundle)} match the manifest{hint}", markup=False)


def _component_table(bundle: Bundle) -> Table:
    """Components with inputs and outputs; a narrow terminal breaks long names and does not cut them."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("component", "MB", "inputs", "outputs"):
        table.add_column(heading, justify="right" if heading == "MB" else "left", overflow="fold")
    for name, component in bundle.manifest.components.items():
        size = bundle.manifest.component_bytes(component)
        specs = (component.inputs, component.outputs)
        tensors = ("\n".join(_tensor_lines(tensors)) for tensors in specs)
        table.add_row(Text(name), f"{size / 1e6:,.1f}", *map(Text, tensors))
    return table


def _memory_table(manifest: Manifest) -> Table:
    """Megabytes that each component takes in each backend, all together, and the largest stage with --low-memory."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from ..engines.memory_needs import estimated_needs, need_of_all, need_of_largest_stage, target_needs

    columns = {
        "ONNX Runtime, CPU": estimated_needs(manifest, 4),
        "OpenVINO in bf16, CPU": estimated_needs(manifest, 2),
        "ONNX Runtime, GPU": estimated_needs(manifest, None),
        **{f"target {i}, GPU": target_needs(target) for i, target in enumerate(manifest.engines.values(), 1)},
    }
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("memory, MB", overflow="fold")
    for heading in columns:
        table.add_column(heading, justify="right", overflow="fold")

    def add(row: str, size: Callable[[Needs], int | None]) -> None:
        sizes = [None if needs is None else size(needs) for needs in columns.values()]
        table.add_row(Text(row), *("unknown" if size is None else f"{size / 1e6:,.1f}" for size in sizes))

    for name in manifest.components:
        add(name, lambda needs, name=name: needs[name].total if name in needs else None)
    table.add_section()
    for row, size in (("all components", need_of_all), ("--low-memory", need_of_largest_stage)):
        add(row, lambda needs, size=size: size(needs) if len(needs) == len(manifest.components) else None)
    return table


def _tensor_lines(tensors: Mapping[str, TensorSpec]) -> list[str]:
    """A line for each tensor; numbered tensors, such as a UNet's residuals, share one line."""
    rows = Counter(key.rpartition("_")[0] for key in tensors if key.rpartition("_")[2].isdecimal())
    lines = []
    for key, spec in tensors.items():
        row, _, number = key.rpartition("_")
        if row not in rows:
            lines.append(f"{key} {spec}")
        elif number == "0":
            lines.append(f"{row}_0 to {rows[row] - 1}")
    return lines


def _checked_files(bundle: Bundle) -> str:
    """The checked files in words; plans may be missing from a complete bundle."""
    plans = [plan for target in bundle.manifest.engines.values() for plan in target.plans.values()]
    if broken := sum(not bundle.is_whole(plan) for plan in plans):
        return f"all files but {broken} engine{'s' if broken > 1 else ''}"
    return "all files"


def _print_targets(bundle: Bundle, console: Console) -> None:
    """Print the targets as columns of tables, then their names and why they do not run here, which are long."""
    from ..engines.load import why_not
    from ..engines.tensorrt.machine import this_machine

    machine, targets = this_machine(), bundle.manifest.engines
    reasons = {name: why_not(bundle, name, machine) for name in targets}
    columns = [_target_facts(bundle, name, "no" if reasons[name] else "yes") for name in targets]
    abreast = max(1, (console.width - FACT_WIDTH) // TARGET_WIDTH)
    for first in range(0, len(columns), abreast):
        console.print(_target_table(columns[first : first + abreast], first + 1))
    for i, (name, reason) in enumerate(reasons.items(), 1):
        remarks = [f"does not run here: {reason}"] if reason else []
        lines = [f"{i}  {name}", *(f"   {remark}" for remark in [*remarks, *_plain_attentions(targets[name])])]
        console.print("\n".join(lines), markup=False, soft_wrap=True)
    console.print()


def _plain_attentions(target: EngineTarget) -> list[str]:
    """A line for every component with attentions that are not fused, which makes it slower."""
    from ..engines.tensorrt.api import TITLES

    lines = []
    for component, plan in target.plans.items():
        if names := plan.decomposed_attention:
            shown, more = ", ".join(names[:SHOWN_NAMES]), len(names) - SHOWN_NAMES
            count = f"{len(names)} attention{'s' if len(names) > 1 else ''} in plain kernels"
            lack = f"for which {TITLES[target.backend]} has no fused one"
            lines.append(f"{component}: {count}, {lack}: {shown}{f' and {more} more' if more > 0 else ''}")
    return lines


def _target_table(columns: list[dict[str, str]], number: int) -> Table:
    """Targets side by side, numbered from ``number``."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("target", *(str(number + i) for i in range(len(columns)))):
        table.add_column(heading, overflow="fold")
    for fact in columns[0]:
        table.add_row(fact, *(Text(column[fact]) for column in columns))
    return table


def _target_facts(bundle: Bundle, name: str, runs_here: str) -> dict[str, str]:
    from ..engines.tensorrt.api import TITLES

    target = bundle.manifest.engines[name]
    shapes, plans = target.shapes, target.plans.values()
    is_whole = len(plans) == len(bundle.manifest.components)
    weights = [plan.weights_memory for plan in plans] if is_whole else [None]
    activations = [plan.activation_memory for plan in plans] if is_whole else [None]
    size = sum(bundle.manifest.files[plan.file].size for plan in plans)
    return {
        "built for": f"{TITLES[target.backend]} {target.version}",
        "GPUs": ", ".join(target.compute_capabilities) or "portable",
        "images": f"{shapes.batch} of {shapes.width} x {shapes.height}",
        "components": f"{len(plans)} of {len(bundle.manifest.components)}",
        "options": _target_options(target),
        "size": f"{size / 1e6:,.1f} MB",
        "weights": _memory(weights, sum),
        "activations": _memory(activations, max),  # components run one after another and share one block
        "built in": f"{sum(plan.seconds for plan in plans):,.1f} s",
        "runs here": runs_here,
    }


def _memory(sizes: Sequence[int | None], total: Callable[[list[int]], int]) -> str:
    """Device memory of all components together, if TensorRT reported it for each."""
    known = [size for size in sizes if size is not None]
    return f"{total(known) / 1e6:,.1f} MB" if len(known) == len(sizes) else "unknown"


def _target_options(target: EngineTarget) -> str:
    level = target.optimization_level
    words = [
        *([] if level is None else [f"optimization level {level}"]),
        *(["weights from the ONNX files"] if target.stripped else []),
    ]
    return ", ".join(words) or "none"


def _facts(bundle: Bundle) -> dict[str, str]:
    manifest = bundle.manifest
    sampler, origin, shapes = manifest.sampler, manifest.origin, manifest.shapes
    weights = sum(map(manifest.component_bytes, manifest.components.values()))
    steps = ", ".join(map(str, sorted(sampler.allowed_steps)))
    timesteps = f", timesteps {list(sampler.timesteps)}" if sampler.timesteps else ""
    guidance = f"{sampler.guidance_scale:g}" if sampler.guidance_scale > 1 else "none"
    scale = "" if origin.lora_scale is None else f", LoRA scale {origin.lora_scale:g}"
    base = origin.base + (f" at {origin.revision}" if origin.revision else "")
    return {
        "checkpoint": manifest.checkpoint + scale,
        **({"random weights": "yes, for measurements: its images are noise"} if manifest.random_weights else {}),
        "base": base + (f", VAE of {origin.vae}" if origin.vae else "") + _base_use(manifest),
        **({"LoRAs": ", ".join(origin.described_loras)} if origin.added_loras else {}),
        **_slot_fact(manifest),
        "VAE": _vae(manifest),
        "precision": f"{manifest.precision}, ONNX opset {manifest.opset}",
        "images": f"{shapes.width} x {shapes.height} pixels, {shapes.batch} at a time",
        "sampler": f"{sampler.kind}, steps {steps}{timesteps}, eta {sampler.eta:g}, guidance {guidance}",
        **_controlnet_facts(bundle),
        **_one_graph_facts(bundle),
        "weights": f"{weights / 1e6:,.1f} MB",
        "written by": ", ".join(f"{tool} {version}" for tool, version in manifest.versions.items()),
        "engines": ", ".join(["ONNX Runtime", *_backends(bundle)]),
    }


def _slot_fact(manifest: Manifest) -> dict[str, str]:
    """The rank of the LoRA slot, and the layers that it reaches."""
    if (slot := manifest.lora_slot) is None:
        return {}
    reached = " and ".join(f"{len(slot.placed(name))} layers of {name}" for name in slot.components)
    return {"LoRA slot": f"rank {slot.rank}, for {reached}"}


def _base_use(manifest: Manifest) -> str:
    return "; for inpainting" if manifest.is_inpainting else ""


def _vae(manifest: Manifest) -> str:
    """Its kind, its factor, and whether it only decodes."""
    kind = "tiny (TAESD)" if manifest.vae.tiny else "full"
    lack = "" if manifest.has_encoder else ", decoder only: text to image alone"
    return f"{kind}, scaling factor {manifest.vae.scaling_factor:g}{lack}"


def _controlnet_facts(bundle: Bundle) -> dict[str, str]:
    """A line for every ControlNet with its source and recommended settings."""
    lines = []
    for name, settings in bundle.manifest.controlnets.items():
        origin = bundle.manifest.origin.controlnets.get(name)
        source = f" of {origin.location}" if origin else ""
        source += f" at {origin.revision}" if origin and origin.revision else ""
        lines.append(f"{name}{source}: scale {settings.conditioning_scale:g}, preprocess {settings.preprocess}")
    return {"ControlNets": "\n".join(lines)} if lines else {}


def _one_graph_facts(bundle: Bundle) -> dict[str, str]:
    """A line for every one-graph with its fixed settings."""
    lines = []
    for name, one_graph in bundle.manifest.one_graphs.items():
        timesteps = f" at timesteps {list(one_graph.timesteps)}" if one_graph.timesteps else ""
        size = f"{one_graph.batch} of {one_graph.width} x {one_graph.height}"
        megabytes = bundle.manifest.files[one_graph.network.onnx].size / 1e6
        plural = "s" if one_graph.steps > 1 else ""
        steps = f"{one_graph.steps} step{plural}{timesteps}, eta {one_graph.eta:g}"
        lines.append(f"{name}: {steps}, {size}, {megabytes:,.1f} MB")
    return {"one-graphs": "\n".join(lines)} if lines else {}


def _backends(bundle: Bundle) -> list[str]:
    """The versions of TensorRT for which the bundle has engines."""
    from ..engines.tensorrt.api import TITLES

    return sorted({f"{TITLES[target.backend]} {target.version}" for target in bundle.manifest.engines.values()})
