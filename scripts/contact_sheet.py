#!/usr/bin/env python
"""Generate a contact sheet: a row for every prompt, a column for every bundle and number of steps.

    python scripts/contact_sheet.py OUT.png BUNDLE [BUNDLE ...]

Each bundle generates in those of 1, 2, 4 and 8 steps that it allows, with its own settings otherwise. All images begin
with the same noise. The prompts describe scenes that the demonstration checkpoints know.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from hypersd import HyperSDError, Pipeline

PROMPTS = (
    "a small red star left of a large blue ring, on a green striped background",
    "a large yellow circle on a blue gradient",
    "a purple cross above an orange triangle",
    "a black square in the top right corner, on pink stripes",
    "a cyan triangle to the right of a red circle, on a grey background",
)
STEPS = (1, 2, 4, 8)
# Lengths in pixels.
SIDE = 192  # of an image on the sheet: twice the demonstration checkpoints' 96
GAP = 10  # between columns, and around the sheet
HEADING_SIZES = (20, 12, 12)  # of the letters of a heading's lines
PROMPT_SIZE = 15
LEADING = 1.5  # times a letter's size from one line to the next
INK, GREY, FRAME, PAPER = (20, 20, 24), (110, 112, 120), (216, 218, 222), (255, 255, 255)


@dataclasses.dataclass(frozen=True)
class Column:
    """A bundle in a number of steps.

    Attributes:
        heading: three lines: steps, checkpoint, how it was sampled.
        images: one for each prompt.
    """

    heading: tuple[str, str, str]
    images: tuple[Image.Image, ...]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("output", type=Path, metavar="OUT.png")
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE", help="that `hypersd export` wrote")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS, metavar="TEXT", help="one for each row")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    args = parser.parse_args()
    try:
        columns = [column for bundle in args.bundles for column in generate(bundle, args.prompts, args.seed)]
    except HyperSDError as error:
        parser.exit(error.exit_code, f"error: {error}\n")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    arrange(columns, args.prompts).save(args.output, format="PNG", optimize=True)
    print(f"{args.output}  {len(args.prompts)} prompts, seed {args.seed}; {len(columns)} columns")


def generate(bundle: Path, prompts: Sequence[str], seed: int) -> list[Column]:
    """The columns of one bundle."""
    pipe = Pipeline.load(bundle)
    sampler = pipe.manifest.sampler
    columns = []
    for steps in [n for n in STEPS if n in sampler.allowed_steps] or [sampler.num_inference_steps]:
        outputs = [pipe(prompt, num_inference_steps=steps, seed=seed) for prompt in prompts]
        heading = f"{steps} step{'s' if steps > 1 else ''}", pipe.manifest.checkpoint, settings(pipe)
        columns.append(Column(heading, tuple(out.images[0] for out in outputs)))
    return columns


def settings(pipe: Pipeline) -> str:
    """A bundle's sampler settings in short, such as "TCD, eta 1"."""
    sampler = pipe.manifest.sampler
    words = [sampler.kind.upper()]
    words += [f"timestep {', '.join(map(str, sampler.timesteps))}"] if sampler.timesteps else []
    words += [f"eta {sampler.eta:g}"] if sampler.eta else []
    words += [f"guidance {sampler.guidance_scale:g}"] if sampler.guidance_scale > 1 else []
    return ", ".join(words)


def arrange(columns: Sequence[Column], prompts: Sequence[str]) -> Image.Image:
    """The sheet: headings, and for every prompt a line of text over its images."""
    widths = [max(SIDE, *(_length(*line) for line in zip(c.heading, HEADING_SIZES, strict=True))) for c in columns]
    width = sum(widths) + GAP * (len(columns) + 1)
    captions = [wrap(prompt, width - 2 * GAP, PROMPT_SIZE) for prompt in prompts]
    height = GAP + _lines_height(*HEADING_SIZES)
    height += sum(GAP + _lines_height(*[PROMPT_SIZE] * len(lines)) + SIDE for lines in captions) + GAP
    sheet = Image.new("RGB", (width, height), PAPER)
    lefts = [GAP + sum(widths[:i]) + GAP * i for i in range(len(columns))]
    for left, column in zip(lefts, columns, strict=True):
        _write(sheet, left, GAP, column.heading, HEADING_SIZES)
    top = GAP + _lines_height(*HEADING_SIZES)
    for row, lines in enumerate(captions):
        top = _write(sheet, GAP, top + GAP, lines, [PROMPT_SIZE] * len(lines))
        for left, column in zip(lefts, columns, strict=True):
            _paste(sheet, left, top, column.images[row])
        top += SIDE
    return sheet


def wrap(text: str, width: int, size: int) -> list[str]:
    """Break a text between words into lines of at most so many pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and _length(longer, size) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _write(sheet: Image.Image, left: int, top: int, lines: Sequence[str], sizes: Sequence[int]) -> int:
    """Write lines of text, the smaller ones in grey; where the next one would begin."""
    canvas = ImageDraw.Draw(sheet)
    for line, size in zip(lines, sizes, strict=True):
        canvas.text((left, top), line, fill=GREY if size < PROMPT_SIZE else INK, font=_font(size))
        top += _lines_height(size)
    return top


def _paste(sheet: Image.Image, left: int, top: int, image: Image.Image) -> None:
    """Paste an image, enlarged, with a thin frame, as many of them have the paper's colour."""
    image = ImageOps.contain(image, (SIDE, SIDE), Image.Resampling.LANCZOS)
    sheet.paste(image, (left, top))
    box = (left - 1, top - 1, left + image.width, top + image.height)
    ImageDraw.Draw(sheet).rectangle(box, outline=FRAME)


def _lines_height(*sizes: int) -> int:
    return sum(round(size * LEADING) for size in sizes)


def _length(text: str, size: int) -> int:
    """Pixels, rounded up."""
    return int(_font(size).getlength(text)) + 1


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


if __name__ == "__main__":
    main()
