"""A whole run of the bench with stand-ins: the order of images, and the report."""

from __future__ import annotations

import dataclasses
import io
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from hypersd.engines import Bundle
from hypersd.engines.progress import Silent
from hypersd.errors import HyperSDError, RequestError
from hypersd.tools.bench.contender import Contender, Context
from hypersd.tools.bench.contenders import CONTENDERS, OURS
from hypersd.tools.bench.report import Report, decode, encode
from hypersd.tools.bench.session import BenchOptions, run_bench, why_no_room
from hypersd.tools.bench.table import print_report


@pytest.fixture
def bench(sd15_bundle: Path, contenders) -> Callable[..., Report]:
    """``bench(*contenders, **options)``: the report of a run."""

    def run(*these: Contender, **options) -> Report:
        contenders(*these)
        return run_bench(Bundle.load(sd15_bundle), BenchOptions(**options), "hypersd bench BUNDLE", Silent())

    return run


def shown(report: Report, width: int) -> str:
    """The tables on a terminal of that width."""
    output = io.StringIO()
    print_report(report, Console(file=output, width=width))
    return output.getvalue()


def test_rounds_are_interleaved_and_all_generate_the_same_images(bench, stand_in, diary: Path) -> None:
    """One image at the start, warm-ups, then rounds forth and back; no prompt or seed comes twice to anyone."""
    bench(stand_in(), stand_in("b"), stand_in("c"), steps=[1, 2], rounds=2, warmup=1, seed=10, prompt="a cat")
    lines = [line.split("|") for line in diary.read_text().splitlines()]
    starts, turns = lines[:3], lines[3:]
    assert [line[:3] for line in starts] == [[name, "10", "a cat"] for name in (OURS, "b", "c")]
    order = [OURS, "b", "c"]
    a_steps_turns = [*order, *order, *reversed(order)]  # warm-up, round 1, round 2
    assert [line[0] for line in turns] == a_steps_turns * 2
    assert [line[3] for line in turns] == ["1"] * 9 + ["2"] * 9
    images = {name: [line[1:] for line in lines if line[0] == name] for name in order}
    assert images[OURS] == images["b"] == images["c"]
    for column in (0, 1):
        values = [image[column] for image in images[OURS]]
        assert len(set(values)) == len(values)


def test_the_death_of_one_is_reported_and_the_others_go_on(bench, stand_in) -> None:
    """It dies in its second round: its first sample stays, the others have all of theirs, the tables name the cause."""
    report = bench(stand_in(), stand_in("mortal", kills_itself_at=4), stand_in("c"), rounds=3, warmup=1)
    (comparison,) = report.comparisons
    samples = {row.contender: len(row.samples) for row in comparison.rows}
    assert samples == {OURS: 3, "mortal": 1, "c": 3}
    assert report.entry("c").failure is None
    assert "SIGKILL" in (report.entry("mortal").failure or "")
    assert "mortal failed: its process was ended by SIGKILL" in shown(report, 200)


def test_one_that_cannot_even_start(bench, stand_in) -> None:
    """A contender whose libraries fail when they are loaded has no figures, and a line that says why."""
    broken = dataclasses.replace(stand_in("broken"), module="no_such_module")
    report = bench(stand_in(), broken, rounds=1)
    assert report.comparisons[0].rows[1].summary is None
    assert report.entry("broken").start is None
    text = shown(report, 120)
    assert "broken failed: ModuleNotFoundError: No module named 'no_such_module'" in text


def test_it_is_an_error_where_all_fail(bench, stand_in) -> None:
    """No table of nothing."""
    with pytest.raises(HyperSDError, match="hypersd failed: ValueError: first line second line"):
        bench(stand_in(raises_at=1))


def test_hypersd_itself_may_fail(bench, stand_in) -> None:
    """The others still have their figures, without ratios."""
    report = bench(stand_in(raises_at=3), stand_in("b"), rounds=1, warmup=1)
    (comparison,) = report.comparisons
    assert comparison.rows[0].summary is None
    summary = comparison.rows[1].summary
    assert summary is not None
    assert (summary.median, summary.ratio) == (0.25, None)
    assert shown(report, 80)


