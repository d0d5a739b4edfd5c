#!/usr/bin/env python
"""Generate a sheet that shows a ControlNet: an image, its edges, and prompts that follow them at several strengths.

    python scripts/control_sheet.py OUT.png BUNDLE [--photo IMAGE]

The bundle needs a ControlNet for edges. Without --photo the image is a star.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from contact_sheet import SIDE, Column, arrange, settings
from PIL import Image, ImageDraw

from hypersd import HyperSDError, Pipeline
from hypersd.runtime.control_images import canny
from hypersd.runtime.image_files import fit, open_image

PROMPTS = (
    "a red star on a blue background",
    "a yellow star on green stripes",
    "a purple star on a yellow background",
)
SCALES = (0.0, 0.5, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("output", type=Path, metavar="OUT.png")
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="with a ControlNet for edges")
    parser.add_argument("--photo", type=Path, metavar="IMAGE", help="to follow (default: a star)")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS, metavar="TEXT", help="one for each row")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    args = parser.parse_args()
    try:
        columns = generate(args.bundle, args.prompts, args.seed, args.photo and open_image(args.photo))
    except HyperSDError as error:
        parser.exit(error.exit_code, f"error: {error}\n")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    arrange(columns, args.prompts).save(args.output, format="PNG", optimize=True)
    print(f"{args.output}  {len(args.prompts)} prompts, seed {args.seed}; {len(columns)} columns")


def generate(bundle: Path, prompts: Sequence[str], seed: int, photo: Image.Image | None) -> list[Column]:
    """The image, its edges, and a column for every strength."""
    pipe = Pipeline.load(bundle)
    shapes = pipe.manifest.shapes
    photo = fit(photo or star(SIDE), shapes.width.opt, shapes.height.opt)
    edges = canny(photo)
    (name, *_) = pipe.manifest.controlnets
    columns = [
        Column(("image", "to follow", ""), (photo,) * len(prompts)),
        Column(("control image", "Canny, 100 and 200", ""), (edges,) * len(prompts)),
    ]
    for scale in SCALES:
        outputs = [
            pipe(prompt, seed=seed, control_image={name: edges}, controlnet_conditioning_scale=scale)
            for prompt in prompts
        ]
        heading = f"strength {scale:g}", pipe.manifest.checkpoint, settings(pipe)
        columns.append(Column(heading, tuple(out.images[0] for out in outputs)))
    return columns


def star(side: int) -> Image.Image:
    """A dark star, low on the left, on a light ground."""
    image = Image.new("RGB", (side, side), (236, 232, 222))
    corners = [(0.5, 0.0), (0.62, 0.37), (1.0, 0.38), (0.69, 0.6), (0.81, 0.97), (0.5, 0.74)]
    corners += [(0.19, 0.97), (0.31, 0.6), (0.0, 0.38), (0.38, 0.37)]
    points = [((0.08 + 0.42 * x) * side, (0.46 + 0.42 * y) * side) for x, y in corners]
    ImageDraw.Draw(image).polygon(points, fill=(52, 48, 60))
    return image


if __name__ == "__main__":
    main()
