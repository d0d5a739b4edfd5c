#!/usr/bin/env python
"""Measure frames per second and latency: text, image to image and streams, beside diffusers on the same weights.

    python scripts/measure_stream.py bundles/Hyper-Demo15-1step-lora --steps 2 --strength 0.5 --json FILE

Every contender has a process of its own. They take turns, round by round, and each does all its kinds of work in a
turn; the order of contenders and of kinds is reversed in every other round. The frames are those of a camera of 640x480
with a circle that moves; fitting them counts. A kind's latency is the time from a frame to its image.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from PIL import Image, ImageDraw

CAMERA = 640, 480
PROMPT = "a red star on a blue background"
SEED = 0
OURS = {
    "hypersd": {"backend": "onnxruntime", "device": "cpu"},
    "hypersd-openvino": {"backend": "openvino", "device": "cpu"},
}
THEIRS = {"diffusers": "fp32", "diffusers-bf16": "bf16"}
LIBRARIES = ("torch", "diffusers", "transformers", "onnxruntime", "openvino")
Latencies = list[float]
Work = Callable[[list[Image.Image]], tuple[Latencies, Any]]


def frames(count: int, first: int) -> list[Image.Image]:
    """Frames from a number on: a circle that moves from left to right and back."""
    made = []
    for number in range(first, first + count):
        image = Image.new("RGB", CAMERA, (182, 208, 248))
        x = 120 + abs(number * 8 % 800 - 400)
        ImageDraw.Draw(image).ellipse((x - 70, 170, x + 70, 310), fill=(222, 36, 40))
        made.append(image)
    return made


def one_by_one(call: Callable[[Image.Image], Any]) -> Work:
    """The work of a call for each frame."""

    def work(images: list[Image.Image]) -> tuple[Latencies, Any]:
        seconds, result = [], None
        for image in images:
            began = time.perf_counter()
            result = call(image)
            seconds.append(time.perf_counter() - began)
        return seconds, result

    return work


def works_of_ours(bundle: str, name: str, steps: int, strength: float) -> dict[str, Work]:
    from hypersd import Pipeline

    pipe = Pipeline.load(bundle, **OURS[name])
    words: dict[str, Any] = {"num_inference_steps": steps, "seed": SEED}

    def stream(look_ahead: int) -> Work:
        def work(images: list[Image.Image]) -> tuple[Latencies, Any]:
            begun, seconds, made = [], [], []

            def source() -> Iterator[Image.Image]:
                for image in images:
                    begun.append(time.perf_counter())
                    yield image

            with pipe.stream(source(), PROMPT, strength=strength, look_ahead=look_ahead, **words) as stream:
                for image in stream:
                    seconds.append(time.perf_counter() - begun[len(seconds)])
                    made = [image]
            return seconds, made[0]

        return work

    return {
        "text": one_by_one(lambda _: pipe(PROMPT, **{**words, "num_inference_steps": 1}).images[0]),
        "image to image": one_by_one(lambda image: pipe(PROMPT, image=image, strength=strength, **words).images[0]),
        "stream": stream(1),
        "stream, 2 ahead": stream(2),
    }


def works_of_diffusers(bundle: str, name: str, steps: int, strength: float) -> dict[str, Work]:
    import diffusers
    import torch

    from hypersd.engines import Bundle
    from hypersd.runtime.image_files import fit
    from hypersd.tools.reference import find_reference_sources, load_pipeline

    manifest = Bundle.load(bundle).manifest
    pipe = load_pipeline(manifest, find_reference_sources(manifest))
    if THEIRS[name] == "bf16":
        pipe.to(torch.bfloat16)
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    image_pipe = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    image_pipe.set_progress_bar_config(disable=True)
    height, width, eta = manifest.shapes.height.opt, manifest.shapes.width.opt, manifest.sampler.eta

    def generate(pipeline: Any, **words: Any) -> Any:
        noise = torch.Generator().manual_seed(SEED)
        return pipeline(PROMPT, guidance_scale=0.0, eta=eta, generator=noise, **words).images[0]

    def image_to_image(frame: Image.Image) -> Any:
        image = fit(frame, width, height)
        return generate(image_pipe, image=image, strength=strength, num_inference_steps=steps)

    return {
        "text": one_by_one(lambda _: generate(pipe, height=height, width=width, num_inference_steps=1)),
        "image to image": one_by_one(image_to_image),
    }


def run_contender(connection: Connection, bundle: str, name: str, steps: int, strength: float) -> None:
    """A contender's process: for each (kind, first frame, count) the latencies, the whole time and the last image."""
    make = works_of_ours if name in OURS else works_of_diffusers
    works = make(bundle, name, steps, strength)
    connection.send(list(works))
    while (order := connection.recv()) is not None:
        kind, first, count = order
        images = frames(count, first)
        began = time.perf_counter()
        seconds, image = works[kind](images)
        connection.send((seconds, time.perf_counter() - began, np.asarray(image)))


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    context, rows, processes = multiprocessing.get_context("spawn"), {}, []
    connections: dict[str, Connection] = {}
    for name in args.contenders:  # one after the other: loading takes all cores
        ours, theirs = context.Pipe()
        words = (theirs, str(args.bundle), name, args.steps, args.strength)
        process = context.Process(target=run_contender, args=words, daemon=True)
        process.start()
        processes.append(process)
        connections[name] = ours
        rows |= {(name, kind): {"contender": name, "kind": kind, "rounds": []} for kind in ours.recv()}
        print(f"{name} is loaded", flush=True)
    pixels: dict[tuple[str, str], Any] = {}
    for i in range(-1, args.rounds):  # the first one warms up
        first = (i + 1) * args.frames
        for name, kind in list(rows) if i % 2 else list(reversed(rows)):
            connections[name].send((kind, first, args.frames))
            seconds, whole, pixels[name, kind] = connections[name].recv()
            if i >= 0:
                rows[name, kind]["rounds"].append({"seconds": seconds, "whole": whole})
                print(f"round {i + 1}: {name}, {kind}: {args.frames / whole:.2f} frames/s", flush=True)
    for connection in connections.values():
        connection.send(None)
    for process in processes:
        process.join()
    return [summary(row, pixels, args) for row in rows.values()]


