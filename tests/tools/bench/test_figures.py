"""The figures that the bench reports: pure functions of timings."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypersd.tools.bench.figures import (
    TOTAL,
    make_sample,
    median_ratio,
    percentile,
    round_order,
    stage_medians,
    summarize,
    times_floor,
)

SECONDS = st.floats(min_value=1e-6, max_value=1e4)


def test_rounds_go_forth_and_back() -> None:
    """Whoever draws first in one round draws last in the next: a machine that slows down favours none."""
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


def test_ratios_pair_what_was_drawn_in_the_same_round() -> None:
    """A contender that died after two rounds is compared by those; without a pair there is no ratio."""
    assert median_ratio([1.0, 2.0, 100.0], [3.0, 4.0]) == pytest.approx(2.5)
    assert median_ratio([], [1.0]) is None


@given(SECONDS, st.dictionaries(st.sampled_from(["tokens", "step 1", "decode"]), SECONDS))
def test_stages_and_the_rest_are_never_negative(seconds: float, stages: dict[str, float]) -> None:
    """What is left of the whole is ``other``; clocks that disagree by a little do not make it negative."""
    sample = make_sample(seconds, stages)
    assert sample.stages["other"] == max(0.0, seconds - sum(stages.values()))
    assert {name: sample.stages[name] for name in stages} == stages


def test_a_summary_of_samples() -> None:
    """Median, p95, minimum, ratio, stages and floors are those of the samples, each in its place."""
    ours = [make_sample(seconds, {"step 1": seconds / 2}) for seconds in (1.0, 2.0, 3.0)]
    theirs = [make_sample(seconds, {"step 1": seconds / 2}) for seconds in (2.0, 6.0, 3.0)]
    found = summarize(theirs, ours, {"step 1": 0.5, "decode": 0.25})
    assert found is not None
    assert (found.median, found.minimum, found.ratio) == (3.0, 2.0, 2.0)
    assert found.p95 == pytest.approx(5.7)
    assert found.stages == {"step 1": 1.5, "other": 1.5}
    assert found.floors == {"step 1": 3.0, TOTAL: 4.0}
    assert summarize([], ours, {}) is None


def test_floors_of_nothing_are_not_divided_by() -> None:
    """A stage whose floor is zero or unknown has no multiple; without any there is none of the whole."""
    assert times_floor({"decode": 1.0}, 1.0, {"decode": 0.0}) == {}
    assert times_floor({"decode": 1.0}, 1.0, {}) == {}


def test_stage_medians_are_taken_stage_by_stage() -> None:
    """A stage that one sample lacks took no time there."""
    samples = [make_sample(1.0, {"decode": 0.2}), make_sample(1.0, {"decode": 0.4}), make_sample(1.0, {})]
    assert stage_medians(samples)["decode"] == statistics.median([0.2, 0.4, 0.0])
