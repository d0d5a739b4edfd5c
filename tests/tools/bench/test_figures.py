"""The figures that the bench reports: pure functions of timings."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypersd.tools.bench.figures import (
    compare_images,
    make_sample,
    median_ratio,
    percentile,
    stage_medians,
    summarize,
)
from hypersd.tools.bench.session import round_order

SECONDS = st.floats(min_value=1e-6, max_value=1e4)


def test_rounds_go_forth_and_back() -> None:
    """The first contender of a round is the last of the next: a machine that slows down favours none."""
    assert [round_order("abc", i) for i in range(3)] == [["a", "b", "c"], ["c", "b", "a"], ["a", "b", "c"]]
    places = [round_order("abcd", i).index(name) for name in "abcd" for i in range(2)]
    assert [sum(places[i : i + 2]) for i in range(0, 8, 2)] == [3, 3, 3, 3]


@given(st.lists(SECONDS, min_size=1, max_size=40), st.floats(min_value=0, max_value=1))
def test_percentiles_are_numpys(values: list[float], part: float) -> None:
    """A p95 that people compare with others' is computed as others compute it."""
    assert percentile(values, part) == pytest.approx(float(np.percentile(values, part * 100)))


@given(st.lists(SECONDS, min_size=1, max_size=20), st.floats(min_value=0.1, max_value=10))
def test_a_ratio_of_pairs_is_not_moved_by_what_hits_both(ours: list[float], factor: float) -> None:
    """Rounds that are slow for all leave the ratio as it is, however far they are apart."""
    assert median_ratio(ours, [seconds * factor for seconds in ours]) == pytest.approx(factor)


def test_ratios_pair_images_of_the_same_round() -> None:
    """A contender that died after two rounds is compared by those; without a pair there is no ratio."""
    assert median_ratio([1.0, 2.0, 100.0], [3.0, 4.0]) == pytest.approx(2.5)
    assert median_ratio([], [1.0]) is None


@given(SECONDS, st.dictionaries(st.sampled_from(["tokens", "step 1", "decode"]), SECONDS))
def test_stages_and_the_rest_are_never_negative(seconds: float, stages: dict[str, float]) -> None:
    """The rest of the whole is ``other``; clocks that disagree by a little do not make it negative."""
    sample = make_sample(seconds, stages)
    assert sample.stages["other"] == max(0.0, seconds - sum(stages.values()))
    assert {name: sample.stages[name] for name in stages} == stages


def test_a_summary_of_samples() -> None:
    """Median, p95, minimum, ratio and stages are those of the samples, each in its place."""
    ours = [make_sample(seconds, {"step 1": seconds / 2}) for seconds in (1.0, 2.0, 3.0)]
    theirs = [make_sample(seconds, {"step 1": seconds / 2}) for seconds in (2.0, 6.0, 3.0)]
    found = summarize(theirs, ours)
    assert found is not None
    assert (found.median, found.minimum, found.ratio) == (3.0, 2.0, 2.0)
    assert found.p95 == pytest.approx(5.7)
    assert found.stages == {"step 1": 1.5, "other": 1.5}
    assert summarize([], ours) is None


def test_stage_medians_are_taken_stage_by_stage() -> None:
    """A stage that one sample lacks took no time there."""
    samples = [make_sample(1.0, {"decode": 0.2}), make_sample(1.0, {"decode": 0.4}), make_sample(1.0, {})]
    assert stage_medians(samples)["decode"] == statistics.median([0.2, 0.4, 0.0])


GREY = np.full((32, 32, 3), 100, np.uint8)


def off_by(levels: int, every: int = 1) -> np.ndarray:
    """Grey, with each ``every``-th pixel off by so many levels."""
    image = GREY.copy().reshape(-1, 3)
    image[::every] += levels
    return image.reshape(GREY.shape)


@pytest.mark.parametrize(
    ("image", "precisions", "verdict"),
    [
        (GREY, {"fp32"}, "same"),
        (off_by(1, every=100), {"fp32"}, "same"),  # rounded to the other side here and there
        (off_by(1), {"fp32"}, "other"),
        (off_by(2, every=500), {"fp32"}, "other"),  # few pixels, but by more than rounding
        (off_by(5), {"fp32", "fp16"}, "same"),
        (off_by(20), {"fp16"}, "other"),
        (GREY, {"bf16"}, "same"),
        (off_by(7), {"fp32", "bf16"}, "close"),
        (off_by(20), {"fp32", "bf16"}, "other"),
        (GREY[:16], {"bf16"}, "other"),
    ],
)
def test_verdicts_are_those_of_verify(image: np.ndarray, precisions: set[str], verdict: str) -> None:
    """float32 explains a level here and there, float16 and bfloat16 30 dB; another size is another image."""
    assert compare_images(GREY, image, precisions).verdict == verdict


def test_equal_images_have_no_psnr() -> None:
    """Infinity is not a number in JSON."""
    assert compare_images(GREY, GREY, {"fp32"}).psnr is None
