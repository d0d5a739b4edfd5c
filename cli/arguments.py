"""What commands share of words: those that they take and those that they print for pasting."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

BUNDLE_HELP = "the folder that `hypersd export` wrote"


def folder(text: str) -> Path:
    """The name of a folder. An empty one, as of a shell variable that is not set, would mean the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty: expected a folder, such as bundles/Hyper-SDXL-1step-lora")
    return Path(text)


def quoted(path: Path) -> str:
    """A path as a word for the shell, which no command takes for an option."""
    return shlex.quote(f"./{path}" if str(path).startswith("-") else str(path))


def build_command(bundle: Path, *options: str) -> str:
    """What builds a bundle's engines. The bundle comes first: some options take all words that follow."""
    return " ".join(["hypersd build", quoted(bundle), *map(shlex.quote, options)])


def add_backend(parser: argparse.ArgumentParser, words: str) -> None:
    """What draws, explained by ``words``, and what OpenVINO computes in; the others compute in what was exported."""
    parser.add_argument(
        "--backend",
        default="auto",
        choices=["auto", "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"],
        help=words,
    )
    parser.add_argument(
        "--precision",
        choices=["fp32", "bf16"],
        help="what OpenVINO computes in (default: bf16 where the processor multiplies in it, else fp32)",
    )
