"""One run of the bench: contenders start one after another, then generate in turns; the result is one report."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from ... import __version__
from ...engines import Bundle, Manifest
from ...engines.progress import Progress, Stage
from ...runtime.params import Params, decide
from ...runtime.request import Request
from .contender import Context
from .contender_process import ContenderError, write_start
from .contenders import choose_contenders
from .entrant import Entrant, Taken
from .figures import compare_images, summarize
from .host import available_memory, this_host
from .protocol import Settings
from .report import ImageFacts, Report, Row, Sameness, StepsTable

T = TypeVar("T")
CPU_WARMUP, CUDA_WARMUP = 1, 3  # images; hypersd records its CUDA graph at the third call of a kind
RANDOM_WEIGHTS = "the bundle's weights are random: its images show noise, its timings are those of real weights"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Contenders and images of a run; None stands for the bundle's own.

    Attributes:
        contenders: their names; empty for all that can run here.
        steps: numbers of steps; empty for the bundle's.
        height: in pixels.
        width: in pixels.
        eta: 0..1, stochasticity.
        rounds: images that count, of each contender.
        warmup: images before them that do not count; None for one, and three on a GPU.
        device: ``"auto"``, ``"cpu"`` or a CUDA device.
        pythons: interpreters of contenders that live in another environment, by the contender's name.
    """

    contenders: Sequence[str] = ()
    steps: Sequence[int] = ()
    height: int | None = None
    width: int | None = None
    eta: float | None = None
    rounds: int = 5
    warmup: int | None = None
    prompt: str = "a photo of a cat"
    seed: int = 0
    device: str = "auto"
    pythons: Mapping[str, str] = dataclasses.field(default_factory=dict)


def run_bench(bundle: Bundle, options: BenchOptions, command: str, progress: Progress) -> Report:
    """Measure.

    Args:
        bundle: the bundle whose images are generated.
        options: the contenders and their images.
        command: the command line for the report.
        progress: told of every contender's start and of every round.

    Raises:
        RequestError: a contender is not known or cannot run here, an interpreter does not run, or a setting is out of
            range for the bundle.
        ContenderError: all contenders failed.
    """
    requests, precision = make_requests(bundle.manifest, options), bundle.manifest.precision
    contenders, left_out = choose_contenders(bundle, options.device, options.contenders, options.pythons)
    entrants = [Entrant(contender) for contender in contenders]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hypersd-bench-")))
        for entrant in entrants:
            stack.callback(entrant.close)
        session = _Session(bundle, options, entrants, folder, progress)
        session.start(image(requests[0], options.seed, 0))
        warmup = session.warmup()
        taken = [session.take(request, i, warmup) for i, request in enumerate(requests)]
    if not any(each.samples for by_name in taken for each in by_name.values()):
        raise ContenderError("; ".join(f"{entrant.name} failed: {entrant.failure}" for entrant in entrants))
    return Report(
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        command=command,
        hypersd=__version__,
        bundle=str(bundle.root),
        checkpoint=bundle.manifest.checkpoint,
        precision=precision,
        images=_image_facts(requests, options, warmup),
        host=this_host(),
        contenders=[entrant.entry() for entrant in entrants],
        comparisons=[_compare(entrants, precision, *pair) for pair in zip(requests, taken, strict=True)],
        notes=[*([RANDOM_WEIGHTS] if bundle.manifest.random_weights else []), *left_out],
    )


def make_requests(manifest: Manifest, options: BenchOptions) -> list[Request]:
    """One request for each number of steps.

    Raises:
        RequestError: a setting is out of range for the bundle.
    """
    common = Params(
        prompt=options.prompt, eta=options.eta, height=options.height, width=options.width, seed=options.seed
    )
    return [
        decide(manifest, dataclasses.replace(common, num_inference_steps=steps)) for steps in options.steps or [None]
    ]


def image(request: Request, seed: int, number: int) -> Settings:
    """The image of a number, from 0 on: its own seed, and a prompt that is in no cache of text embeddings."""
    prompt = request.prompts[0]
    return Settings(
        prompt=f"{prompt}, {number + 1}" if number else prompt,
        seed=seed + number,
        num_inference_steps=request.num_inference_steps,
        timesteps=request.timesteps,
        eta=request.eta,
        guidance_scale=request.guidance_scale,
        height=request.height,
        width=request.width,
    )


