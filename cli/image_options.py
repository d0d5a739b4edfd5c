"""Options of `hypersd generate` for an init image and a mask."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..runtime.request import Request

ALPHA = "alpha"
WITH_IMAGE = ("mask", "strength", "keep_steps")
WITH_MASK = ("padding_mask_crop", "mask_blur")


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of an init image."""
    group = parser.add_argument_group("init image", "generation starts from an image instead of noise")
    group.add_argument("--image", type=Path, metavar="FILE", help="the init image, fitted to the size of the output")
    group.add_argument(
        "--mask",
        metavar="FILE",
        help=f"image that is white where --image is repainted; {ALPHA!r}: where --image is transparent",
    )
    add_strength(group)
    group.add_argument(
        "--padding-mask-crop",
        type=int,
        metavar="PIXELS",
        help="repaint the masked part and so many pixels around it at full size, and put it into --image, of any size",
    )
    group.add_argument("--mask-blur", type=int, metavar="PIXELS", help="blur the edge of the mask (default: 0)")


def add_resize_mode(parser: argparse._ActionsContainer, images: str) -> None:
    """Add the option of how ``images`` are fitted to the size of the output."""
    parser.add_argument(
        "--resize-mode",
        choices=["crop", "stretch", "fill"],
        help=f"fit {images} to the size of the output: cut to its aspect, distorted, or with the edges' colours around "
        "(default: crop)",
    )


def add_strength(group: argparse._ArgumentGroup) -> None:
    """Add the options of how far an init image is changed."""
    group.add_argument(
        "--strength",
        type=float,
        metavar="X",
        help="above 0 to 1, how far it is changed: of N steps the last N * X run (default: 0.8, with a mask 1)",
    )
    group.add_argument(
        "--keep-steps",
        action="store_true",
        help="run all steps, over the part of the schedule that --strength leaves",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitImage:
    """The options as the pipeline's arguments, and as metadata of the image."""

    arguments: dict[str, Any]
    metadata: dict[str, Any]

    def words(self, request: Request) -> str:
        """The start of a run, for a message."""
        image = self.arguments["image"]
        mask = f" where {self.metadata['mask_image']} is white" if "mask_image" in self.metadata else ""
        planned = request.steps + request.first_step
        return (
            f"starts from {self.metadata['image']} ({image.width}x{image.height}){mask}, "
            f"strength {request.strength:g}: {request.steps} of {planned} step{'s' if planned > 1 else ''}"
        )


def read_init_image(args: argparse.Namespace) -> InitImage | None:
    """Read the init image and its mask; None if there is none.

    Raises:
        RequestError: a file is not an image, or an option comes without the one that it is about.
    """
    from ..runtime.image_files import open_image

    _check_lonely(args)
    if args.image is None:
        return None
    arguments = {"image": open_image(args.image), "strength": args.strength, "keep_steps": args.keep_steps}
    metadata: dict[str, Any] = {"image": args.image.name}
    if args.mask is not None:
        cropped = {"padding_mask_crop": args.padding_mask_crop, "mask_blur": args.mask_blur or 0}
        arguments |= {"mask_image": _mask(args), **cropped}
        metadata["mask_image"] = f"{args.image.name}'s alpha" if args.mask == ALPHA else Path(args.mask).name
        metadata |= {name: value for name, value in cropped.items() if value}
    return InitImage(arguments=arguments, metadata=metadata)


def _mask(args: argparse.Namespace) -> Image:
    from ..errors import RequestError
    from ..runtime.image_files import open_alpha, open_image

    if args.mask != ALPHA:
        return open_image(args.mask)
    if (mask := open_alpha(args.image)) is None:
        raise RequestError(f"--mask {ALPHA}: {args.image} has no transparent pixel: give a mask's file")
    return mask


def _check_lonely(args: argparse.Namespace) -> None:
    """Reject options that have no effect without the option that they are about."""
    from ..errors import RequestError

    for needed, options in (("image", WITH_IMAGE), ("mask", WITH_MASK)):
        if getattr(args, needed) is None:
            for option in options:
                if getattr(args, option) not in (None, False):
                    spelt = option.replace("_", "-")
                    raise RequestError(f"--{spelt} has no effect without --{needed}: give one, or leave it out")
