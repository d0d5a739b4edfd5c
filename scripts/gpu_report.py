#!/usr/bin/env python
"""What scripts/gpu_check.sh runs: facts of the machine, what draws on its GPU, the gpu tests, latencies, a verdict.

Every part that touches the GPU is a process of its own with a time limit (this file with --part), because one that
hangs, crashes or spoils the CUDA context must not take the next one with it, and because libnvinfer and
libtensorrt_rtx, which define the same C++ names, must not meet. The report is written anew after every part. Bundles
for the latencies are tiny ones made here, which measure overhead, unless --bundle names others.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib
import importlib.metadata
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TENSORRT_PACKAGES = ("tensorrt-rtx", "tensorrt-rtx-cu13-libs", "tensorrt", "tensorrt-cu13-libs", "tensorrt-cu12-libs")
ONNX_PACKAGES = ("onnxruntime-gpu", "onnxruntime", "polygraphy", "onnx")
PACKAGES = ("torch", *TENSORRT_PACKAGES, *ONNX_PACKAGES, "diffusers", "transformers", "pytest", "numpy")
CHECKPOINTS = ("Hyper-SD15-1step-lora", "Hyper-SDXL-1step-lora")
TENSORRT = ("tensorrt-rtx", "tensorrt")
ONNX_RUNTIME = "onnxruntime"
BACKENDS = (*TENSORRT, ONNX_RUNTIME)
ONNX_RUNTIME_PIP = "pip uninstall -y onnxruntime && pip install --no-deps --force-reinstall onnxruntime-gpu"
PSNR = 30.0  # dB, what `hypersd verify` asks of fp16
WARM_UPS, ROUNDS, SECONDS_OF_ROUNDS = 5, 30, 60
STEPS = (1, 4)
FACTS_SECONDS, PART_SECONDS, TESTS_SECONDS = 120.0, 600.0, 1800.0
SECONDS_TO_DIE = 5.0
TEST_SECONDS = 400  # for one test with its fixtures; then pytest prints where it is and ends
RESTARTS = 4  # of pytest, after tests that ended its process
LAST_LINES = 25  # of a part that went wrong
SHOWN_OUTPUT = 20_000  # characters of a test run that went wrong

OK, FAILED, NOT_RUN = "ok", "failed", "not run"

# What TensorRT and this package say of a GPU that a build of TensorRT does not know: such a GPU is a fact to write
# down and not a failure. Narrow on purpose, since what matches hides an error.
UNSUPPORTED_GPU = re.compile(
    r"UNSUPPORTED_CC"
    r"|\b(?:SM|GPU|compute capability|architecture)\b[^;:)]{0,40}\b(?:is|are) not supported"
    r"|unsupported (?:SM|GPU|compute capability|architecture)"
    r"|does not support (?:this )?(?:SM|GPU|compute capability|architecture)"
    r"|no kernel image is available"
    r"|portable engines run on compute capability",
    re.IGNORECASE,
)


def is_unsupported_gpu(error: BaseException) -> bool:
    """Whether an error of this package says that TensorRT does not know the GPU."""
    from hypersd.errors import EngineError

    return isinstance(error, EngineError) and UNSUPPORTED_GPU.search(str(error)) is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a part went.

    Attributes:
        kind: ``"facts"``, ``"bundles"``, ``"draw"``, ``"tests"`` or ``"latency"``.
        title: its heading in the report.
        state: :data:`OK`, :data:`FAILED` or :data:`NOT_RUN`.
        why: what failed, or why it was not run: one line.
        text: what else there is to say, as Markdown.
        data: what later parts and the verdict need of it.
    """

    kind: str
    title: str
    state: str
    why: str = ""
    text: str = ""
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def shown(self) -> str:
        said = {OK: "", FAILED: f"**failed**: {self.why}", NOT_RUN: f"not run: {self.why}"}[self.state]
        return "\n\n".join(filter(None, [said, self.text]))


# The report


