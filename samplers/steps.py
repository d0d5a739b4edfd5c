"""One step of each sampler: pure functions of tensors, with the caller's noise.

Every operation stands in diffusers' order, so results are the same to the bit in float32 and float16 alike.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .schedule import PredictionType


@dataclass(frozen=True, kw_only=True, eq=False)
class Coefficients:
    """What a step at timestep `t` needs of the schedule.

    Tensors are 0-dim float32 on the CPU: torch hands them to a kernel as plain numbers, on any device, with no copy,
    and they leave the dtype of the image alone.
    """

    t: int
    prediction_type: PredictionType
    signal: Tensor  # sqrt(alpha_t): the image's share of the sample
    spread: Tensor  # sqrt(1 - alpha_t): the noise's
    clip: float | None  # bound on the predicted image
    noisy: bool  # whether this step adds fresh noise


@dataclass(frozen=True, kw_only=True, eq=False)
class DDIMCoefficients(Coefficients):
    signal_prev: Tensor  # sqrt(alpha_prev)
    direction: Tensor  # sqrt(1 - alpha_prev - sigma^2)
    sigma: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class TCDCoefficients(Coefficients):
    signal_s: Tensor  # sqrt(alpha_s)
    spread_s: Tensor  # sqrt(1 - alpha_s)
    keep: Tensor  # sqrt(alpha_prev / alpha_s)
    sigma: Tensor  # sqrt(1 - alpha_prev / alpha_s)


@dataclass(frozen=True, kw_only=True, eq=False)
class LCMCoefficients(Coefficients):
    skip: Tensor  # c_skip(t)
    out: Tensor  # c_out(t)
    signal_prev: Tensor  # sqrt(alpha_prev)
    spread_prev: Tensor  # sqrt(1 - alpha_prev)


def predict_x0(c: Coefficients, model_output: Tensor, sample: Tensor) -> Tensor:
    """The finished image as the network sees it from here, clipped if the schedule clips: [B, 4, h, w], any float.

    Epsilon: DDIM, arXiv:2010.02502, the bracket of eq. 12. v: arXiv:2202.00512, appendix D.
    """
    if c.prediction_type == "epsilon":
        x0 = (sample - c.spread * model_output) / c.signal
    elif c.prediction_type == "v_prediction":
        x0 = c.signal * sample - c.spread * model_output
    else:
        x0 = model_output
    return x0 if c.clip is None else x0.clamp(-c.clip, c.clip)


def predict_epsilon(c: Coefficients, model_output: Tensor, sample: Tensor) -> Tensor:
    """The noise in `sample` as the network sees it, from the unclipped image as in diffusers: [B, 4, h, w]."""
    if c.prediction_type == "epsilon":
        return model_output
    if c.prediction_type == "v_prediction":
        return c.signal * model_output + c.spread * sample
    return (sample - c.signal * model_output) / c.spread


def ddim_step(c: DDIMCoefficients, model_output: Tensor, sample: Tensor, noise: Tensor | None) -> Tensor:
    """From t to the previous timestep: [B, 4, h, w], a new tensor. DDIM, arXiv:2010.02502, eq. 12.

    `noise` is standard normal, of the same shape; None where `c.noisy` is False.
    """
    x0, epsilon = predict_x0(c, model_output, sample), predict_epsilon(c, model_output, sample)
    prev = c.signal_prev * x0 + c.direction * epsilon
    return prev if noise is None else prev + c.sigma * noise


def tcd_step(c: TCDCoefficients, model_output: Tensor, sample: Tensor, noise: Tensor | None) -> Tensor:
    """From t down to s, then back up to the next timestep with fresh noise: [B, 4, h, w], a new tensor.

    TCD, arXiv:2402.19159, strategic stochastic sampling; `noise` as for `ddim_step`.
    """
    x0, epsilon = predict_x0(c, model_output, sample), predict_epsilon(c, model_output, sample)
    at_s = c.signal_s * x0 + c.spread_s * epsilon
    return at_s if noise is None else c.keep * at_s + c.sigma * noise


def lcm_step(c: LCMCoefficients, model_output: Tensor, sample: Tensor, noise: Tensor | None) -> Tensor:
    """From t to the image, then to the next timestep with fresh noise: [B, 4, h, w], a new tensor.

    Consistency models, arXiv:2303.01469, eq. 5 and algorithm 1, in latent space as LCM, arXiv:2310.04378; `noise` as
    for `ddim_step`. Without noise the denoised image itself is the result.
    """
    denoised = c.out * predict_x0(c, model_output, sample) + c.skip * sample
    return denoised if noise is None else c.signal_prev * denoised + c.spread_prev * noise
