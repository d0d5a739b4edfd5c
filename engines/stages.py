"""Stages of an image: the components that are loaded together in low memory."""

from __future__ import annotations

TEXT, DENOISE = "text", "denoise"


def stage_of(component: str) -> str:
    """The stage of a component: the text encoders have one, and the UNet with its ControlNets.

    ControlNets run beside the UNet in every step. SDXL's text encoders have a third of its UNet's weights together, so
    they do not raise the peak, and several prompts run them in turn. All others are a stage of their own.
    """
    kind = component.partition("/")[0]
    return TEXT if kind.startswith("text_encoder") else DENOISE if kind in ("unet", "controlnet") else component