def main() -> None:
    args = parse_args()
    if args.part:
        sys.exit(run_here(args))
    with contextlib.ExitStack() as stack:
        if args.work is None:
            args.work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hypersd-gpu-check-")))
        args.work.mkdir(parents=True, exist_ok=True)
        passed = make_report(args)
    sys.exit(not passed)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="default: benchmarks/gpu-NAME.md")
    parser.add_argument("--bundle", type=Path, action="append", default=[], help="time this one too, with its engines")
    parser.add_argument("--work", type=Path, help="keep tiny bundles and logs here; default: a temporary folder")
    parser.add_argument("--skip-tests", action="store_true", help="which is no pass, whatever else there is")
    parser.add_argument("--only", nargs="+", choices=("draw", "tests", "latency"), help="these parts, not the others")
    parser.add_argument("--timeout", type=float, default=PART_SECONDS, help="seconds for a part (%(default)g)")
    parser.add_argument("--test-timeout", type=float, default=TESTS_SECONDS, help="for each test run (%(default)g)")
    for hidden in ("--part", "--result", "--backend"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    return parser.parse_args()


def make_report(args: argparse.Namespace) -> bool:
    """Run all parts, write them down, and say whether that was a pass."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # what dies would leave gigabytes
        resource = importlib.import_module("resource")
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    facts = run_part("facts", "Machine", args.work, min(args.timeout, FACTS_SECONDS))
    gpu = facts.data.get("gpu") or ("no GPU" if facts.state == OK else "an unknown GPU")
    out = args.out or ROOT / f"benchmarks/gpu-{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}.md"
    report = Report(out, f"hypersd on {gpu}")
    report.add(facts)
    reasons = facts.data.get("reasons", {})
    bundles = report.add(make_bundles(args, facts)).data.get("bundles", [])
    for backend in BACKENDS:
        report.add(check_drawing(args, backend, bundles, reasons.get(backend)))
    for backend in (*TENSORRT, ""):
        reason = reasons.get(backend) if backend else facts.data.get("no_gpu")
        report.add(check_tests(args, backend, reason))
    for bundle in [*map(str, args.bundle), *bundles]:
        for contenders in rivals(report.outcomes):
            report.add(check_latency(args, bundle, contenders))
    if not any(outcome.kind == "latency" for outcome in report.outcomes):
        why = facts.data.get("no_gpu") or ("no bundle" if rivals(report.outcomes) else "nothing drew on the GPU")
        report.add(Outcome(kind="latency", title="Latency", state=NOT_RUN, why=why))
    passed = report.finish()
    print(f"report: {out}")
    return passed


class Report:
    """A Markdown file, written anew with every part, so that one that was cut off says what it has."""

    def __init__(self, path: Path, title: str) -> None:
        self.path = path
        self.outcomes: list[Outcome] = []
        self._head = f"# {title}\n\n{datetime.date.today()}, `{' '.join(['scripts/gpu_check.sh', *sys.argv[1:]])}`"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._write("unfinished: this run was cut off")

    def add(self, outcome: Outcome) -> Outcome:
        print(f"== {outcome.title}\n{outcome.shown()}", flush=True)
        self.outcomes.append(outcome)
        self._write("unfinished: this run was cut off")
        return outcome

    def finish(self) -> bool:
        """Write the verdict; whether it is a pass."""
        passed, lines = verdict(self.outcomes)
        print("== Verdict", *lines, sep="\n", flush=True)
        self._write("\n".join(f"- {line}" for line in lines))
        return passed

    def _write(self, said: str) -> None:
        parts = [f"## {outcome.title}\n\n{outcome.shown()}" for outcome in self.outcomes]
        self.path.write_text("\n\n".join([self._head, f"## Verdict\n\n{said}", *parts]) + "\n", encoding="utf-8")


def verdict(outcomes: Sequence[Outcome]) -> tuple[bool, list[str]]:
    """Whether that was a pass, and a line for all that speaks against it or was not checked.

    A pass takes that nothing failed, that a backend drew on the GPU, and that tests of it passed.
    """
    fails = [f"FAIL: {outcome.title}: {outcome.why}" for outcome in outcomes if outcome.state == FAILED]
    drew = [outcome.data["backend"] for outcome in outcomes if outcome.kind == "draw" and outcome.state == OK]
    tests = [outcome for outcome in outcomes if outcome.kind == "tests"]
    tested = [backend for outcome in tests if outcome.data.get("passed") for backend in outcome.data["backends"]]
    if not drew:
        fails.append(f"FAIL: nothing drew on the GPU: {_whys(outcomes, 'draw')}")
    elif not set(drew) & set(tested):
        fails.append(f"FAIL: no test passed of what drew on the GPU ({', '.join(drew)}): {_whys(tests, 'tests')}")
    if not any(outcome.data.get("passed") for outcome in tests):
        fails.append(f"FAIL: no test passed at all: {_whys(tests, 'tests')}")
    unchecked = [f"Not checked: {line}" for outcome in outcomes for line in _unchecked(outcome)]
    passes = [f"PASS: drew on the GPU: {', '.join(drew)}; tests passed: {_count(tests, 'passed')}"]
    return not fails, [*(fails or passes), *dict.fromkeys(unchecked)]


def _whys(outcomes: Sequence[Outcome], kind: str) -> str:
    """Why the parts of a kind did not do; each reason once."""
    reasons: dict[str, None] = {}
    for outcome in outcomes:
        if outcome.kind == kind:
            reasons |= dict.fromkeys(outcome.why.split("; ") if outcome.why else outcome.data.get("skips", {}))
    return "; ".join(reasons) or "none was run"


def _unchecked(outcome: Outcome) -> Iterator[str]:
    if outcome.state == NOT_RUN:
        yield f"{outcome.title}: {outcome.why}"
    else:
        for reason, count in outcome.data.get("skips", {}).items():
            yield f"{outcome.title}: {count} skipped: {reason}"


def _count(outcomes: Sequence[Outcome], name: str) -> int:
    return sum(outcome.data.get(name, 0) for outcome in outcomes)


# Parts, as the report sees them


def make_bundles(args: argparse.Namespace, facts: Outcome) -> Outcome:
    if no_gpu := facts.data.get("no_gpu"):
        return Outcome(kind="bundles", title="Tiny bundles", state=NOT_RUN, why=no_gpu)
    hidden = {"CUDA_VISIBLE_DEVICES": ""}  # an export needs no GPU and must not fail because of one
    return run_part("bundles", "Tiny bundles", args.work, args.timeout, environment=hidden)


def check_drawing(args: argparse.Namespace, backend: str, bundles: Sequence[str], reason: str | None) -> Outcome:
    title = f"Does {backend} run here?"
    reason = _left_out(args, "draw") or reason or ("" if bundles else "there is no bundle to draw from")
    if reason:
        return Outcome(kind="draw", title=title, state=NOT_RUN, why=reason, data={"backend": backend})
    options = ["--backend", backend, "--bundle", bundles[-1]]
    outcome = run_part("draw", title, args.work, args.timeout, options)
    return dataclasses.replace(outcome, data={"backend": backend, **outcome.data})


def rivals(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """What is timed side by side: each TensorRT that drew with ONNX Runtime, and never two of them in one process."""
    drew = [outcome.data["backend"] for outcome in outcomes if outcome.kind == "draw" and outcome.state == OK]
    others = [backend for backend in drew if backend == ONNX_RUNTIME]
    return [[backend, *others] for backend in drew if backend in TENSORRT] or ([others] if others else [])


def check_latency(args: argparse.Namespace, bundle: str, contenders: Sequence[str]) -> Outcome:
    title = f"Latency: {Path(bundle).name}, {' beside '.join(contenders)}"
    if reason := _left_out(args, "latency"):
        return Outcome(kind="latency", title=title, state=NOT_RUN, why=reason)
    options = ["--backend", ",".join(contenders), "--bundle", bundle]
    return run_part("latency", title, args.work, args.timeout, options)


def check_tests(args: argparse.Namespace, backend: str, reason: str | None) -> Outcome:
    """The tests of a flavour of TensorRT; with ``""`` the others that are marked gpu, ONNX Runtime's above all."""
    title = f"Tests of {backend}" if backend else "Tests of CUDA graphs and ONNX Runtime"
    backends = [backend or ONNX_RUNTIME]
    reason = ("left out by --skip-tests" if args.skip_tests else _left_out(args, "tests")) or reason
    if reason:
        return Outcome(kind="tests", title=title, state=NOT_RUN, why=reason, data={"backends": backends})
    file = "tests/gpu/test_tensorrt.py"
    paths = [file] if backend else ["tests", f"--ignore={file}"]
    run = run_tests(paths, args.work / f"tests-{backend or 'other'}.log", args.test_timeout, backend)
    return judge_tests(run, title, backends)


def _left_out(args: argparse.Namespace, part: str) -> str:
    return "left out by --only" if args.only and part not in args.only else ""


# Processes


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended: ``how`` is empty for exit code 0; ``output`` is all that it said."""

    how: str
    code: int | None
    output: str

    def last_lines(self) -> str:
        return "\n".join(self.output.strip().splitlines()[-LAST_LINES:])


def run_limited(command: Sequence[str], seconds: float, log: Path, environment: Mapping[str, str] = {}) -> Ended:
    """Run a program until its time is up, then end it and all that it started.

    What it says goes to a file: a pipe would be kept open by what outlives it. It is ended by SIGABRT, at which Python
    prints where it was.
    """
    environment = {**os.environ, **COMMON_ENVIRONMENT, **visible_devices(), **environment}
    with log.open("w+b") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(seconds)
            how = _how_ended(code)
        except subprocess.TimeoutExpired:
            code, how = None, f"timed out after {seconds:g} s"
            _end(process, signal.SIGABRT)
        finally:
            _end(process, signal.SIGKILL)
        output.seek(0)
        return Ended(how, code, output.read().decode(errors="replace"))


COMMON_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "PYTHONFAULTHANDLER": "1",
    "PYTHONUNBUFFERED": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


def visible_devices() -> dict[str, str]:
    """The first GPU, unless the caller chose; tests/conftest.py hides all of them by default."""
    return {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}


def _how_ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}" if code else ""
    with contextlib.suppress(ValueError):
        return f"died with signal {-code} ({signal.Signals(-code).name})"
    return f"died with signal {-code}"


def _end(process: subprocess.Popen, signum: int) -> None:
    """End the process and its children. One that hangs in the driver may not even be killed: it is left behind."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signum)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(SECONDS_TO_DIE)


def run_part(
    name: str,
    title: str,
    work: Path,
    seconds: float,
    options: Sequence[str] = (),
    environment: Mapping[str, str] = {},
    program: Path = Path(__file__),
) -> Outcome:
    """Run a part of :data:`PARTS` in a process of its own, and tell how it went, whatever became of it."""
    stem = "-".join([name, *(Path(option).name for option in options[1::2])])
    result, log = work / f"{stem}.json", work / f"{stem}.log"
    result.unlink(missing_ok=True)
    command = [sys.executable, str(program), "--part", name, "--result", str(result), *options]
    try:
        ended = run_limited(command, seconds, log, environment)
    except OSError as error:
        return Outcome(kind=name, title=title, state=FAILED, why=f"could not be started: {error}")
    return outcome_of(name, title, result, ended)


def outcome_of(name: str, title: str, result: Path, ended: Ended) -> Outcome:
    """What a part wrote down and how its process ended, as one."""
    try:
        outcome = Outcome(**{**json.loads(result.read_text("utf-8")), "kind": name, "title": title})
    except (OSError, ValueError, TypeError):
        outcome = Outcome(kind=name, title=title, state=FAILED)
        ended = ended if ended.how else dataclasses.replace(ended, how="ended without a result")
    if not ended.how and outcome.state != FAILED:
        return outcome
    how = f"{ended.how} after all was done" if ended.how and outcome.state == OK else ended.how
    why = "; ".join(filter(None, [outcome.why, how]))
    text = "\n\n".join(filter(None, [outcome.text, _block("Its last lines:", ended.last_lines())]))
    return dataclasses.replace(outcome, state=FAILED, why=why, text=text)


def _block(title: str, text: str) -> str:
    return f"{title}\n\n```\n{text}\n```" if text else "It said nothing."


# Parts, as their processes see them. A part returns the fields of its outcome.


def run_here(args: argparse.Namespace) -> int:
    """Be the process of a part. What it raises is its result too; the traceback is for the log."""
    try:
        fields = PARTS[args.part](args)
    except Exception as error:
        traceback.print_exc()
        fields = {"state": FAILED, "why": exact(error)}
    Path(args.result).write_text(json.dumps(fields), encoding="utf-8")
    return 0


def exact(error: BaseException) -> str:
    return f"`{type(error).__name__}: {' '.join(str(error).split())}`"


def part_facts(args: argparse.Namespace) -> dict[str, Any]:
    """The machine, and what is known to keep a backend from running."""
    facts: dict[str, Callable[[], Any]] = {
        "system": platform.platform,
        "python": lambda: f"{platform.python_version()}, {sys.executable}",
        "commit": _commit,
        "nvidia-smi": lambda: _say(["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv"]),
        "GPU": _gpu,
        "CUDA of the driver": lambda: _hypersd("engines.tensorrt.machine").driver_cuda_version(),
        "CUDA of torch": lambda: importlib.import_module("torch").version.cuda,
        "torch is built for": lambda: " ".join(importlib.import_module("torch").cuda.get_arch_list()),
        "providers of ONNX Runtime": lambda: " ".join(_providers()),
        **{package: lambda package=package: importlib.metadata.version(package) for package in PACKAGES},
        "hypersd": lambda: _hypersd("engines").__file__,
    }
    rows = {name: _fact(look) for name, look in facts.items()}
    table = "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    try:
        no_gpu, reasons = known_reasons()
        gpu = "" if no_gpu else importlib.import_module("torch").cuda.get_device_name(0)
    except Exception as error:  # the table is worth having; other parts are then tried and say for themselves
        traceback.print_exc()
        return {"state": FAILED, "why": exact(error), "text": table}
    return {"state": OK, "text": table, "data": {"gpu": gpu, "no_gpu": no_gpu, "reasons": reasons}}


def _fact(look: Callable[[], Any]) -> str:
    try:
        value = look()
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
    except Exception as error:
        value = exact(error)
    return " ".join(str(value).replace("|", "/").split()) or "none"


def _hypersd(module: str) -> Any:
    return importlib.import_module(f"hypersd.{module}")


def _gpu() -> str:
    import torch

    properties = torch.cuda.get_device_properties(0)
    free, _ = torch.cuda.mem_get_info(0)
    memory = f"{properties.total_memory / 1e9:.1f} GB, {free / 1e9:.1f} GB of it free"
    return f"{properties.name}, compute capability {properties.major}.{properties.minor}, {memory}"


def _providers() -> list[str]:
    import onnxruntime

    return onnxruntime.get_available_providers()


def _commit() -> str:
    git = ["git", "-C", str(ROOT)]
    changed = " and changes" if _say([*git, "status", "--porcelain", "-uno"]) else ""
    return _say([*git, "rev-parse", "--short", "HEAD"]) + changed


def _say(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()


def known_reasons() -> tuple[str, dict[str, str]]:
    """Why there is no GPU, empty if there is one, and all that keeps each backend from running."""
    from hypersd.engines.tensorrt.machine import this_machine, why_not_backend

    machine = this_machine()
    own = {backend: why_not_backend(backend, machine) for backend in TENSORRT}
    own[ONNX_RUNTIME] = why_not_onnx_runtime()
    reasons = {backend: [machine.no_gpu, reason or ""] for backend, reason in own.items()}
    joined = {backend: "; ".join(dict.fromkeys(filter(None, both))) for backend, both in reasons.items()}
    return machine.no_gpu, {backend: reason for backend, reason in joined.items() if reason}


def why_not_onnx_runtime() -> str:
    try:
        providers = _providers()
    except Exception as error:
        return f"onnxruntime cannot be imported: {exact(error)}: {ONNX_RUNTIME_PIP}"
    if "CUDAExecutionProvider" in providers:
        return ""
    return f"the installed onnxruntime has no CUDA provider, only {', '.join(providers)}: {ONNX_RUNTIME_PIP}"


def part_bundles(args: argparse.Namespace) -> dict[str, Any]:
    """Tiny bundles with random weights, exported here."""
    from make_tiny_repos import write_all

    work = Path(args.result).parent
    hub = work / "hub"
    if not hub.exists():
        write_all(unfinished := work / "hub.partial")
        unfinished.rename(hub)
    roots = [str(_export(hub, name, work / f"tiny-{name}")) for name in CHECKPOINTS]
    return {"state": OK, "text": ", ".join(roots), "data": {"bundles": roots}}


def _export(hub: Path, name: str, root: Path) -> Path:
    from hypersd.export import ExportOptions, export_bundle
    from hypersd.export.checkpoints import HYPER_SD_REPO, find_checkpoint
    from hypersd.export.sources import SourceOptions

    checkpoint = find_checkpoint(name)
    sources = SourceOptions(
        base=str(hub / checkpoint.base),
        lora=str(hub / HYPER_SD_REPO / checkpoint.filename),
        vae=str(hub / "madebyollin/sdxl-vae-fp16-fix") if "SDXL" in name else None,
    )
    return export_bundle(name, root, ExportOptions(sources=sources)).root


class Stages:
    """Tells of every stage as it goes, so that the last lines of a process that died say where, and keeps the notes."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self._began = time.perf_counter()

    def start(self, stage: str) -> None:
        print(f"{stage} ...", flush=True)

    def update(self, fraction: float, detail: str) -> None:
        pass

    def finish(self, stage: str, seconds: float, note: str, ok: bool) -> None:
        self.note(f"{stage}: {seconds:.2f} s{'' if ok else ', failed'}{f' ({note})' if note else ''}")

    def note(self, text: str) -> None:
        print(text, flush=True)
        self.done.append(text)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A step of a part; what is raised inside names it."""
        began, is_ok = time.perf_counter(), False
        self.start(name)
        try:
            yield
            is_ok = True
        finally:
            self.finish(f"**{name}**", time.perf_counter() - began, "", is_ok)


def part_draw(args: argparse.Namespace) -> dict[str, Any]:
    """Build if need be, load without and with what an earlier load left, draw, and compare with the CPU."""
    import torch

    stages = Stages()
    try:
        error = draw(args.bundle[0], args.backend, stages)
        torch.cuda.synchronize()
    except Exception as caught:
        traceback.print_exc()
        state = NOT_RUN if args.backend in TENSORRT and is_unsupported_gpu(caught) else FAILED
        why = f"this GPU is not supported: {exact(caught)}" if state == NOT_RUN else exact(caught)
        return {"state": state, "why": why, "text": _items(stages.done)}
    if error:
        return {"state": FAILED, "why": error, "text": _items(stages.done)}
    return {"state": OK, "text": "yes\n\n" + _items(stages.done)}


def draw(bundle: Path, backend: str, stages: Stages) -> str:
    """What is wrong with the image; empty if nothing is."""
    from hypersd import Pipeline
    from hypersd.engines import build_engines

    if backend in TENSORRT:
        with stages.stage("build"):
            build_engines(bundle, backend, progress=stages)
        for cache in bundle.glob("engines/*/*.cache"):  # else the load is not cold
            cache.unlink()
    with stages.stage("cold load"):
        pipe = Pipeline.load(bundle, backend=backend, device="cuda", progress=stages)
    with stages.stage("first image"):
        image = pipe("a cat", seed=0, output_type="np").images
    with stages.stage("later images"):  # the third is recorded as a CUDA graph
        later = [pipe("a cat", seed=0, output_type="np").images for _ in range(4)]
    with stages.stage("warm load"):
        Pipeline.load(bundle, backend=backend, device="cuda", progress=stages)
    stages.note(f"drawn on {pipe.device}; one CUDA graph for all: {'yes' if pipe._graphed is not None else 'no'}")
    with stages.stage("the same on the CPU"):
        expected = Pipeline.load(bundle, backend=ONNX_RUNTIME, device="cpu")("a cat", seed=0, output_type="np").images
    worst = min(psnr(one, expected) for one in [image, *later])
    stages.note(f"PSNR against ONNX Runtime on the CPU: {worst:.1f} dB at least")
    if pipe.device.type != "cuda":
        return f"it drew on {pipe.device}"
    return "" if worst >= PSNR else f"the image differs from the CPU's: PSNR {worst:.1f} dB, expected {PSNR:g}"


def psnr(a: Any, b: Any) -> float:
    import numpy as np

    return float(10 * np.log10(1 / max(float(np.mean((a.astype(np.float64) - b) ** 2)), 1e-20)))


def _items(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def part_latency(args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds an image on the host's clock, interleaved: each round draws once with each contender."""
    stages = Stages()
    contenders = {}
    errors: dict[str, str] = {}
    for backend in args.backend.split(","):
        with told(errors, backend):
            contenders[backend] = load_contender(args.bundle[0], backend, stages)
    rows = ["| contender | device | steps | rounds | median ms | p95 ms | least ms |", "|---|---|---|---|---|---|---|"]
    for steps in STEPS:
        for name, times in interleaved(contenders, steps, errors).items():
            rows.append(_row(name, contenders[name].device, steps, sorted(times)))
    why = "; ".join(f"{name}: {error}" for name, error in errors.items())
    text = "\n".join([*rows, "", _items(stages.done)])
    return {"state": FAILED if errors else OK, "why": why, "text": text}


@contextlib.contextmanager
def told(errors: dict[str, str], name: str) -> Iterator[None]:
    """Note what is raised inside, and go on."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        errors[name] = exact(error)


def load_contender(bundle: Path, backend: str, stages: Stages) -> Any:
    from hypersd import Pipeline
    from hypersd.engines import build_engines

    if backend in TENSORRT:
        build_engines(bundle, backend, progress=stages)
    return Pipeline.load(bundle, backend=backend, device="cuda", progress=stages)


def interleaved(contenders: Mapping[str, Any], steps: int, errors: dict[str, str]) -> dict[str, list[float]]:
    """Seconds of the rounds that there was time for; one that fails is out."""
    times: dict[str, list[float]] = {name: [] for name in contenders if name not in errors}
    end = time.perf_counter() + SECONDS_OF_ROUNDS
    for i in range(WARM_UPS + ROUNDS):
        for name in [name for name in times if name not in errors]:
            began = time.perf_counter()
            with told(errors, name):
                contenders[name]("a photo of a cat", num_inference_steps=steps, seed=i, force=True)
                if i >= WARM_UPS:
                    times[name].append(time.perf_counter() - began)
        if i > WARM_UPS and time.perf_counter() > end:
            break
    return {name: seconds for name, seconds in times.items() if seconds}


def _row(name: str, device: object, steps: int, times: list[float]) -> str:
    figures = (statistics.median(times), times[int(0.95 * (len(times) - 1))], times[0])
    shown = " | ".join(f"{1e3 * seconds:.2f}" for seconds in figures)
    return f"| {name} | {device} | {steps} | {len(times)} | {shown} |"


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "facts": part_facts,
    "bundles": part_bundles,
    "draw": part_draw,
    "latency": part_latency,
}


# Tests


@dataclasses.dataclass
class TestRun:
    """What became of each test by its id, why some were skipped, and the ends of pytest that were no ends.

    ``fatal`` are the tests that ended its process.
    """

    __test__ = False  # pytest: no test of yours

    results: dict[str, str] = dataclasses.field(default_factory=dict)
    skips: Counter[str] = dataclasses.field(default_factory=Counter)
    broken: list[str] = dataclasses.field(default_factory=list)
    fatal: set[str] = dataclasses.field(default_factory=set)
    output: str = ""


_RESULT = re.compile(r"^(\S+::.+?) (PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)(?: \((.*?)\))?\s*(?:\[ *\d+%\])?$")
_BEGUN = re.compile(r"^(tests/\S+::\S+)")
_WORST = ("FAILED", "ERROR")


def run_tests(paths: Sequence[str], log: Path, seconds: float, backend: str) -> TestRun:
    """Run tests marked gpu; where one ends the process or hangs, go on with those after it.

    What failed before is run again then, because pytest tells the reasons only when it ends.
    """
    run, end = TestRun(), time.monotonic() + seconds
    environment = {"COLUMNS": "400", "HYPERSD_BACKENDS": backend}  # wide: reasons of skips are cut to a line
    for _ in range(1 + RESTARTS):
        before = len(run.results)
        done = [test for test, result in run.results.items() if result not in _WORST or test in run.fatal]
        command = [*pytest_command(), *paths, *(f"--deselect={test}" for test in done)]
        ended = run_limited(command, max(1.0, end - time.monotonic()), log, environment)
        ended = dataclasses.replace(ended, output=re.sub(r"([=_-])\1{40,}", r"\1" * 10, ended.output))
        running = read_results(ended.output, run)
        run.output += ended.output
        if running is None and ended.code in (0, 1, 5) and run.results:  # 1: some failed; 5: none was left
            break
        run.broken.append(f"{ended.how or 'no test was found'}{f' in {running}' if running else ''}")
        run.fatal |= {running} if running else set()
        if len(run.results) == before or ended.code is None:
            break
    return run


def pytest_command() -> list[str]:
    options = ["-m", "gpu", "-v", "-rfE", "--no-header", "--color=no", "--continue-on-collection-errors"]
    limit = ["-o", f"faulthandler_timeout={TEST_SECONDS}", "-o", "faulthandler_exit_on_timeout=true"]
    return [sys.executable, "-m", "pytest", *options, *limit, "-p", "no:cacheprovider"]


def read_results(output: str, run: TestRun) -> str | None:
    """Add what pytest -v said to ``run``; the test that was running when it stopped, if any, has failed."""
    begun: dict[str, None] = {}
    for line in output.splitlines():
        if found := _RESULT.match(line):
            test, result, reason = found.groups()
            if run.results.get(test) not in _WORST:
                run.results[test] = result
            if result == "SKIPPED":
                run.skips[reason or "no reason given"] += 1
        elif found := _BEGUN.match(line):
            begun[found[1]] = None
    unfinished = [test for test in begun if test not in run.results]
    run.results |= dict.fromkeys(unfinished, "FAILED")
    return unfinished[-1] if unfinished else None


def judge_tests(run: TestRun, title: str, backends: list[str]) -> Outcome:
    """Counts, reasons and, where something went wrong, pytest's words."""
    counts = Counter(run.results.values())
    passed, failed, skipped = counts["PASSED"], counts["FAILED"] + counts["ERROR"], counts["SKIPPED"]
    data = {"backends": backends, "passed": passed, "failed": failed, "skipped": skipped, "skips": dict(run.skips)}
    text = f"{passed} passed, {failed} failed, {skipped} skipped"
    skips = [f"{count} skipped: {reason}" for reason, count in run.skips.items()]
    errors = [f"{result}: {test}" for test, result in run.results.items() if result in _WORST]
    # A file that could not be imported is an error of no test.
    errors += re.findall(r"^ERROR: .+|^ERROR \S+\.py(?: - .*)?$", run.output, re.MULTILINE)
    state = FAILED if errors or run.broken else OK if passed else NOT_RUN
    whys = {FAILED: [*run.broken, *errors], OK: [], NOT_RUN: ["all were skipped: " + "; ".join(run.skips)]}[state]
    shown = [text, _items([*skips, *run.broken, *errors])]
    if state == FAILED:
        shown.append(_block("What pytest said:", run.output.strip()[-SHOWN_OUTPUT:]))
    why = "; ".join(whys[:5]) + (f" and {len(whys) - 5} more" if len(whys) > 5 else "")
    return Outcome(kind="tests", title=title, state=state, why=why, text="\n\n".join(filter(None, shown)), data=data)


if __name__ == "__main__":
    main()
