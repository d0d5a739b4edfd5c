"""The checkpoint tables, published ones against Hyper-SD's model card, and how names are looked up."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from hypersd.errors import CheckpointError
from hypersd.export.checkpoints import CHECKPOINTS, DEMO_CHECKPOINTS, Checkpoint, example_prompt, find_checkpoint

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"

# name: (family, base, kind, sampler, allowed steps with the default first, timesteps, eta, guidance)
CARD = {
    "Hyper-SD15-1step-lora": ("sd15", SD15, "lora", "tcd", (1, 2, 3, 4, 5, 6, 7, 8), None, 1.0, 0.0),
    "Hyper-SD15-2steps-lora": ("sd15", SD15, "lora", "ddim", (2,), None, 0.0, 0.0),
    "Hyper-SD15-4steps-lora": ("sd15", SD15, "lora", "ddim", (4,), None, 0.0, 0.0),
    "Hyper-SD15-8steps-lora": ("sd15", SD15, "lora", "ddim", (8,), None, 0.0, 0.0),
    "Hyper-SD15-8steps-CFG-lora": ("sd15", SD15, "lora", "ddim", (8,), None, 0.0, 5.0),
    "Hyper-SD15-12steps-CFG-lora": ("sd15", SD15, "lora", "ddim", (12,), None, 0.0, 5.0),
    "Hyper-SDXL-1step-lora": ("sdxl", SDXL, "lora", "tcd", (1, 2, 3, 4, 5, 6, 7, 8), None, 1.0, 0.0),
    "Hyper-SDXL-2steps-lora": ("sdxl", SDXL, "lora", "ddim", (2,), None, 0.0, 0.0),
    "Hyper-SDXL-4steps-lora": ("sdxl", SDXL, "lora", "ddim", (4,), None, 0.0, 0.0),
    "Hyper-SDXL-8steps-lora": ("sdxl", SDXL, "lora", "ddim", (8,), None, 0.0, 0.0),
    "Hyper-SDXL-8steps-CFG-lora": ("sdxl", SDXL, "lora", "ddim", (8,), None, 0.0, 5.0),
    "Hyper-SDXL-12steps-CFG-lora": ("sdxl", SDXL, "lora", "ddim", (12,), None, 0.0, 5.0),
    "Hyper-SDXL-1step-Unet": ("sdxl", SDXL, "unet", "lcm", (1,), (800,), 0.0, 0.0),
}
DEMO = {
    "Hyper-Demo15-1step-lora": ("sd15", "Demo15", "lora", "tcd", (1, 2, 3, 4, 5, 6, 7, 8), None, 1.0, 0.0),
    "Hyper-Demo15-2steps-lora": ("sd15", "Demo15", "lora", "ddim", (2,), None, 0.0, 0.0),
    "Hyper-Demo15-4steps-lora": ("sd15", "Demo15", "lora", "ddim", (4,), None, 0.0, 0.0),
    "Hyper-Demo15-8steps-lora": ("sd15", "Demo15", "lora", "ddim", (8,), None, 0.0, 0.0),
    "Hyper-Demo15-8steps-CFG-lora": ("sd15", "Demo15", "lora", "ddim", (8,), None, 0.0, 2.0),
    "Hyper-DemoXL-1step-Unet": ("sdxl", "DemoXL", "unet", "lcm", (1,), (800,), 0.0, 0.0),
}


def rows(table: Iterable[Checkpoint]) -> dict[str, tuple[object, ...]]:
    return {
        c.name: (c.family, c.base, c.kind, c.sampler, c.allowed_steps, c.timesteps, c.eta, c.guidance_scale)
        for c in table
    }


def test_every_row_agrees_with_the_model_card() -> None:
    """The table holds exactly the 13 published SD1.5 and SDXL files, each with the card's settings, once."""
    assert rows(CHECKPOINTS) == CARD
    assert len(CHECKPOINTS) == len(CARD) == 13


def test_the_demonstration_checkpoints() -> None:
    """The clone's checkpoints have a table of their own; names with equal endings are sampled alike."""
    assert rows(DEMO_CHECKPOINTS) == DEMO
    assert len(DEMO_CHECKPOINTS) == len(DEMO)


def test_files_are_named_as_on_the_hub() -> None:
    """Each entry's file is its name with .safetensors: that is what is asked of the Hub, letter case included."""
    assert {c.filename for c in CHECKPOINTS} == {f"{name}.safetensors" for name in CARD}


def test_guided_are_the_cfg_files_and_no_others() -> None:
    """Only the CFG LoRAs get graphs that hold each image twice, and negative prompts."""
    guided = {c.name for c in (*CHECKPOINTS, *DEMO_CHECKPOINTS) if c.is_guided}
    assert guided == {name for name in CARD | DEMO if "-CFG-" in name}


@pytest.mark.parametrize("name", CARD | DEMO)
@pytest.mark.parametrize("spell", [str, str.lower, str.upper, "{}.safetensors".format, "  {} ".format])
def test_names_are_found_in_every_spelling(name: str, spell) -> None:
    """With or without the suffix, in any letter case, with blanks around: the same entry."""
    assert find_checkpoint(spell(name)).name == name


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("Hyper-SDXL-1steps-lora", "Hyper-SDXL-1step-lora"),
        ("hyper-sd15-4step-lora", "Hyper-SD15-4steps-lora"),
        ("Hyper-SDXL-1step-unet.safetensor", "Hyper-SDXL-1step-Unet"),
        ("Hyper-SD15-8step-cfg-lora", "Hyper-SD15-8steps-CFG-lora"),
        ("HyperSDXL 2steps lora", "Hyper-SDXL-2steps-lora"),
        ("Hyper-Demo-1step-lora", "Hyper-Demo15-1step-lora"),
        ("hyper-demoxl-unet", "Hyper-DemoXL-1step-Unet"),
    ],
)
def test_a_misspelt_name_is_answered_with_the_nearest(wrong: str, nearest: str) -> None:
    """The name meant is among those offered, in its true spelling, in one line that repeats what was typed."""
    with pytest.raises(CheckpointError) as error:
        find_checkpoint(wrong)
    message = str(error.value)
    assert nearest in message
    assert repr(wrong) in message
    assert "\n" not in message


@pytest.mark.parametrize("wrong", ["", "   ", ".safetensors", "qwertz", "../etc/passwd", "Схема", "x" * 10_000])
def test_a_name_like_no_other_points_to_the_list(wrong: str) -> None:
    """Nothing is offered where nothing is near: the message says where the names are."""
    with pytest.raises(CheckpointError, match="hypersd list") as error:
        find_checkpoint(wrong)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


def test_the_example_prompt_suits_the_checkpoint() -> None:
    """The command that an export proposes draws something that can be recognised."""
    assert example_prompt("Hyper-SDXL-1step-lora") == "a photo of a cat"
    assert {example_prompt(checkpoint.name) for checkpoint in DEMO_CHECKPOINTS} == {"a red star on a blue background"}
