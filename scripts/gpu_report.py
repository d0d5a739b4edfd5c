#!/usr/bin/env python
"""Check hypersd on this machine's GPU and write a Markdown report; scripts/gpu_check.sh prepares the environment.

Each part is a program with a time limit: one that hangs, crashes or spoils the CUDA context must not affect the next,
and libnvinfer and libtensorrt_rtx, which define the same C++ names, must not be loaded into one process.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINTS = ("Hyper-SD15-1step-lora", "Hyper-SDXL-1step-lora")
TENSORRT = ("tensorrt-rtx", "tensorrt")
BACKENDS = (*TENSORRT, "onnxruntime")
TEST_SECONDS = 400  # of one test with its fixtures
SHOWN_OUTPUT = 20_000  # characters of a part's output
OK, FAILED, NOT_RUN = "ok", "failed", "not run"
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "PYTHONFAULTHANDLER": "1", "COLUMNS": "120"}

# Messages about a GPU that a release of TensorRT does not know, which is no failure. Narrow: a match hides an error.
UNSUPPORTED_GPU = re.compile(
    r"UNSUPPORTED_CC|\b(?:SM|GPU|compute capability|architecture)\b[^;:)]{0,40}\b(?:is|are) not supported"
    r"|unsupported (?:SM|GPU|compute capability|architecture)"
    r"|does not support (?:this )?(?:SM|GPU|compute capability|architecture)"
    r"|no kernel image is available|portable engines run on compute capability",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a part: ``why`` is one line for a failure or a part that was not run, ``text`` is its output."""

    kind: str  # "facts", "images", "tests" or "latency"
    subject: str  # the backend or the bundle
    state: str = OK
    why: str = ""
    text: str = ""
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.kind} of {self.subject}: {self.state}{self.why and f': {self.why}'}"

    def block(self) -> str:
        return f"## {self}\n\n```\n{self.text.strip()[-SHOWN_OUTPUT:]}\n```"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="default: benchmarks/gpu-NAME.md")
    parser.add_argument("--bundle", type=Path, action="append", default=[], help="measure this one too, as it is built")
    parser.add_argument("--work", type=Path, default=ROOT / "out/gpu-check", help="for tiny bundles and logs")
    parser.add_argument("--only", nargs="+", choices=("images", "tests", "latency"), help="a pass needs images, tests")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for each program (600), 3x for tests")
    parser.add_argument("--facts", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.facts:
        return print_facts()
    args.work.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for outcome in run_all(args):
        print(outcome.block(), flush=True)
        outcomes.append(outcome)
        write_report(args.out, ["unfinished: this run was cut off"], outcomes)
    passed, lines = verdict(outcomes)
    print("## Verdict", *lines, f"report: {write_report(args.out, lines, outcomes)}", sep="\n")
    sys.exit(not passed)


def run_all(args: argparse.Namespace) -> Iterator[Outcome]:
    """Run the parts one after another; a part for which there is a reason against it is not run."""

    def run(kind: str, subject: str, reason: str, part: Callable[..., Outcome]) -> Outcome:
        reason = "left out by --only" if args.only and kind not in args.only else reason
        return Outcome(kind=kind, subject=subject, state=NOT_RUN, why=reason) if reason else part(subject, args)

    yield (facts := find_facts(args))
    reasons, ran = facts.data.get("reasons", {}), []
    for backend in BACKENDS:
        yield (outcome := run("images", backend, reasons.get(backend, ""), check_images))
        ran += [backend] if outcome.state == OK else []
    for backend in BACKENDS:
        yield run("tests", backend, reasons.get(backend, ""), run_tests)
    none, rivals = "" if ran else "no backend runs", ["hypersd-onnxruntime"] if "onnxruntime" in ran else []
    for bundle in [*args.bundle, *(args.work / f"tiny-{name}-{backend}" for backend in ran for name in CHECKPOINTS)]:
        yield run("latency", str(bundle), none, functools.partial(measure_latency, rivals))


def write_report(path: Path | None, said: Sequence[str], outcomes: Sequence[Outcome]) -> Path:
    gpu = outcomes[0].data.get("gpu", "an unknown GPU")
    path = path or ROOT / f"benchmarks/gpu-{re.sub('[^a-z0-9]+', '-', gpu.lower())}.md"
    head = f"# hypersd on {gpu}\n\n{time.strftime('%Y-%m-%d')}, `{' '.join(['scripts/gpu_check.sh', *sys.argv[1:]])}`"
    blocks = ["## Verdict\n\n" + "\n".join(f"- {line}" for line in said), *(outcome.block() for outcome in outcomes)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join([head, *blocks]) + "\n", "utf-8")
    return path


def verdict(outcomes: Sequence[Outcome]) -> tuple[bool, list[str]]:
    """A pass requires that nothing failed, that a backend generated on the GPU, and that tests of it passed."""
    fails = [f"FAIL: {outcome}" for outcome in outcomes if outcome.state == FAILED]
    tests = [outcome for outcome in outcomes if outcome.kind == "tests"]
    ran = [outcome.subject for outcome in outcomes if outcome.kind == "images" and outcome.state == OK]
    if not ran:
        fails.append("FAIL: no image was generated on the GPU")
    elif not any(outcome.data.get("passed") for outcome in tests if outcome.subject in ran):
        fails.append(f"FAIL: no test passed of {', '.join(ran)}")
    unchecked = [f"Not checked: {outcome}" for outcome in outcomes if outcome.state == NOT_RUN]
    for outcome in tests:
        skips = outcome.data.get("skips", {}) if outcome.state != NOT_RUN else {}
        unchecked += [f"Not checked: {count} tests of {outcome.subject}: {why}" for why, count in skips.items()]
    passed = sum(outcome.data.get("passed", 0) for outcome in tests)
    return not fails, [*(fails or [f"PASS: {', '.join(ran)}; tests passed: {passed}"]), *unchecked]


def run_limited(command: Sequence[str], seconds: float, log: Path, **environment: str) -> tuple[int | None, str, str]:
    """Run a program until its time is up, and return its exit code, how it ended if not well, and its output."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "0")  # tests/conftest.py hides all unless the variable is set
    environment = {**os.environ, **ENVIRONMENT, "CUDA_VISIBLE_DEVICES": devices, **environment}
    with log.open("wb") as output:  # a pipe would be kept open by children that outlive the program
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **streams)
        code, how = None, f"timed out after {seconds:g} s"
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(seconds)
            how = f"ended with exit code {code}" if code else ""
            how = f"died with signal {-code} ({signal.Signals(-code).name})" if code < 0 else how
        for number in (signal.SIGABRT, signal.SIGKILL):  # at SIGABRT Python prints where it was
            with contextlib.suppress(ProcessLookupError, PermissionError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.wait(5)
    return code, how, log.read_text(errors="replace")


def find_facts(args: argparse.Namespace) -> Outcome:
    """Describe the machine, and find what keeps each backend from running: the last line of this file with --facts."""
    _, how, output = run_limited([sys.executable, __file__, "--facts"], args.timeout, args.work / "facts.log")
    text, _, last = output.strip().rpartition("\n")
    state, data = (FAILED, {}) if how else (OK, json.loads(last))
    return Outcome(kind="facts", subject="machine", state=state, why=how, text=text if data else output, data=data)


def print_facts() -> None:
    print(platform.platform(), f"Python {platform.python_version()}", sys.executable, sep="\n", flush=True)
    for command in ("git describe --always --dirty", "nvidia-smi", f"{sys.executable} -m pip freeze"):
        subprocess.run(command, shell=True, stderr=subprocess.STDOUT, timeout=20)
    import onnxruntime
    import torch

    from hypersd.engines.tensorrt.machine import this_machine, why_not_backend

    print(f"torch for CUDA {torch.version.cuda}: {' '.join(torch.cuda.get_arch_list())}")
    print(machine := this_machine())
    own = {backend: why_not_backend(backend, machine) for backend in TENSORRT}
    if "CUDAExecutionProvider" not in (has := onnxruntime.get_available_providers()):
        own["onnxruntime"] = f"onnxruntime has no CUDA provider, only {', '.join(has)}"
    reasons = {name: "; ".join(dict.fromkeys(filter(None, [machine.no_gpu, own.get(name)]))) for name in BACKENDS}
    print(json.dumps({"gpu": machine.gpu.name if machine.gpu else "no GPU", "reasons": reasons}))


def check_images(backend: str, args: argparse.Namespace) -> Outcome:
    """Export tiny bundles with random weights, build their engines, and compare their images with diffusers'."""
    from hypersd.export.checkpoints import HYPER_SD_REPO, find_checkpoint

    hub, hypersd, commands = args.work / f"hub-{backend}", [sys.executable, "-m", "hypersd.cli"], []
    for name in CHECKPOINTS:
        checkpoint, bundle = find_checkpoint(name), args.work / f"tiny-{name}-{backend}"
        vae = ["--vae", str(hub / "madebyollin/sdxl-vae-fp16-fix")] if "SDXL" in name else []
        sources = ["--base", str(hub / checkpoint.base), "--lora", str(hub / HYPER_SD_REPO / checkpoint.filename), *vae]
        commands.append([*hypersd, "export", "--ckpt", name, "--out", str(bundle), *sources])
        commands += [[*hypersd, "build", str(bundle), "--backend", backend]] if backend in TENSORRT else []
        commands.append([*hypersd, "verify", str(bundle), "--backend", backend])
    for folder in args.work.glob(f"*-{backend}/"):  # of an earlier run
        shutil.rmtree(folder)
    how, text = "", ""
    for command in [[sys.executable, "scripts/make_tiny_repos.py", str(hub)], *commands]:
        _, how, output = run_limited(command, args.timeout, args.work / f"images-{backend}.log")
        text += f"$ {' '.join(command[2:])}\n{output}\n"
        if how:
            break
    last = text.strip().splitlines()[-1]
    is_unsupported = backend in TENSORRT and UNSUPPORTED_GPU.search(last)
    state = OK if not how else NOT_RUN if is_unsupported else FAILED
    return Outcome(kind="images", subject=backend, state=state, why=how and f"{how}: {last}", text=text)


def run_tests(backend: str, args: argparse.Namespace) -> Outcome:
    """Run pytest once for each file with tests marked gpu: a crash or a hang costs only the tests of its file."""
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    files = [path for path in files if (path.name == "test_tensorrt.py") == (backend in TENSORRT)]
    passed, skips, whys, outputs = 0, Counter[str](), [], []
    end = time.monotonic() + 3 * args.timeout
    options = ["-m", "gpu", "-v", "-rfE", "--color=no", "-p", "no:cacheprovider", "-o"]
    options += [f"faulthandler_timeout={TEST_SECONDS}", "-o", "faulthandler_exit_on_timeout=true"]
    for file in files:
        xml = args.work / f"tests-{backend}-{file.stem}.xml"
        xml.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", *options, str(file), f"--junitxml={xml}"]
        left = max(1.0, end - time.monotonic())
        code, how, output = run_limited(command, left, xml.with_suffix(".log"), HYPERSD_BACKENDS=backend)
        errors = [f"{file.name}: {how or 'no result'}"] if code not in (0, 1, 5) or not xml.exists() else []  # 5: none
        for case in ElementTree.parse(xml).iter("testcase") if xml.exists() else []:
            tags = {child.tag: child.get("message") or "" for child in case}
            if tags.keys() & {"failure", "error"}:
                errors.append(f"{file.name}::{case.get('name')} failed")
            skips.update([tags["skipped"]] if "skipped" in tags else [])
            passed += not tags.keys() & {"failure", "error", "skipped"}
        whys, outputs = whys + errors, [*outputs, output] if errors else outputs
    state = FAILED if whys else OK if passed else NOT_RUN
    why = "; ".join(whys) if whys else "" if passed else f"all were skipped: {'; '.join(skips) or 'there is none'}"
    text = "\n".join([f"{passed} passed, {len(whys)} failed, {sum(skips.values())} skipped", *outputs])
    data = {"passed": passed, "skips": skips}
    return Outcome(kind="tests", subject=backend, state=state, why=why, text=text, data=data)


def measure_latency(rivals: Sequence[str], bundle: str, args: argparse.Namespace) -> Outcome:
    """Run `hypersd bench`, whose tables are the text; its JSON tells of failures and of images that differ."""
    path = args.work / f"latency-{Path(bundle).name}.json"
    command = [sys.executable, "-m", "hypersd.cli", "bench", bundle, "--contenders", "hypersd", *rivals, "--steps"]
    command += ["1", "4", "--rounds", "30", "--warmup", "5", "--json", str(path)]
    code, how, output = run_limited(command, args.timeout, path.with_suffix(".log"))
    report = json.loads(path.read_text("utf-8")) if code == 0 else {"contenders": [], "comparisons": []}
    whys = [f"{entry['name']}: {entry['failure']}" for entry in report["contenders"] if entry["failure"]]
    rows = [row for comparison in report["comparisons"] for row in comparison["rows"]]
    whys += [f"{r['contender']}: another image" for r in rows if r["sameness"] and r["sameness"]["verdict"] == "other"]
    state, why = FAILED if how or whys else OK, how or "; ".join(whys)
    return Outcome(kind="latency", subject=bundle, state=state, why=why, text=output)


if __name__ == "__main__":
    main()
