"""Are two contenders' images the same?"""

from __future__ import annotations

import math

import numpy as np

from ..verification import THRESHOLDS, Threshold, measure_difference
from .report import Sameness, Verdict

BFLOAT16_PSNR = 20.0  # dB; bfloat16 has 8 bits, and sampling carries its rounding on from step to step
LEVEL = 1 / 255


def judge(psnr: float, largest: float, threshold: Threshold | None) -> Verdict:
    """``same`` within the threshold of the precision; bfloat16 has none, there it is ``close``; else ``other``."""
    if threshold is None:
        return "close" if psnr >= BFLOAT16_PSNR else "other"
    is_same = psnr >= threshold.psnr and largest <= max(threshold.largest, LEVEL * 1.001)  # pixels are whole levels
    return "same" if is_same else "other"


def compare_images(ours: np.ndarray, theirs: np.ndarray, precisions: set[str]) -> Sameness:
    """Compare two images, uint8 [H, W, 3], whose networks computed in these precisions."""
    if ours.shape != theirs.shape:
        return Sameness(psnr=0.0, largest=1.0, verdict="other")
    found = measure_difference("image", ours / 255, theirs / 255, peak=1.0)
    threshold = None if "bf16" in precisions else THRESHOLDS["fp16" if "fp16" in precisions else "fp32"]
    if math.isinf(found.psnr):
        return Sameness(psnr=None, largest=0.0, verdict="same")
    return Sameness(psnr=found.psnr, largest=found.largest, verdict=judge(found.psnr, found.largest, threshold))
