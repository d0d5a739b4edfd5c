"""Figures of repeated timings, and the order in which they are taken."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from .drawing import OTHER
from .report import Sample, Summary

TOTAL = "total"


def round_order(names: Sequence[str], i: int) -> list[str]:
    """Who draws after whom in round ``i``: A B C, then C B A, so that what drifts does not favour any."""
    return list(names) if i % 2 == 0 else list(reversed(names))


def make_sample(seconds: float, stages: Mapping[str, float]) -> Sample:
    """A sample, with what is left of the whole as the stage ``other``, never less than nothing."""
    return Sample(seconds=seconds, stages={**stages, OTHER: max(0.0, seconds - sum(stages.values()))})


def percentile(values: Sequence[float], part: float) -> float:
    """The value below which lies this part (0 to 1) of some; between two of them it is interpolated."""
    ordered = sorted(values)
    place = part * (len(ordered) - 1)
    below, above = ordered[math.floor(place)], ordered[math.ceil(place)]
    return below + (above - below) * (place - math.floor(place))


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """The median of theirs divided by ours, pair by pair; one may have fewer. None without a pair."""
    ratios = [their / our for our, their in zip(ours, theirs, strict=False)]
    return statistics.median(ratios) if ratios else None


def stage_medians(samples: Sequence[Sample]) -> dict[str, float]:
    """The median of every stage, in the order of the first sample."""
    return {
        stage: statistics.median(sample.stages.get(stage, 0.0) for sample in samples) for stage in samples[0].stages
    }


def times_floor(seconds: Mapping[str, float], median: float, floor: Mapping[str, float]) -> dict[str, float]:
    """How many times its floor each stage takes that has one, and all of it."""
    times = {stage: seconds[stage] / least for stage, least in floor.items() if stage in seconds and least > 0}
    whole = sum(floor.values())
    return {**times, TOTAL: median / whole} if whole > 0 else times


def summarize(samples: Sequence[Sample], ours: Sequence[Sample], floor: Mapping[str, float]) -> Summary | None:
    """The figures of a contender's samples beside hypersd's; None without samples."""
    if not samples:
        return None
    seconds, stages = [sample.seconds for sample in samples], stage_medians(samples)
    median = statistics.median(seconds)
    return Summary(
        median=median,
        p95=percentile(seconds, 0.95),
        minimum=min(seconds),
        ratio=median_ratio([sample.seconds for sample in ours], seconds),
        stages=stages,
        floors=times_floor(stages, median, floor),
    )
