#!/usr/bin/env python
"""Measure what the runtime adds to its networks: on engines that compute nothing, and on real ones.

    python scripts/measure_overhead.py bundles/Hyper-SD15-1step-lora --steps 4

On the null engine the whole call is overhead. On real engines it is the call's time less that of the engines' runs,
which each is timed by itself in the same call.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from hypersd import Pipeline
from hypersd.engines import Bundle
from hypersd.engines.engine import Engine, EngineWrapper, NullEngine
from hypersd.runtime.text import load_tokenizers

PROMPT = "a photo of a cat"


class Timed(EngineWrapper):
    """An engine that adds up what its runs take."""

    seconds = 0.0

    def run(self, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        began = time.perf_counter()
        outputs = self.engine.run(feeds)
        self.seconds += time.perf_counter() - began
        return outputs


def timed(pipe: Pipeline) -> tuple[Pipeline, list[Timed]]:
    """The same pipeline on engines that are timed."""
    engines: dict[str, Engine] = {name: Timed(engine) for name, engine in pipe.engines.items()}
    made = Pipeline(pipe.manifest, engines, pipe.tokenizers)
    return made, [engine for engine in engines.values() if isinstance(engine, Timed)]


def measure(pipe: Pipeline, steps: int, calls: int, output_type: str) -> tuple[float, float]:
    """Medians of seconds a call, and of what of that is not in engines."""
    pipe, engines = timed(pipe)
    whole, outside = [], []
    for seed in range(calls + 2):
        for engine in engines:
            engine.seconds = 0.0
        began = time.perf_counter()
        pipe(PROMPT, seed=seed, num_inference_steps=steps, force=True, output_type=output_type)
        seconds = time.perf_counter() - began
        if seed >= 2:  # buffers are made and prompts encoded in the first calls
            whole.append(seconds)
            outside.append(seconds - sum(engine.seconds for engine in engines))
    return statistics.median(whole), statistics.median(outside)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--backend", default="auto", help="for the real engines (default: auto)")
    parser.add_argument("--calls", type=int, default=5, help="on real engines (default: 5); on the null engine 300")
    args = parser.parse_args()
    bundle = Bundle.load(args.bundle)
    engines = {name: NullEngine(name, component) for name, component in bundle.manifest.components.items()}
    null = Pipeline(bundle.manifest, engines, load_tokenizers(bundle))
    for output_type in ("latent", "pil"):
        whole, outside = measure(null, args.steps, 300, output_type)
        print(f"null engine, {args.steps} steps, {output_type}: {whole * 1e3:.3f} ms, {outside * 1e3:.3f} outside runs")
    if args.calls:
        whole, outside = measure(Pipeline.load(args.bundle, backend=args.backend), args.steps, args.calls, "pil")
        share = f"{outside * 1e3:.2f} ms outside runs, {outside / whole:.2%}"
        print(f"{args.backend}, {args.steps} steps: {whole:.3f} s, {share}")


if __name__ == "__main__":
    main()
