#!/usr/bin/env python
"""What scripts/gpu_check.sh runs: facts of the machine, whether TensorRT runs here, the gpu tests, latencies.

Every part is written down as it went, with the exact words of what failed; a part that cannot run does not stop the
next one. Bundles for the latencies are tiny ones made here, which measure overhead, unless --bundle names others.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "tensorrt-rtx", "tensorrt", "onnxruntime-gpu", "onnxruntime", "diffusers", "transformers")
CHECKPOINTS = ("Hyper-SD15-1step-lora", "Hyper-SDXL-1step-lora")
BACKENDS = ("tensorrt", "tensorrt-rtx", "onnxruntime")
WARM_UPS, ROUNDS = 5, 30
STEPS = (1, 4)
SHOWN_OUTPUT = 6000  # characters of a failed test run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="default: benchmarks/gpu-NAME.md")
    parser.add_argument("--bundle", type=Path, action="append", default=[], help="time this one too, with its engines")
    parser.add_argument("--work", type=Path, default=Path("/tmp/hypersd-gpu-check"), help="for tiny bundles")
    parser.add_argument("--skip-tests", action="store_true", help="latencies only")
    args = parser.parse_args()
    import torch

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
    out = args.out or ROOT / f"benchmarks/gpu-{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}.md"
    report = Report(out, f"# hypersd on {gpu}")
    report.section("Machine", facts())
    bundles = [*args.bundle, *report.attempt("Tiny bundles", lambda: tiny_bundles(args.work), default=[])]
    runs = {}
    for backend in BACKENDS[:2]:
        report.section(f"Does {backend} run here?", verdict := try_backend(bundles, backend))
        runs[backend] = verdict.startswith("yes")
    passed = True if args.skip_tests else run_tests(report)
    for bundle in bundles:
        report.attempt(f"Latency: {bundle.name}", lambda bundle=bundle: latencies(bundle, runs))
    print(f"report: {out}")
    sys.exit(not passed)


class Report:
    """A Markdown file that is written as the parts end."""

    def __init__(self, path: Path, title: str) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{title}\n\n{datetime.date.today()}, `{' '.join(['scripts/gpu_check.sh', *sys.argv[1:]])}`\n")

    def section(self, title: str, text: str) -> None:
        print(f"== {title}\n{text}", flush=True)
        with self.path.open("a") as file:
            file.write(f"\n## {title}\n\n{text}\n")

    def attempt(self, title: str, work: Callable[[], Any], default: Any = None) -> Any:
        """Do a part; what it returns is shown, and so is why it could not be done."""
        try:
            result = work()
        except Exception as error:
            self.section(title, f"failed: `{type(error).__name__}: {' '.join(str(error).split())}`")
            return default
        self.section(title, result if isinstance(result, str) else ", ".join(map(str, result)))
        return result


def facts() -> str:
    import torch

    rows = {"system": platform.platform(), "python": platform.python_version()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        rows["GPU"] = f"{properties.name}, {properties.total_memory / 1e9:.1f} GB"
        rows["compute capability"] = f"{properties.major}.{properties.minor}"
    rows["driver"] = run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]) or "none"
    rows["CUDA of torch"] = str(torch.version.cuda)
    for package in PACKAGES:
        try:
            rows[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            rows[package] = "not installed"
    rows["commit"] = run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]) or "unknown"
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def run(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def tiny_bundles(work: Path) -> list[Path]:
    from make_tiny_repos import write_all

    from hypersd.export import ExportOptions, export_bundle
    from hypersd.export.checkpoints import HYPER_SD_REPO, find_checkpoint
    from hypersd.export.sources import SourceOptions

    hub = work / "hub"
    if not hub.exists():
        write_all(hub)
    roots = []
    for name in CHECKPOINTS:
        checkpoint = find_checkpoint(name)
        sources = SourceOptions(
            base=str(hub / checkpoint.base),
            lora=str(hub / HYPER_SD_REPO / checkpoint.filename),
            vae=str(hub / "madebyollin/sdxl-vae-fp16-fix") if "SDXL" in name else None,
        )
        roots.append(export_bundle(name, work / f"tiny-{name}", ExportOptions(sources=sources)).root)
    return roots


def try_backend(bundles: list[Path], backend: str) -> str:
    """Build if need be, load, draw; the exact message where that fails."""
    from hypersd import Pipeline
    from hypersd.engines import build_engines

    if not bundles:
        return "not tried: there is no bundle"
    try:
        build_engines(bundles[-1], backend)
        began = time.perf_counter()
        pipe = Pipeline.load(bundles[-1], backend=backend)
        cold = time.perf_counter() - began
        pipe("a cat", seed=0)
        began = time.perf_counter()
        Pipeline.load(bundles[-1], backend=backend)
    except Exception as error:
        return f"no: `{type(error).__name__}: {' '.join(str(error).split())}`"
    return f"yes; a tiny bundle loads cold in {cold:.2f} s, warm in {time.perf_counter() - began:.2f} s"


def run_tests(report: Report) -> bool:
    """The tests marked gpu; a run in which all were skipped is no pass."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rs", "--no-header", "tests"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = result.stdout.strip().splitlines()
    text = f"`{lines[-1] if lines else 'pytest said nothing'}`\n\n```\n{result.stdout[-SHOWN_OUTPUT:]}\n```"
    report.section("Tests marked gpu", text)
    return result.returncode == 0 and bool(lines) and "passed" in lines[-1]


def latencies(bundle: Path, runs: dict[str, bool]) -> str:
    """Milliseconds a picture on the host's clock, interleaved: each round draws once with each contender."""
    from hypersd import Pipeline
    from hypersd.engines import build_engines

    contenders: dict[str, Any] = {}
    notes = []
    for backend in BACKENDS:
        if not runs.get(backend, True):
            continue
        try:
            if backend != "onnxruntime":
                build_engines(bundle, backend)
            contenders[backend] = Pipeline.load(bundle, backend=backend)
        except Exception as error:
            notes.append(f"{backend}: `{' '.join(str(error).split())}`")
    rows = ["| contender | device | steps | median ms | p95 ms | least ms |", "|---|---|---|---|---|---|"]
    for steps in STEPS:
        for name, times in interleaved(contenders, steps).items():
            times.sort()
            figures = (statistics.median(times), times[int(0.95 * (len(times) - 1))], times[0])
            shown = " | ".join(f"{1e3 * seconds:.2f}" for seconds in figures)
            rows.append(f"| {name} | {contenders[name].device} | {steps} | {shown} |")
    return "\n".join([*rows, "", *notes])


def interleaved(contenders: dict[str, Any], steps: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(WARM_UPS + ROUNDS):
        for name, pipe in contenders.items():
            began = time.perf_counter()
            pipe("a photo of a cat", num_inference_steps=steps, seed=i, force=True)
            if i >= WARM_UPS:
                times[name].append(time.perf_counter() - began)
    return times


if __name__ == "__main__":
    main()
