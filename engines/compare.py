"""How far two computations of the same tensor are apart."""

from __future__ import annotations

import numpy as np

# Largest error allowed, as a part of the reference's largest value, and its root mean square as a part of the
# reference's. float16 has 11 bits: each of a deep network's sums is off by up to 5e-4 of its size, in another order in
# each library. float32's second number is what ONNX Runtime's GroupNormalization costs at 1024x1024: it adds up a
# group's four million values one by one (1.7e-4 from float64, torch 1e-7).
TOLERANCES = {"float32": (1e-3, 3e-4), "float16": (2e-2, 5e-3)}


def differences(actual: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """The largest error as a part of the reference's largest value, and the root mean squares' ratio."""
    error = actual.astype(np.float32) - reference.astype(np.float32)
    tiny = float(np.finfo(np.float32).tiny)  # for an output that is zero everywhere
    scale = max(float(np.abs(reference.astype(np.float32)).max()), tiny)
    rms_scale = max(_rms(reference.astype(np.float32)), tiny)
    return float(np.abs(error).max()) / scale, _rms(error) / rms_scale


def _rms(array: np.ndarray) -> float:
    return float(np.sqrt(np.mean(array**2)))
