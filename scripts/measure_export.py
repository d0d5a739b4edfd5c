#!/usr/bin/env python
"""Measure an export at full size: seconds and peak memory, with random weights in the real architecture.

    python scripts/measure_export.py --family sdxl --precision fp16 --folder /tmp/full
    python scripts/measure_export.py --family sd15 --controlnet --folder /tmp/full

It is `hypersd export --random-weights`, whose weights are written first, unless they are there. Peak memory is the
largest sum over the export's process of anonymous memory (what it allocated) and of resident file pages (what it
mapped, which the system may drop at any time), sampled.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path

CHECKPOINTS = {"sd15": "Hyper-SD15-1step-lora", "sdxl": "Hyper-SDXL-1step-lora"}


def write_random_base(family: str) -> None:
    """Write the base that `hypersd export --random-weights` reads, where it looks for it."""
    from hypersd.cli.console import StageLines
    from hypersd.export.random_weights import RandomWeights, random_base

    random_base(family, RandomWeights(), StageLines())


def write_controlnet(folder: Path, family: str) -> None:
    """A ControlNet of the real architecture, float32, random weights."""
    import torch
    from diffusers import UNet2DConditionModel
    from make_tiny_repos import controlnet

    from hypersd.export.architectures import PUBLISHED
    from hypersd.export.controlnet_sources import EMBEDDING_CHANNELS

    torch.manual_seed(1)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**PUBLISHED[family].unet)
    controlnet(unet, EMBEDDING_CHANNELS).save_pretrained(folder / "controlnet")


def memory(pid: int) -> tuple[int, int]:
    """Bytes of anonymous memory and of resident file pages of a process."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return tuple(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))


def run_measured(command: list[str]) -> dict[str, float]:
    """Run a command; its seconds and its peaks in gigabytes."""
    began = time.perf_counter()
    process = subprocess.Popen(command)
    peaks = {"anonymous": 0, "file pages": 0, "sum": 0}

    def watch() -> None:
        while process.poll() is None:
            try:
                anonymous, pages = memory(process.pid)
            except (OSError, KeyError):
                break
            peaks["anonymous"] = max(peaks["anonymous"], anonymous)
            peaks["file pages"] = max(peaks["file pages"], pages)
            peaks["sum"] = max(peaks["sum"], anonymous + pages)
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    watcher.join()
    if code:
        sys.exit(f"{command} ended with {code}")
    seconds = time.perf_counter() - began
    return {"seconds": round(seconds, 1), **{f"peak {k} GB": round(v / 1e9, 2) for k, v in peaks.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--family", choices=sorted(CHECKPOINTS), required=True)
    parser.add_argument("--precision", choices=["fp16", "fp32", "int8"], default="fp16")
    parser.add_argument("--folder", type=Path, required=True, help="for the bundle and the ControlNet")
    parser.add_argument("--controlnet", action="store_true", help="export a ControlNet, too")
    args = parser.parse_args()
    folder = args.folder / args.family
    write_random_base(args.family)
    if args.controlnet and not (folder / "controlnet/config.json").exists():
        write_controlnet(folder, args.family)
    command = [sys.executable, "-m", "hypersd.cli", "export", "--ckpt", CHECKPOINTS[args.family], "--random-weights"]
    command += ["--replace", "--backend", "none", "--precision", args.precision]
    command += ["--out", str(folder / (f"{args.precision}-controlnet" if args.controlnet else args.precision))]
    command += ["--controlnet", str(folder / "controlnet")] if args.controlnet else []
    result = run_measured(command)
    machine = {"python": platform.python_version(), "cores": len(os.sched_getaffinity(0))}
    print(json.dumps({"family": args.family, "precision": args.precision, **result, **machine}, indent=2))


if __name__ == "__main__":
    main()
