"""Options of the LoRAs that an image is generated with."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..engines import Manifest
    from ..runtime import Pipeline
    from ..serve.lora_folder import LoraFolder


def add_lora_options(parser: argparse.ArgumentParser) -> None:
    """Add the LoRA files with their strengths."""
    group = parser.add_argument_group("LoRAs (in the slot of hypersd export --lora-slot)")
    group.add_argument(
        "--use-lora",
        action="append",
        default=[],
        type=_lora,
        metavar="FILE[:STRENGTH]",
        help="a .safetensors file; STRENGTH is -10 to 10 (default: 1); may be repeated",
    )
    group.add_argument(
        "--strict", action="store_true", help="refuse a LoRA of which a part would be left out: the slot is too small"
    )


def _lora(text: str) -> tuple[Path, float]:
    """``FILE`` or ``FILE:STRENGTH``."""
    file, colon, strength = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        return Path(file), float(strength)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{strength!r} is no strength: expected FILE:STRENGTH, such as style.safetensors:0.8"
        ) from None


def check_lora_options(args: argparse.Namespace, manifest: Manifest) -> None:
    """Reject LoRAs for a bundle without a slot, before its engines are loaded.

    Raises:
        RequestError: the bundle has none, or --strict is without a LoRA.
    """
    from ..errors import RequestError
    from ..runtime.adapter import slot_of

    if args.use_lora:
        slot_of(manifest)
    elif args.strict:
        raise RequestError("--strict is about LoRAs: give --use-lora FILE with it")


def load_loras(pipe: Pipeline, args: argparse.Namespace) -> dict[str, float]:
    """Load the files; the strengths by adapter."""
    return {pipe.load_lora_weights(file, strict=args.strict).name: strength for file, strength in args.use_lora}


def add_lora_folder(parser: argparse.ArgumentParser) -> None:
    """Add the folder of LoRAs that requests may use."""
    parser.add_argument(
        "--lora-folder",
        type=Path,
        metavar="FOLDER",
        help="requests may use its .safetensors files as adapters, by their names without the ending; new files are "
        "found while it runs. For bundles of hypersd export --lora-slot",
    )
    parser.add_argument(
        "--strict", action="store_true", help="do not offer LoRAs of which a part would be left out (see generate)"
    )


def read_lora_folder(args: argparse.Namespace) -> LoraFolder | None:
    """The folder, or None.

    Raises:
        RequestError: there is no such folder; or --strict is without one.
    """
    from ..errors import RequestError
    from ..serve.lora_folder import LoraFolder

    if args.lora_folder is not None:
        return LoraFolder(args.lora_folder, args.strict)
    if args.strict:
        raise RequestError("--strict is about LoRAs: give --lora-folder FOLDER with it")
    return None
