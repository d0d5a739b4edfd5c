"""Train the demonstration checkpoints: every stage in its order, several at a time, going on where it was interrupted.

scripts/train_demo.sh [--work FOLDER] [--jobs N] [STAGE ...]
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
JOBS = 2  # one core each is faster on small networks than two cores on one of them


Stages = dict[str, tuple[Callable[[Path], None], tuple[str, ...]]]


def stages() -> Stages:
    """By name what is to be done with the work folder, and what has to be done before. The order is that of need."""
    from hypersd.export.repositories import DEMO_ROOT

    from . import base, controlnet, data, distill, publish, text, trajectories, vae

    table: Stages = {
        "images": (data.make_images, ()),
        "text15": (functools.partial(text.train_text, "sd15"), ("images",)),
        "textxl": (functools.partial(text.train_text, "sdxl"), ("images",)),
        "vae": (vae.train_vae, ("images",)),
        "latents": (vae.make_latents, ("vae",)),
        "base15": (functools.partial(base.train_base, "sd15"), ("text15", "latents")),
        "basexl": (functools.partial(base.train_base, "sdxl"), ("textxl", "latents")),
        "ways15": (functools.partial(trajectories.make_trajectories, "sd15"), ("base15",)),
        "waysxl": (functools.partial(trajectories.make_trajectories, "sdxl"), ("basexl",)),
    }
    for name, plan in distill.LORA_PLANS.items():
        start = distill.STARTS.get(name)
        needs = (distill.LORA_PLANS[start].name,) if start else ("ways15",)
        table[plan.name] = (functools.partial(distill.train_lora, name), needs)
    table["unet-1"] = (distill.train_one_step_unet, ("waysxl",))
    table["decoder"] = (vae.train_decoder, ("latents",))
    table["tiny-vae"] = (vae.train_tiny_vae, ("latents",))
    table["controlnet"] = (controlnet.train_controlnet, ("base15",))
    table["publish"] = (functools.partial(publish.publish, DEMO_ROOT), tuple(table))
    return table


def style_stages() -> Stages:
    """The same for styles. They are trained on the published checkpoints, so they need nothing of the work folder."""
    from hypersd.export.repositories import DEMO_ROOT

    from . import publish, style_loras

    table: Stages = {
        plan.name: (functools.partial(style_loras.train_styles, family), ())
        for family, plan in style_loras.PLANS.items()
    }
    table["publish-styles"] = (functools.partial(publish.publish_styles, DEMO_ROOT), tuple(table))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/train_demo.sh", description=__doc__.split("\n")[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="only these, which have to have what they need")
    parser.add_argument("--work", type=Path, default=ROOT / "out/train_demo", help="where states are kept (2.5 GB)")
    parser.add_argument("--jobs", type=int, default=JOBS, help="how many stages at a time (default %(default)s)")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # one stage in this process
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: expected 1 or more")
    args.work.mkdir(parents=True, exist_ok=True)
    if args.run:
        run_stage(args.run, args.work, args.jobs)
        return
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))  # through run_all's end, so that no stage goes on alone
    try:
        sys.exit(run_all(args.stages or list(stages()), args.work, args.jobs))
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on from here")


def run_stage(name: str, work: Path, jobs: int) -> None:
    """Do one stage in this process, which nobody else does at the same time."""
    import torch
    from filelock import FileLock

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
    with FileLock(work / f"{name}.lock", timeout=0):
        {**stages(), **style_stages()}[name][0](work)
        (work / f"{name}.done").touch()


def run_all(wanted: list[str], work: Path, jobs: int) -> int:
    """Run stages as processes, as soon as what they need is done; 1 if one failed."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    table = {**stages(), **style_stages()}
    if unknown := [name for name in wanted if name not in table]:
        raise SystemExit(f"no stage {', '.join(unknown)}: {', '.join(table)}")
    waiting = [name for name in table if name in wanted and not (work / f"{name}.done").exists()]
    for name in sorted(set(wanted) - set(waiting)):
        print(f"{name}: done already; to repeat it remove {work / name}.done")
    running: dict[str, subprocess.Popen] = {}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}")
    with Progress(*columns, TimeElapsedColumn()) as progress:
        rows = {}
        try:
            while waiting or running:
                for name in [n for n in waiting if is_ready(table[n][1], work)][: jobs - len(running)]:
                    waiting.remove(name)
                    running[name] = start(name, work, jobs)
                    rows[name] = progress.add_task(name, total=None, loss="")
                time.sleep(1)
                for name, process in list(running.items()):
                    show(progress, rows[name], name, work)
                    if process.poll() is None:
                        continue
                    del running[name]
                    if process.returncode:
                        progress.console.print(f"{name} failed ({process.returncode}): see {work / name}.log")
                        return 1
                    progress.console.print(f"{name}: done")
                    progress.remove_task(rows[name])
                if waiting and not running and not any(is_ready(table[n][1], work) for n in waiting):
                    progress.console.print(f"{', '.join(waiting)}: what they need is not done")
                    return 1
        finally:
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.wait()
    return 0


def is_ready(needs: tuple[str, ...], work: Path) -> bool:
    return all((work / f"{need}.done").exists() for need in needs)


def start(name: str, work: Path, jobs: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "train_demo", "--work", str(work), "--jobs", str(jobs), "--run", name]
    with open(work / f"{name}.log", "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def show(progress: object, row: object, name: str, work: Path) -> None:
    """Take over what a stage's training, or the latest of several, last said of itself."""
    reports = [*work.glob(f"{name}.progress.json"), *work.glob(f"{name}-[0-9].progress.json")]
    if not reports:
        return
    report = json.loads(max(reports, key=lambda file: file.stat().st_mtime).read_text())
    progress.update(row, total=report["steps"], completed=report["step"], loss=f"loss {report['loss']:.4f}")


if __name__ == "__main__":
    main()
