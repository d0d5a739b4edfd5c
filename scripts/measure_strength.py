#!/usr/bin/env python
"""Score strengths of an init image with the demonstration checkpoints: steps cut as in diffusers, and --keep-steps.

    python scripts/measure_strength.py bundles/Hyper-Demo15-1step-lora --steps 8

Each init image is a rendered scene of one shape. The prompt describes the same scene with another colour, without the
place. The judge says how often the image has the prompt's colour and shape, and the init image's place.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
from PIL import Image
from train_demo.data import held_back
from train_demo.judge import judge, score
from train_demo.scenes import COLOURS, Scene, describe, render

from hypersd import Pipeline
from hypersd.errors import RequestError

STRENGTHS = (0.2, 0.3, 0.4, 0.5, 0.75)


def with_colour(scene: Scene, colour: str) -> Scene:
    return dataclasses.replace(scene, things=(dataclasses.replace(scene.things[0], colour=colour),))


def without_place(scene: Scene) -> Scene:
    return dataclasses.replace(scene, things=(dataclasses.replace(scene.things[0], place=""),))


def pairs(count: int) -> list[tuple[Scene, Scene]]:
    """The wanted scenes, each with the scene of its init image."""
    generator = np.random.default_rng(0)
    wanted = [scene for scene, _ in held_back(8 * count) if len(scene.things) == 1][:count]
    others = [[colour for colour in COLOURS if colour != scene.things[0].colour] for scene in wanted]
    return [
        (scene, with_colour(scene, str(generator.choice(other)))) for scene, other in zip(wanted, others, strict=True)
    ]


def measure(pipe: Pipeline, scenes: list[tuple[Scene, Scene]], steps: int, strength: float, keep_steps: bool) -> str:
    """A line of the table: shares of images whose colour, shape and place are right."""
    verdicts = []
    for seed, (wanted, shown) in enumerate(scenes):
        caption = describe(without_place(wanted), np.random.default_rng(seed))
        start = {"image": Image.fromarray(render(shown)), "strength": strength, "keep_steps": keep_steps}
        image = pipe(caption, **start, num_inference_steps=steps, seed=seed, force=True).images[0]
        verdicts.append(judge(np.asarray(image), wanted))
    scores = score(verdicts)
    return f"colour {scores.colours:.2f}  shape {scores.shapes:.2f}  place {scores.places:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="a demonstration checkpoint's bundle")
    parser.add_argument("--steps", type=int, required=True, help="number of steps")
    parser.add_argument("--count", type=int, default=40, help="scenes (default: 40)")
    args = parser.parse_args()
    pipe, scenes = Pipeline.load(args.bundle), pairs(args.count)
    for strength in STRENGTHS:
        for keep_steps in (False, True):
            kind = "keep_steps" if keep_steps else "cut       "
            try:
                print(f"{strength:4g}  {kind}  {measure(pipe, scenes, args.steps, strength, keep_steps)}", flush=True)
            except RequestError as error:
                print(f"{strength:4g}  {kind}  {error}", flush=True)


if __name__ == "__main__":
    main()
