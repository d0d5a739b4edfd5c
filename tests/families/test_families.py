"""Families: found by name, recognised by their marks, and told apart."""

from __future__ import annotations

import pytest

from hypersd.errors import BundleError
from hypersd.export.checkpoints import CHECKPOINTS, DEMO_CHECKPOINTS
from hypersd.families import FAMILIES, find_family, lora_title


@pytest.mark.parametrize("name", [*FAMILIES])
def test_a_family_is_found_by_its_name(name: str) -> None:
    assert find_family(name) is FAMILIES[name]
    assert find_family(name).name == name


def test_an_unknown_family_is_rejected_with_the_known_ones() -> None:
    """A manifest of another family is a bundle's fault: it must not be taken for the nearest family."""
    with pytest.raises(BundleError, match=r"'sd3' is not known: expected sd15 or sdxl"):
        find_family("sd3")


def test_every_checkpoint_is_of_a_known_family() -> None:
    assert {checkpoint.family for checkpoint in (*CHECKPOINTS, *DEMO_CHECKPOINTS)} == {*FAMILIES}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_a_lora_is_recognised_by_every_mark_of_its_family(family) -> None:
    for mark in family.lora_marks:
        assert lora_title([f"prefix_{mark}_suffix"]) == family.title
    assert lora_title(["lora_unet_nothing_known"]) is None
