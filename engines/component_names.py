"""Names in a bundle: of ControlNets' components, and of the tensors of ControlNets and one-graphs."""

from __future__ import annotations

import re

RESIDUAL_INPUT = re.compile(r"(down|mid)_block_additional_residual(_\d+)?")


def controlnet(name: str) -> str:
    """The component that computes a ControlNet's residuals."""
    return f"controlnet/{name}"


def cond_embedding(name: str) -> str:
    """The component that embeds a ControlNet's control image."""
    return f"controlnet_cond_embedding/{name}"


def residual_input(output: str) -> str:
    """The UNet's input for an output of a ControlNet; both have diffusers' names."""
    return output.replace("_res_sample", "_additional_residual")


def split_named(text: str) -> tuple[str | None, str]:
    """``NAME=VALUE`` as a pair; None and the whole text if the part before the sign is a path and not a name."""
    name, equals, value = text.partition("=")
    return (name, value) if equals and "/" not in name and "\\" not in name else (None, text)


def check_controlnet_name(name: str) -> None:
    """Check a ControlNet's name: it names a folder, and stands in options such as ``NAME=VALUE``."""
    if not re.fullmatch(r"[\w.-]{1,100}", name, re.ASCII) or not name.strip("."):
        raise ValueError(f"ControlNet name {name!r}: expected letters, digits, _, . and -")


LATENTS, IMAGES = "latents", "images"  # of a one-graph


def input_ids(encoder: str) -> str:
    """A one-graph's input for a text encoder's tokens: ``input_ids``, and ``input_ids_2`` for ``text_encoder_2``."""
    return f"input_ids{encoder.removeprefix('text_encoder')}"


def lora_input(component: str) -> str:
    """A one-graph's input for a component's LoRA slot: ``lora`` of the UNet, ``lora_text_encoder`` and so on."""
    return "lora" if component == "unet" else f"lora_{component}"


def noise_input(step: int) -> str:
    """A one-graph's input for the noise that a step adds; steps count from 0."""
    return f"noise_{step}"


def one_graph_file(name: str) -> str:
    """A one-graph's ONNX file, in the bundle's own folder: the weights that it reads must lie below it."""
    return f"{name}.onnx"


def check_one_graph_name(name: str) -> None:
    """Check that a one-graph's name can be its file's name."""
    if not re.fullmatch(r"one-graph-[\w.-]{1,100}", name, re.ASCII):
        raise ValueError(f"one-graph name {name!r}: expected one-graph- and letters, digits, _, . and -")
