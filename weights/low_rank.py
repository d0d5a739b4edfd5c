"""Approximations of a layer's change by a product of two thin matrices, ``down [r, in]`` and ``up [out, r]``.

The best one of a rank takes the largest singular values (Eckart and Young, Psychometrika 1, 1936).
"""

from __future__ import annotations

import torch
from torch import Tensor

OVERSAMPLING, POWER_ITERATIONS = 8, 4  # of the randomized decomposition of a whole matrix
NEGLIGIBLE = 1e-5  # of the largest singular value; smaller ones are rounding
SEED = 0  # of its random numbers: a file gives the same factors in every process


def squared_norm(down: Tensor, up: Tensor) -> float:
    """The squared Frobenius norm of ``up @ down``, without making the product."""
    return torch.sum((up.T @ up) * (down @ down.T)).clamp_min(0).item()


def ordered(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the same product, so that the first k rows and columns are its best approximation of rank k."""
    left, core_up = torch.linalg.qr(up)
    right, core_down = torch.linalg.qr(down.T)
    u, values, v = torch.linalg.svd(core_up @ core_down.T)
    root = values.sqrt()
    count = len(root)
    return (root[:, None] * v[:count]) @ right.T, (left @ u[:, :count]) * root


def factorize(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of a whole matrix [out, in], of at most ``rank``, in the order of :func:`ordered`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        wanted = min(rank + OVERSAMPLING, *change.shape)
        u, values, v = torch.svd_lowrank(change, q=wanted, niter=POWER_ITERATIONS)
    kept = min(rank, max(1, int((values > NEGLIGIBLE * values[0]).sum())))
    root = values[:kept].sqrt()
    return root[:, None] * v[:, :kept].T, u[:, :kept] * root


def balanced(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the same product whose largest elements are within a factor of two of each other.

    They are scaled by a power of two, which rounds nothing: float16 has no place for a tiny ``up`` with a large
    ``down``, as alphas far below the rank make it.
    """
    largest = down.abs().max(), up.abs().max()
    if not all(value > 0 for value in largest):
        return down, up
    shift = torch.round(torch.log2(largest[1] / largest[0]) / 2)
    return down * torch.exp2(shift), up * torch.exp2(-shift)