def test_another_image_is_marked_and_not_hidden(bench, stand_in) -> None:
    """A contender with another image is in the table with its time, marked as other."""
    report = bench(stand_in(grey=0), stand_in("equal", grey=0), stand_in("level", grey=1), stand_in("b", grey=90))
    verdicts = {row.contender: row.sameness and row.sameness.verdict for row in report.comparisons[0].rows}
    assert verdicts == {OURS: None, "equal": "same", "level": "other", "b": "other"}  # a level everywhere is 48 dB
    line = next(line for line in shown(report, 80).splitlines() if line.split()[:1] == ["b"])
    assert "other, 9 dB" in line
    assert "250" in line


def test_images_of_rounded_weights_are_judged_as_such(contenders, stand_in, copy_bundle, sd15_bundle: Path) -> None:
    """An int8 bundle on a library that computes in float32 has not the images of float32 weights."""
    contenders(stand_in(grey=0), stand_in("level", grey=1))
    bundle = copy_bundle(sd15_bundle, precision="int8")
    report = run_bench(bundle, BenchOptions(), "hypersd bench BUNDLE", Silent())
    assert [row.sameness and row.sameness.verdict for row in report.comparisons[0].rows] == [None, "close"]


def test_the_report_survives_json(bench, stand_in) -> None:
    """A written report holds all that was measured, failures and equal images included; no value becomes null."""
    report = bench(stand_in(), stand_in("b"), stand_in("c", raises_at=2), rounds=2, steps=[1, 2])
    assert decode(encode(report)) == report
    assert report.images.steps == [1, 2]
    assert report.host.cores >= 1
    assert report.entry(OURS).start.seconds > 0.25


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_the_terminal(bench, stand_in, width: int) -> None:
    """No row is cut off or folded, also with long names; a narrow terminal gets fewer columns."""
    longest = max((contender.name for contender in CONTENDERS), key=len)
    report = bench(stand_in(), stand_in(longest, grey=9), rounds=1)
    table, _, rest = shown(report, width).partition(f"{OURS}: stand-in")
    assert rest
    assert all(len(line.rstrip()) <= width for line in table.splitlines() if not line.startswith(report.checkpoint))
    row = next(line for line in table.splitlines() if longest in line)
    assert "other, 29 dB" in row
    assert "…" not in table
    assert ("p95" in table) == (width >= 112)


def test_files_are_made_in_a_process_before_the_contenders(bench, stand_in, diary: Path) -> None:
    """A conversion's memory is not the contender's; one that fails is the contender's failure."""
    prepared = dataclasses.replace(stand_in("b"), preparation="stand_in")
    bad = dataclasses.replace(stand_in("c"), preparation="stand_in", options=lambda _: {"diary": "", "name": "c"})
    report = bench(stand_in(), prepared, bad, rounds=1)
    lines = diary.read_text().splitlines()
    (i,) = (i for i, line in enumerate(lines) if line.startswith("prepared|"))
    assert lines[i + 1].startswith("b|")
    assert report.entry("b").failure is None
    assert report.entry("c").failure == "ValueError: no diary to prepare"


def test_noise_is_handed_to_those_that_take_it(bench, stand_in) -> None:
    """The others draw it themselves."""
    taking = dataclasses.replace(stand_in("b", has_noise=True), takes_noise=True)
    report = bench(stand_in(), taking, rounds=1)
    assert [entry.failure for entry in report.contenders] == [None, None]


def test_memory_at_the_peak_and_at_rest(bench, stand_in) -> None:
    """What a contender let go after loading is in its peak alone; the table shows both."""
    report = bench(stand_in(), stand_in("b", holds=200_000_000), rounds=1)
    entry = report.entry("b")
    if entry.host_memory is None:  # not on Linux
        pytest.skip("the system tells no memory")
    assert entry.host_memory > entry.resting_memory + 150_000_000
    assert entry.resting_memory > entry.mapped_memory > 0
    row = next(line for line in shown(report, 200).splitlines() if line.split()[:1] == ["b"])
    for size in (entry.host_memory, entry.resting_memory):
        assert f"{size / 1e9:.2f}" in row.split()


