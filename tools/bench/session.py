"""One run of the bench: contenders start one after another, then draw in turns, and one report comes of it."""

from __future__ import annotations

import contextlib
import datetime
import functools
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from ... import __version__
from ...engines import Bundle
from ...engines.progress import BuildProgress, Stage
from ...runtime.request import Request
from .choice import choose_contenders
from .contenders import Context
from .drawing import Settings
from .entrant import Entrant
from .figures import summarize
from .floors import Floors, measure_floors
from .images import image, make_requests
from .machine import this_machine
from .memory import available_memory
from .options import BenchOptions
from .process import WorkerError, write_start
from .report import Comparison, Drawing, Report, Row, Sameness
from .rounds import Taken, take_turns
from .sameness import compare_images

CPU_WARMUP, CUDA_WARMUP = 1, 3  # images; hypersd records its CUDA graph at the third call of a kind


def run_bench(bundle: Bundle, options: BenchOptions, command: str, progress: BuildProgress) -> Report:
    """Measure.

    Args:
        bundle: whose images are drawn.
        options: how many of them, by whom.
        command: what the report says that it was made with.
        progress: told of every contender's start and of every round.

    Raises:
        RequestError: a contender is not known or cannot run here, an interpreter does not run, or a setting is out of
            range for the bundle.
        WorkerError: all contenders failed.
    """
    requests = make_requests(bundle.manifest, options)
    contenders, left_out = choose_contenders(bundle, options)
    entrants = [Entrant(contender) for contender in contenders]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hypersd-bench-")))
        for entrant in entrants:
            stack.callback(entrant.close)
        start_all(entrants, bundle, options, image(requests[0], options.seed, 0), folder, progress)
        warmup = options.warmup or (CUDA_WARMUP if _any_on_cuda(entrants) else CPU_WARMUP)
        taken = _take_all(entrants, requests, options, warmup, folder, progress)
        _check_any_drew(entrants, taken)
        floors = measure_floors(bundle, requests, entrants, progress)
    return Report(
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        command=command,
        hypersd=__version__,
        bundle=str(bundle.root),
        checkpoint=bundle.manifest.checkpoint,
        precision=bundle.manifest.precision,
        drawing=_drawing(requests, options, warmup),
        machine=this_machine(),
        rates=floors.rates,
        contenders=[entrant.entry() for entrant in entrants],
        comparisons=[_compare(entrants, *pair, floors) for pair in zip(requests, taken, strict=True)],
        notes=[*_bundle_notes(bundle), *left_out, *floors.notes],
    )


def start_all(
    entrants: Sequence[Entrant],
    bundle: Bundle,
    options: BenchOptions,
    first: Settings,
    folder: Path,
    progress: BuildProgress,
) -> None:
    """Start every contender's process and let it draw its first image, while no other one runs."""
    program = write_start(folder / "program")
    for entrant in entrants:
        with Stage(progress, f"start {entrant.name}") as stage:
            if reason := why_no_room(bundle, available_memory(), entrant.contender.holds_halves):
                entrant.fail(reason)
            else:
                own = folder / entrant.name
                own.mkdir()
                python = options.pythons.get(entrant.name, sys.executable)
                entrant.begin(program, python, Context(bundle, options.device, own), first)
            stage.note = entrant.failure or ""


def why_no_room(bundle: Bundle, free: int | None, holds_halves: bool = False) -> str | None:
    """Why one more process would take memory that the others need, of which ``free`` bytes are left; None if not.

    ``holds_halves``: it keeps two bytes of every weight.
    """
    components = bundle.manifest.components.values()
    weights = sum(bundle.manifest.files[file].size for component in components for file in component.files)
    if holds_halves and bundle.manifest.precision == "fp32":
        weights //= 2
    if free is None or free > weights:
        return None
    return (
        f"{free / 1e9:.1f} GB of memory are free and its weights take {weights / 1e9:.1f} GB: name fewer --contenders"
    )


def _take_all(
    entrants: Sequence[Entrant],
    requests: Sequence[Request],
    options: BenchOptions,
    warmup: int,
    folder: Path,
    progress: BuildProgress,
) -> list[dict[str, Taken]]:
    """All rounds of every number of steps."""
    taken = []
    for i, request in enumerate(requests):
        first = 1 + i * (warmup + options.rounds)  # number 0 was drawn at the start
        with Stage(progress, f"rounds of {request.steps} step(s)") as stage:
            images = functools.partial(_numbered, request, options.seed, first)
            taken.append(take_turns(entrants, images, options.rounds, warmup, folder, stage))
    return taken


def _check_any_drew(entrants: Sequence[Entrant], taken: Sequence[Mapping[str, Taken]]) -> None:
    if not any(each.samples for by_name in taken for each in by_name.values()):
        raise WorkerError("; ".join(f"{entrant.name} failed: {entrant.failure}" for entrant in entrants))


def _numbered(request: Request, seed: int, first: int, i: int) -> Settings:
    return image(request, seed, first + i)


def _any_on_cuda(entrants: Sequence[Entrant]) -> bool:
    return any((entrant.device or "").startswith("cuda") for entrant in entrants)


def _compare(entrants: Sequence[Entrant], request: Request, taken: Mapping[str, Taken], floors: Floors) -> Comparison:
    """The rows of one number of steps."""
    steps = request.steps
    ours = taken[entrants[0].name]
    rows = [
        Row(
            contender=entrant.name,
            warmup=taken[entrant.name].warmup,
            samples=taken[entrant.name].samples,
            sameness=_sameness(entrants[0], ours, entrant, taken[entrant.name]),
            summary=summarize(taken[entrant.name].samples, ours.samples, floors.of(entrant, steps)),
        )
        for entrant in entrants
    ]
    return Comparison(steps=steps, floors=floors.at(steps), rows=rows)


def _sameness(us: Entrant, ours: Taken, them: Entrant, theirs: Taken) -> Sameness | None:
    if us is them or ours.pixels is None or theirs.pixels is None:
        return None
    return compare_images(ours.pixels, theirs.pixels, {us.precision or "", them.precision or ""})


def _drawing(requests: Sequence[Request], options: BenchOptions, warmup: int) -> Drawing:
    first = requests[0]
    return Drawing(
        prompt=options.prompt,
        seed=options.seed,
        steps=[request.steps for request in requests],
        eta=first.eta,
        guidance_scale=first.guidance_scale,
        height=first.height,
        width=first.width,
        rounds=options.rounds,
        warmup=warmup,
    )


def _bundle_notes(bundle: Bundle) -> list[str]:
    if bundle.manifest.random_weights:
        return ["the bundle's weights are random numbers: its images show nothing, its timings are a real model's"]
    return []