@dataclasses.dataclass(frozen=True)
class _Session:
    """The contenders of a run and their working folder."""

    bundle: Bundle
    options: BenchOptions
    entrants: Sequence[Entrant]
    folder: Path
    progress: Progress

    def start(self, first: Settings) -> None:
        """Start every contender's process and generate its first image, while no other one runs."""
        program = write_start(self.folder / "program")
        for entrant in self.entrants:
            with Stage(self.progress, f"start {entrant.name}") as stage:
                if reason := why_no_room(self.bundle, available_memory(), entrant.contender.holds_halves):
                    entrant.fail(reason)
                else:
                    own = self.folder / entrant.name
                    own.mkdir()
                    python = self.options.pythons.get(entrant.name, sys.executable)
                    entrant.begin(program, python, Context(self.bundle, self.options.device, own, first), first)
                stage.note = entrant.failure or ""

    def warmup(self) -> int:
        """Images of each contender that do not count."""
        is_cuda = any((entrant.device or "").startswith("cuda") for entrant in self.entrants)
        return self.options.warmup or (CUDA_WARMUP if is_cuda else CPU_WARMUP)

    def take(self, request: Request, i: int, warmup: int) -> dict[str, Taken]:
        """Generate the warm-up images and then all rounds of the ``i``-th number of steps, the same with each."""
        taken, rounds = {entrant.name: Taken() for entrant in self.entrants}, self.options.rounds
        first = 1 + i * (warmup + rounds)  # number 0 is the image of the start
        settings = [image(request, self.options.seed, first + j) for j in range(warmup + rounds)]
        with Stage(self.progress, f"rounds of {request.steps} step(s)") as stage:
            for j, each in enumerate(settings[:warmup]):
                for entrant in self.entrants:
                    stage.progress.update(j / len(settings), f"warm-up: {entrant.name}")
                    entrant.warm_up(each, taken[entrant.name], self.folder)
            for j, each in enumerate(settings[warmup:]):
                for entrant in round_order(self.entrants, j):
                    part = (warmup + j) / len(settings)
                    stage.progress.update(part, f"round {j + 1} of {rounds}: {entrant.name}")
                    if (sample := entrant.generate(each)) is not None:
                        taken[entrant.name].samples.append(sample)
        return taken


def round_order(entrants: Sequence[T], i: int) -> list[T]:
    """The order of round ``i``: A B C, then C B A, so that a drift of the machine favours none."""
    return list(entrants) if i % 2 == 0 else list(reversed(entrants))


def why_no_room(bundle: Bundle, free: int | None, holds_halves: bool = False) -> str | None:
    """The reason why one more process does not fit into the ``free`` bytes of memory; None if it fits.

    ``holds_halves``: it keeps two bytes of every weight.
    """
    weights = sum(map(bundle.manifest.component_bytes, bundle.manifest.components.values()))
    if holds_halves and bundle.manifest.precision == "fp32":
        weights //= 2
    if free is None or free > weights:
        return None
    return (
        f"{free / 1e9:.1f} GB of memory are free and its weights take {weights / 1e9:.1f} GB: name fewer --contenders"
    )


def _compare(entrants: Sequence[Entrant], precision: str, request: Request, taken: Mapping[str, Taken]) -> StepsTable:
    """The rows of one number of steps of a bundle in a precision."""
    ours = taken[entrants[0].name]
    rows = [
        Row(
            contender=entrant.name,
            warmup=taken[entrant.name].warmup,
            samples=taken[entrant.name].samples,
            sameness=_sameness(entrants[0], ours, entrant, taken[entrant.name], precision),
            summary=summarize(taken[entrant.name].samples, ours.samples),
        )
        for entrant in entrants
    ]
    return StepsTable(steps=request.steps, rows=rows)


def _sameness(us: Entrant, ours: Taken, them: Entrant, theirs: Taken, stored: str) -> Sameness | None:
    """The images' sameness; weights are rounded to the precision that they are stored in, whichever computes."""
    if us is them or ours.pixels is None or theirs.pixels is None:
        return None
    return compare_images(ours.pixels, theirs.pixels, {us.precision or "", them.precision or "", stored})


def _image_facts(requests: Sequence[Request], options: BenchOptions, warmup: int) -> ImageFacts:
    first = requests[0]
    return ImageFacts(
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
