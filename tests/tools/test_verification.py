"""`hypersd verify` is a judge: it must be able to say no."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hypersd import Pipeline
from hypersd.engines import Bundle
from hypersd.errors import VerifyError, WeightsError
from hypersd.tools.reference import load_reference
from hypersd.tools.verification import Comparison, Difference, Threshold, check_thresholds, compare, side_by_side
from hypersd.tools.verify_cases import Case, make_cases

THRESHOLD = Threshold(psnr=60.0, largest=2e-3)


def comparison(psnr: float, largest: float, seed: int = 0) -> Comparison:
    """An image at that distance."""
    image = Image.new("RGB", (8, 8))
    return Comparison(Case(prompt="a cat", seed=seed), (Difference("image", psnr, 1.0, 0.0, largest),), image, image)


def test_close_images_pass() -> None:
    """Equal images, and those just at the threshold, are diffusers' own."""
    check_thresholds([comparison(math.inf, 0.0), comparison(60.0, 2e-3)], THRESHOLD)


@pytest.mark.parametrize(
    ("psnr", "largest"), [(59.0, 1e-3), (90.0, 3e-3), (math.nan, math.nan), (math.nan, 0.0), (90.0, math.nan)]
)
def test_the_image_that_is_off_is_named(psnr: float, largest: float) -> None:
    """Too noisy, one pixel off, or not a number at all: each fails, and the message is of that image."""
    good, bad = comparison(61.0, 1e-3, seed=1), comparison(psnr, largest, seed=2)
    with pytest.raises(VerifyError, match="seed 2") as error:
        check_thresholds([good, bad, good], THRESHOLD)
    assert "\n" not in str(error.value)


def test_a_changed_source_is_rejected(
    export_tiny: Callable[[str], Path], tiny_repos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Comparing with other weights than the bundle's would judge nothing."""
    bundle = Bundle.load(export_tiny("Hyper-SD15-2steps-lora"))
    monkeypatch.setattr("hypersd.export.repositories.sha256_file", lambda path: "0" * 64)
    with pytest.raises(WeightsError, match="changed since"):
        load_reference(bundle.manifest)


def test_pairs_show_both_and_their_difference() -> None:
    """Ours, diffusers' and the difference at full contrast, side by side."""
    ours, theirs = Image.new("RGB", (8, 8), (10, 10, 10)), Image.new("RGB", (8, 8), (10, 10, 15))
    array = np.asarray(side_by_side(Comparison(Case(prompt="a cat", seed=0), (), ours, theirs)))
    assert array.shape == (8, 24, 3)
    assert array[0, 0].tolist() == [10, 10, 10]
    assert array[0, 8].tolist() == [10, 10, 15]
    assert array[0, 16].tolist() == [0, 0, 255]


def stages(comparison: Comparison) -> list[str]:
    return [difference.stage for difference in comparison.differences]


def test_images_that_start_from_one(sd15_bundle: Path) -> None:
    """The encoder is a stage of its own; the images are diffusers', and the init image has an effect on them."""
    pipe = Pipeline.load(sd15_bundle)
    *_, case = make_cases(pipe.manifest, ["a cat"], 3)
    assert case.starts_from == "image"
    comparison = compare(pipe, load_reference(pipe.manifest), case, steps=4)
    assert stages(comparison) == ["text", "encode", "step 1", "step 2", "decode", "image"]
    assert max(difference.largest for difference in comparison.differences) < 1e-3
    check_thresholds([comparison], THRESHOLD)
    assert "seed 3, from an init image" in str(case)


def test_a_base_for_inpainting(export_inpainting: Callable[[str], Path]) -> None:
    """All of its images repaint a part of one, with diffusers' pipeline for that."""
    pipe = Pipeline.load(export_inpainting("Hyper-SDXL-1step-lora"))
    cases = make_cases(pipe.manifest, ["a cat", "a dog"], 3)
    assert [case.starts_from for case in cases] == ["mask", "mask"]
    comparison = compare(pipe, load_reference(pipe.manifest), cases[1], steps=2)
    assert "encode" in stages(comparison)
    check_thresholds([comparison], THRESHOLD)
    assert np.asarray(comparison.ours).std() > 5
