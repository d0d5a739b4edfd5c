"""Figures of repeated timings, and the comparison of two contenders' images."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from ...engines.compare import THRESHOLDS, peak_signal_to_noise
from .protocol import OTHER
from .report import Sameness, Sample, Summary, Verdict

LEVEL = 1 / 255


def make_sample(seconds: float, stages: Mapping[str, float]) -> Sample:
    """A sample, with the rest of the whole as the stage ``other``, never negative."""
    return Sample(seconds=seconds, stages={**stages, OTHER: max(0.0, seconds - sum(stages.values()))})


def percentile(values: Sequence[float], part: float) -> float:
    """The value below which this part (0 to 1) of the values lies, interpolated linearly."""
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


def summarize(samples: Sequence[Sample], ours: Sequence[Sample]) -> Summary | None:
    """The figures of a contender's samples beside hypersd's; None without samples."""
    if not samples:
        return None
    seconds = [sample.seconds for sample in samples]
    return Summary(
        median=statistics.median(seconds),
        p95=percentile(seconds, 0.95),
        minimum=min(seconds),
        ratio=median_ratio([sample.seconds for sample in ours], seconds),
        stages=stage_medians(samples),
    )


def compare_images(ours: np.ndarray, theirs: np.ndarray, precisions: set[str]) -> Sameness:
    """Compare two images, uint8 [H, W, 3], whose components computed in these precisions."""
    if ours.shape != theirs.shape:
        return Sameness(psnr=0.0, largest=1.0, verdict="other")
    error = np.abs(ours / 255 - theirs / 255)
    psnr, largest = peak_signal_to_noise(error), float(error.max())
    if math.isinf(psnr):
        return Sameness(psnr=None, largest=0.0, verdict="same")
    return Sameness(psnr=psnr, largest=largest, verdict=_judge(psnr, largest, precisions))


def _judge(psnr: float, largest: float, precisions: set[str]) -> Verdict:
    """``same`` within the threshold of `hypersd verify`, ``close`` if that is of a precision that rounds to 8 bits."""
    threshold = next(threshold for name, threshold in THRESHOLDS.items() if name in precisions)
    if not (psnr >= threshold.psnr and largest <= max(threshold.largest, LEVEL * 1.001)):  # pixels are whole levels
        return "other"
    return "close" if precisions & {"bf16", "int8"} else "same"
