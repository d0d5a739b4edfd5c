"""Generate the images of a file of prompts, on all GPUs of a Ray cluster.

FILE has one prompt per line, or is named *.jsonl and has one object per line with the fields of a request to `hypersd
serve`, such as {"prompt": "a cat", "seed": 7, "steps": 4}. There, image, mask and control_image may be paths of files,
relative to FILE. Images are named LINE-SEED.png; images.jsonl in the output folder lists them. A second run generates
only images that are missing or have changed settings.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import (
    BUNDLE_HELP,
    add_allow_random_weights,
    add_backend,
    add_image_settings,
    folder,
    open_bundle,
    size_word,
)
from .lora_options import add_lora_folder, read_lora_folder

if TYPE_CHECKING:
    from ..cluster.batch_run import ActorOptions
    from ..cluster.jobs import PromptJob

EXTRA = "ray"
INDEX_NAME = "images.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the bundle, the prompts, the settings of lines without their own, and the workers."""
    parser.add_argument("bundle", type=folder, help=BUNDLE_HELP)
    parser.add_argument("prompts", type=Path, metavar="FILE", help="one prompt per line, or *.jsonl")
    parser.add_argument("-o", "--output", type=folder, default=Path("images"), metavar="FOLDER", help="default: images")
    parser.add_argument("--seed", type=int, default=0, help="seed of line 1; line i has seed SEED+i-1 (default: 0)")
    parser.add_argument("--count", type=int, metavar="N", help="images per line, with consecutive seeds (default: 1)")
    add_image_settings(parser)
    add_backend(parser, "as for generate (default: auto)")
    parser.add_argument("--address", help="of the Ray cluster (default: the one of this machine, or a new one)")
    parser.add_argument("--actors", type=int, metavar="N", help="workers (default: one for each GPU, else one)")
    parser.add_argument(
        "--num-gpus", type=float, metavar="X", help="GPUs of each actor, 0 for the CPU (default: 1 if there are any)"
    )
    parser.add_argument(
        "--max-batch", type=int, default=8, metavar="N", help="images generated at once on a GPU (default: 8)"
    )
    add_lora_folder(parser)
    add_allow_random_weights(parser)


def run(args: argparse.Namespace) -> None:
    """Generate the missing images; failed images are reported at the end, with exit code 1."""
    from ..cluster.jobs import read_jobs
    from ..engines.files import lock_file
    from ..errors import disk_errors
    from ..runtime.adapter import slot_of
    from .console import err
    from .image_output import OTHER_PLACE

    bundle = open_bundle(args.bundle)
    args.bundle = bundle.root  # of a bundle on the Hub, the folder that was fetched
    bundle.check_weights(args.allow_random_weights, "--allow-random-weights")
    _check(args)
    if read_lora_folder(args) is not None:
        args.lora_folder = args.lora_folder.absolute()
        slot_of(bundle.manifest)
    jobs = read_jobs(args.prompts, bundle.manifest, args.seed, _defaults(args), args.lora_folder)
    waiting = f"waiting for another process that writes to {args.output}"
    with lock_file(args.output, on_wait=lambda: err().print(waiting, markup=False, soft_wrap=True)):
        with disk_errors(args.output, OTHER_PLACE):
            args.output.mkdir(parents=True, exist_ok=True)
        missing = [job for job in jobs if not job.is_generated(args.output)]
        _say_found(args, jobs, missing)
        errors: dict[str, str] = {}
        try:
            if missing:
                _generate(args, missing, errors)
        finally:  # also after an interruption
            _write_index(args.output, jobs, errors)
    _say_end(args, jobs, errors)


def _check(args: argparse.Namespace) -> None:
    from ..runtime.params import LARGEST_SEED
    from ..samplers.numbers import real_number, whole_number

    whole_number("--seed", args.seed, 0, LARGEST_SEED)
    whole_number("--max-batch", args.max_batch, 1, 1024)
    if args.actors is not None:
        whole_number("--actors", args.actors, 1, 100_000)
    if args.num_gpus is not None:
        real_number("--num-gpus", args.num_gpus, 0.0, 1.0)


def _defaults(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of a request for lines without them."""
    fields = {
        "n": args.count,
        "steps": args.steps,
        "eta": args.eta,
        "guidance_scale": args.guidance_scale,
        "negative_prompt": args.negative_prompt,
        "size": size_word(args.size),
    }
    return {name: value for name, value in fields.items() if value is not None}


def _say_found(args: argparse.Namespace, jobs: Sequence[PromptJob], missing: Sequence[PromptJob]) -> None:
    from .console import err

    changed = sum((args.output / job.file).exists() for job in missing)
    line = f"{len(jobs)} images: {len(jobs) - len(missing)} exist, {len(missing)} to generate"
    if changed:
        line += f", {changed} of them again because their settings changed"
    strangers = {path.name for path in args.output.glob("*.png")} - {job.file for job in jobs}
    if strangers:
        line += f"; {len(strangers)} more in {args.output} belong to no line of {args.prompts}"
    err().print(line, markup=False, soft_wrap=True)


def _generate(args: argparse.Namespace, jobs: Sequence[PromptJob], errors: dict[str, str]) -> None:
    """Generate and write images; ``errors`` gets the failures by the image's name."""
    from ..cluster.batch_run import connect, generate_jobs
    from ..engines.files import write_whole
    from ..errors import disk_errors
    from .console import step_bar
    from .image_output import OTHER_PLACE

    connect(args.address)
    errors.update({job.file: "not generated" for job in jobs})
    with step_bar(f"generating into {args.output}", len(jobs)) as advance:
        for result in generate_jobs(args.bundle, jobs, _actors(args)):
            if result.png is None:
                errors[result.file] = result.error or "not generated"
            else:
                with disk_errors(args.output / result.file, OTHER_PLACE):
                    write_whole(args.output / result.file, result.png)
                del errors[result.file]
            advance()


def _actors(args: argparse.Namespace) -> ActorOptions:
    from ..cluster.batch_run import ActorOptions, default_actors

    count, num_gpus = default_actors()
    return ActorOptions(
        count=args.actors or count,
        num_gpus=num_gpus if args.num_gpus is None else args.num_gpus,
        max_batch=args.max_batch,
        lora_folder=args.lora_folder,
        strict_loras=args.strict,
        backend=args.backend,
        precision=args.precision,
        low_memory=args.low_memory,
    )


def _write_index(output: Path, jobs: Sequence[PromptJob], errors: Mapping[str, str]) -> None:
    from ..engines.files import write_whole
    from ..errors import disk_errors
    from .image_output import OTHER_PLACE

    lines = [
        {"file": job.file, "line": job.line, "seed": job.seed, "prompt": job.body.prompt, "error": errors.get(job.file)}
        for job in jobs
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    with disk_errors(output / INDEX_NAME, OTHER_PLACE):
        write_whole(output / INDEX_NAME, text.encode())


def _say_end(args: argparse.Namespace, jobs: Sequence[PromptJob], errors: Mapping[str, str]) -> None:
    """Print where the images are, or raise an error if some failed."""
    from ..errors import HyperSDError
    from .console import err, out

    by_name = {job.file: job for job in jobs}
    for name, message in errors.items():
        err().print(f"{args.prompts} line {by_name[name].line}: {message}", markup=False, soft_wrap=True)
    if errors:
        raise HyperSDError(f"{len(errors)} of {len(jobs)} images failed; the same command tries only these again")
    out().print(f"{args.output}  {len(jobs)} images, listed in {INDEX_NAME}", markup=False, soft_wrap=True)
