"""Blocks of the model cards: the sections that all of them have, and Markdown.

Paragraphs are filled to WIDTH when they are joined: in the source their lines end anywhere.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

from safetensors import safe_open

from . import loop
from .data import SCENES
from .loop import Plan
from .scenes import COLOURS, PATTERNS, RADII, SHAPES, SIZE, TINTS

STEP = ("what", "learns", "optimizer steps", "batch", "highest learning rate", "seed")
WIDTH = 120

WORLD = (
    f"""It generates scenes of one or two shapes on a background, {SIZE}x{SIZE} pixels, such as "a small red
    star left of a large blue ring, on a green striped background":""",
    f"""\
| part | words |
|---|---|
| shapes | {", ".join(SHAPES)} |
| colours | {", ".join(COLOURS)} |
| sizes | {", ".join(RADII)}; medium if none is named |
| places of one shape | left, right, top, bottom, the four corners; the middle if none is named |
| two shapes | left of, right of, above, below each other |
| backgrounds | {", ".join(PATTERNS)}; {", ".join(TINTS)}; plain white if none is named |""",
)
DATA = (
    "## Data",
    f"""{SCENES:,} images with captions, drawn and worded at random by code (`scripts/train_demo/scenes.py`), each
    from its own number as seed. No outside data and no outside weights: nothing here was downloaded.""",
)
LIMITS = (
    "## Limits",
    f"""It generates nothing but the scenes above. Other words were not in its training data: the image of a prompt
    with a photo, a person, a cat or written text means nothing. The same holds for three shapes or more, two shapes in
    places other than beside or above each other, and sizes other than {SIZE}x{SIZE} pixels. It was made to try
    out and to test `hypersd`, and says nothing about the quality of the real Hyper-SD.""",
)
LICENCE = (
    "## Licence",
    """Apache-2.0, as the repository that holds it: the weights were trained from scratch by its authors, with its
    `scripts/train_demo.sh`.""",
)
HOW = f"""AdamW with a learning rate that rises over {loop.WARM_UP} steps and falls to zero along a cosine
    ([Loshchilov and Hutter](https://arxiv.org/abs/1608.03983)), gradients clipped at norm 1, products in bfloat16; kept
    is a moving average of the weights ({loop.AVERAGE} a step). Every batch follows from the seed and the step."""


def joined(*blocks: str) -> str:
    return "\n\n".join(map(filled, blocks)) + "\n"


def filled(block: str) -> str:
    if block.startswith(("---", "#", "|", "```")):
        return block
    return textwrap.fill(" ".join(block.split()), WIDTH, break_long_words=False, break_on_hyphens=False)


def front_matter(task: str, *tags: str, bases: tuple[str, ...] = ()) -> str:
    """The metadata at the beginning of a card, for the Hub."""
    lines = ["license: apache-2.0", "library_name: diffusers", f"pipeline_tag: {task}", "language: en"]
    lines += ["base_model:", *(f"  - {name}" for name in bases)] if bases else []
    lines += ["tags:", *(f"  - {tag}" for tag in (*tags, "demo"))]
    return "\n".join(["---", *lines, "---"])


def table(*rows: tuple[str, ...]) -> str:
    head, *rest = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rest])


def stage(what: str, plan: Plan, batch: int, learns: str) -> tuple[str, ...]:
    return what, learns, f"{plan.steps:,}", str(batch), f"{plan.learning_rate:g}", str(plan.seed)


def parameters(folder: Path) -> str:
    """The number of parameters in every weight file below a folder, such as "unet 731,652, vae 603,195"."""
    counts = {}
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            counts[path.parent] = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    return ", ".join(f"{count:,}" if path == folder else f"{path.name} {count:,}" for path, count in counts.items())
