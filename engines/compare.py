"""Comparison of two computations of the same tensor or image. Imports no torch: `hypersd build` reads it at once."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from .precision import PRECISIONS

# By the type that is computed in.
TOLERANCES = {precision.compute: precision.plain.tolerance for precision in PRECISIONS.values()}


@dataclasses.dataclass(frozen=True)
class Threshold:
    """Limits for an image: the least ``psnr`` in dB, and the ``largest`` error as a part of full scale."""

    psnr: float
    largest: float


# Of images, by precision, the coarsest first. Measured on tiny and on full-size models: fp32 lies at 100 dB and above;
# in fp16 diffusers and ONNX Runtime round differently, and sampling carries that on from step to step. OpenVINO's bf16
# rounds at every layer, to 8 bits. Linear layers in int8 change less: images of the demonstration lie at 43 to 54 dB.
THRESHOLDS = {
    "bf16": Threshold(psnr=30.0, largest=0.5),
    "int8": Threshold(psnr=30.0, largest=0.5),
    "fp16": Threshold(psnr=30.0, largest=0.5),
    "fp32": Threshold(psnr=60.0, largest=2e-3),
}


def differences(actual: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """The largest error as a part of the reference's largest value, and the root mean squares' ratio."""
    error = actual.astype(np.float32) - reference.astype(np.float32)
    tiny = float(np.finfo(np.float32).tiny)  # for an output that is zero everywhere
    scale = max(float(np.abs(reference.astype(np.float32)).max()), tiny)
    rms_scale = max(_rms(reference.astype(np.float32)), tiny)
    return float(np.abs(error).max()) / scale, _rms(error) / rms_scale


def excess(largest: float, rms: float, tolerance: tuple[float, float]) -> str | None:
    """Differences that are not within a tolerance, in words; NaN is not. None if they are."""
    if largest <= tolerance[0] and rms <= tolerance[1]:
        return None
    allowed = f"allowed are {tolerance[0]:.0e} and {tolerance[1]:.0e}"
    return f"by {largest:.1e} at most and {rms:.1e} in the mean, {allowed}"


def peak_signal_to_noise(error: np.ndarray) -> float:
    """The PSNR in dB of errors that are given in parts of the peak; infinite without any error."""
    power = float(np.mean(np.square(error, dtype=np.float64)))
    return math.inf if power == 0 else -10 * math.log10(power)


def _rms(array: np.ndarray) -> float:
    return float(np.sqrt(np.mean(array**2)))
