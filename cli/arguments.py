"""Argument types and options that several commands share, and command lines to copy."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

BUNDLE_HELP = "the folder that `hypersd export` wrote"


def folder(text: str) -> Path:
    """Parse a folder's name; an empty one (a shell variable that is not set) would mean the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty: expected a folder, such as bundles/Hyper-SDXL-1step-lora")
    return Path(text)


def size(text: str) -> tuple[int, int]:
    """Parse ``1024x768`` as (width, height) in pixels."""
    match = re.fullmatch(r"(\d{1,5})[xX](\d{1,5})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r}: expected WIDTHxHEIGHT in pixels, such as 512x512")
    return int(match[1]), int(match[2])


def size_word(size: tuple[int, int] | None) -> str | None:
    """Format (width, height) as ``1024x768``."""
    return None if size is None else f"{size[0]}x{size[1]}"


def quoted(path: Path) -> str:
    """Quote a path for the shell, so that no command takes it for an option."""
    return shlex.quote(f"./{path}" if str(path).startswith("-") else str(path))


def build_command(bundle: Path, *options: str) -> str:
    """Command line that builds a bundle's engines. The bundle comes first: some options take all words that follow."""
    return " ".join(["hypersd build", quoted(bundle), *map(shlex.quote, options)])


def add_backend(parser: argparse.ArgumentParser, words: str) -> None:
    """Add `--backend` (help text ``words``) and `--precision` (OpenVINO only)."""
    parser.add_argument(
        "--backend",
        default="auto",
        choices=["auto", "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"],
        help=words,
    )
    parser.add_argument(
        "--precision",
        choices=["fp32", "bf16"],
        help="OpenVINO only: compute type (default: bf16 where the processor supports it natively, else fp32)",
    )