def summary(row: Mapping[str, Any], pixels: Mapping[tuple[str, str], Any], args: argparse.Namespace) -> dict[str, Any]:
    """A row with its figures; PSNR beside the first contender's image of the same kind, or of image to image."""
    kind = row["kind"] if row["kind"] == "text" else "image to image"
    usual, own = pixels[args.contenders[0], kind], pixels[row["contender"], row["kind"]]
    error = float(np.mean((usual.astype(float) - own) ** 2))
    latencies = [second for each in row["rounds"] for second in each["seconds"]]
    return {
        **row,
        "frames_per_second": statistics.median(args.frames / each["whole"] for each in row["rounds"]),
        "latency": statistics.median(latencies),
        "longest_latency": max(latencies),
        "psnr": None if error == 0 else float(10 * np.log10(255**2 / error)),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| | frames/s | latency, ms | longest, ms | image |", "|---|---|---|---|---|"]
    for row in rows:
        image = "equal" if row["psnr"] is None else f"{row['psnr']:.0f} dB"
        numbers = f"{row['frames_per_second']:.2f} | {row['latency'] * 1e3:.0f} | {row['longest_latency'] * 1e3:.0f}"
        lines.append(f"| {row['contender']}, {row['kind']} | {numbers} | {image} |")
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--contenders", nargs="+", default=[*OURS, *THEIRS], choices=[*OURS, *THEIRS])
    parser.add_argument("--steps", type=int, default=2, help="of image to image (default: 2); text takes 1")
    parser.add_argument("--strength", type=float, default=0.5, help="default: 0.5, one step of two")
    parser.add_argument("--frames", type=int, default=24, help="in a round (default: 24)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    from hypersd.tools.bench.host import this_host

    args = parse_args()
    rows = measure(args)
    report = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "bundle": args.bundle.name,
        "steps": args.steps,
        "strength": args.strength,
        "frames": args.frames,
        "host": msgspec.to_builtins(this_host()),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "rows": rows,
    }
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
