"""What the graph of a whole image is called in a bundle, and its tensors."""

from __future__ import annotations

import re

LATENTS, IMAGES = "latents", "images"


def input_ids(encoder: str) -> str:
    """The input of a text encoder's tokens: ``input_ids``, and ``input_ids_2`` for ``text_encoder_2``."""
    return f"input_ids{encoder.removeprefix('text_encoder')}"


def noise_input(step: int) -> str:
    """The input of the noise that a step adds, counted from 0."""
    return f"noise_{step}"


def one_graph_file(name: str) -> str:
    """A one-graph's ONNX file, in the bundle's own folder: the weights that it reads must lie below it."""
    return f"{name}.onnx"


def check_one_graph_name(name: str) -> None:
    """A one-graph's name is that of its file, and says what it is."""
    if not re.fullmatch(r"one-graph-[\w.-]{1,100}", name, re.ASCII):
        raise ValueError(f"one-graph name {name!r}: expected one-graph- and letters, digits, _, . and -")