def test_the_head_of_a_table_names_the_machine(bench, stand_in) -> None:
    """With its instruction sets: they decide which kernels run."""
    report = bench(stand_in(), rounds=1)
    host = dataclasses.replace(report.host, processor="a Xeon", cores=2, extensions=["avx512f", "amx_bf16"])
    head = shown(dataclasses.replace(report, host=host), 80).splitlines()[0]
    assert head.endswith("on 2 cores of a Xeon, avx512f amx_bf16")


def test_processes_are_gone_afterwards(bench, stand_in, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in a round, and every worker has ended when it arrives."""
    from hypersd.tools.bench import contender_process

    pids, turns = [], itertools.count()
    ask = contender_process.ContenderProcess.ask

    def interrupted(self: contender_process.ContenderProcess, command: str, **arguments):
        if next(turns) == 7:  # both have said hello, loaded and generated one image
            raise KeyboardInterrupt
        answer = ask(self, command, **arguments)
        if command == "hello":
            pids.append(answer["pid"])
        return answer

    monkeypatch.setattr(contender_process.ContenderProcess, "ask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench(stand_in(), stand_in("b"))
    assert len(set(pids)) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_hypersd_always_takes_part(bench, stand_in) -> None:
    """It is the baseline, named or not."""
    report = bench(stand_in(), stand_in("b"), stand_in("c"), contenders=["c"], rounds=1)
    assert [entry.name for entry in report.contenders] == [OURS, "c"]


def test_a_missing_contender_is_left_out_unless_it_is_named(bench, stand_in) -> None:
    """By default a note says what is missing; a named contender is an error."""
    absent = dataclasses.replace(stand_in("b"), libraries=("no_such_library",))
    report = bench(stand_in(), absent, rounds=1)
    assert "b is left out: no_such_library not installed" in report.notes
    with pytest.raises(RequestError, match="contender b cannot run here: no_such_library not installed"):
        bench(stand_in(), absent, contenders=["b"])


def test_a_backend_may_take_the_place_of_the_one_that_does_not_fit(bench, stand_in) -> None:
    """SDXL in float32 needs more memory than many machines have: another backend of ours is then measured alone."""
    ours, named = stand_in("hypersd-b"), stand_in("c")
    report = bench(stand_in(), ours, named, contenders=["c", "hypersd-b"], rounds=1)
    assert [entry.name for entry in report.contenders] == ["hypersd-b", "c"]
    assert report.baseline.name == "hypersd-b"
    assert [row.sameness is None for row in report.comparisons[0].rows] == [True, False]


def test_the_same_backend_is_not_measured_twice(sd15_bundle: Path) -> None:
    """Without engines for this machine `hypersd` runs on ONNX Runtime: the same again only if it is named."""
    named = {contender.name: contender for contender in CONTENDERS}
    context = Context(Bundle.load(sd15_bundle), "cpu", Path())
    assert named["hypersd-onnxruntime"].why_not_usual(context) == "hypersd chooses the same backend"
    assert named[OURS].why_not_usual(context) is None


def test_no_process_is_started_into_full_memory(sd15_bundle: Path) -> None:
    """A machine that swaps measures nothing: one more contender needs room for the weights."""
    bundle = Bundle.load(sd15_bundle)
    weights = sum(
        bundle.manifest.files[file].size
        for component in bundle.manifest.components.values()
        for file in component.files
    )
    assert why_no_room(bundle, weights + 1) is None
    assert why_no_room(bundle, None) is None
    assert why_no_room(bundle, weights // 2 + 1, holds_halves=True) is None  # bfloat16 of a float32 bundle
    assert "name fewer" in (why_no_room(bundle, weights // 2 - 1, holds_halves=True) or "")
    assert "name fewer --contenders" in (why_no_room(bundle, weights) or "")
