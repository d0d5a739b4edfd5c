"""Compare a bundle's images with diffusers' own, stage by stage.

Loads the bundle's sources with diffusers, generates the same prompts and seeds with both, and prints the differences of
text, each step's latents, decoder and image. Writes each pair side by side: our image, diffusers', the difference at
full contrast. A bundle's ControlNets add images along a few lines, each ControlNet alone and all together. One more
image starts from an init image. A base for inpainting repaints a part of one in all of them.
Ends with exit code 1 if an image differs by more than the threshold.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import BUNDLE_HELP, add_backend, folder, open_bundle, verify_folder

if TYPE_CHECKING:
    from rich.table import Table

    from ..engines import Bundle
    from ..runtime import Pipeline
    from ..tools.verification import Comparison, Threshold


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the bundle, the prompts and the threshold."""
    parser.add_argument("bundle", type=folder, help=BUNDLE_HELP)
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times (default: two)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image (default: 0)")
    parser.add_argument("--steps", type=int, metavar="N", help="default: the checkpoint's own")
    parser.add_argument("--min-psnr", type=float, metavar="DB", help="default: 60 for fp32, 30 for fp16, bf16 and int8")
    add_backend(parser, "as for `hypersd generate` (default: auto)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder for the pairs (default: BUNDLE-verify)")


def run(args: argparse.Namespace) -> None:
    """Compare every image, print and write the results, then judge them."""
    from ..runtime import Pipeline
    from ..tools import reference, verification, verify_cases
    from ..tools.verify_figures import FIGURES
    from .console import DownloadBar, err, out, spinner

    bundle = open_bundle(args.bundle)
    with spinner(f"loading {args.bundle}"):
        pipe = Pipeline.load(bundle, args.backend, precision=args.precision, low_memory=args.low_memory)
    threshold = _threshold(args.min_psnr, verification.find_threshold(pipe))
    pairs = args.out or verify_folder(args.bundle)
    cases = verify_cases.make_cases(pipe.manifest, args.prompt or verify_cases.PROMPTS, args.seed)
    err().print("loading the bundle's sources with diffusers")
    theirs = reference.load_reference(pipe.manifest, DownloadBar(err()))
    comparisons = []
    for i, case in enumerate(cases):
        with spinner(f"generating image {i + 1} of {len(cases)} with both"):
            comparisons.append(verification.compare(pipe, theirs, case, args.steps))
        _report(comparisons[-1], pairs / f"pair-{i}.png")
    _write_figures(pairs / FIGURES, bundle, pipe, comparisons)
    verification.check_thresholds(comparisons, threshold)
    out().print(
        f"all {len(comparisons)} images are diffusers' own: at least {threshold.psnr:g} dB, "
        f"largest error at most {threshold.largest:g} of full scale",
        markup=False,
    )


def _threshold(min_psnr: float | None, usual: Threshold) -> Threshold:
    import dataclasses
    import math

    from ..errors import RequestError

    if min_psnr is None:
        return usual
    if not math.isfinite(min_psnr):
        raise RequestError(f"--min-psnr {min_psnr}: expected a number of decibels")
    return dataclasses.replace(usual, psnr=min_psnr)


def _report(comparison: Comparison, path: Path) -> None:
    """Write the pair, and print its table."""
    from ..tools.verification import side_by_side
    from .console import out
    from .image_output import write_png

    case = comparison.case
    write_png(path, side_by_side(comparison), {"prompt": case.prompt, "seed": case.seed})
    out().print(f"\n{case}: {path}", markup=False, soft_wrap=True)
    out().print(_table(comparison))


def _write_figures(path: Path, bundle: Bundle, pipe: Pipeline, comparisons: Sequence[Comparison]) -> None:
    """Write the images' differences for `hypersd push`."""
    import math

    from ..tools.verify_figures import ImageFigures, write_figures

    images = [
        ImageFigures(
            prompt=each.case.prompt,
            seed=each.case.seed,
            controlnets=each.case.controlnets,
            starts_from=each.case.starts_from,
            psnr=each.image.psnr if math.isfinite(each.image.psnr) else None,
            largest=each.image.largest,
        )
        for each in comparisons
    ]
    choice = pipe.choice
    assert choice is not None  # it was loaded
    write_figures(path, bundle, choice.target or choice.backend, images)


def _table(comparison: Comparison) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("stage", "PSNR dB", "SSIM", "mean error", "largest error"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for difference in comparison.differences:
        table.add_row(
            difference.stage,
            f"{difference.psnr:.1f}",
            "" if difference.ssim is None else f"{difference.ssim:.6f}",
            f"{difference.mean:.1e}",
            f"{difference.largest:.1e}",
        )
    return table
