"""Upload a bundle to the Hub, with a model card.

The repository then is a bundle for every command that reads one: `hypersd generate OWNER/NAME "a photo of a cat"`.
Only files that the Hub does not have yet are sent. The figures of an earlier `hypersd verify` go into the card.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import folder

EXTRA = "hub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the bundle and the repository."""
    parser.add_argument("bundle", type=folder, help="the folder that `hypersd export` wrote")
    parser.add_argument("repository", metavar="OWNER/NAME", help="a model repository; it is made if it is not there")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument(
        "--verified", type=Path, metavar="FOLDER", help="the folder of `hypersd verify` (default: BUNDLE-verify)"
    )


def run(args: argparse.Namespace) -> None:
    """Upload, and print the commit's address."""
    from ..engines.bundle import Bundle
    from ..tools.hub_upload import push_bundle
    from ..tools.verify_figures import FIGURES, read_figures
    from .arguments import verify_folder
    from .console import err, out, spinner

    bundle = Bundle.load(args.bundle)
    figures = read_figures((args.verified or verify_folder(args.bundle)) / FIGURES, bundle)
    with spinner(f"pushing {args.bundle} to {args.repository}"):
        address = push_bundle(bundle, args.repository, private=args.private, figures=figures)
    if figures is None:
        err().print("the card has no figures of verification: run `hypersd verify` first to have them", markup=False)
    out().print(address, markup=False, soft_wrap=True)
