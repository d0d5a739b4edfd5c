"""Products of thin matrices: what a rank keeps of a layer's change."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hypersd.weights.low_rank import balanced, factorize, ordered, squared_norm

EXTENT = st.integers(1, 12)


def factors(outputs: int, inputs: int, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    down, up = (torch.randn(shape, generator=generator) for shape in ((rank, inputs), (outputs, rank)))
    return down, up


@settings(deadline=None)
@given(outputs=EXTENT, inputs=EXTENT, rank=EXTENT, seed=st.integers(0, 99))
def test_the_first_factors_are_the_best_approximation(outputs: int, inputs: int, rank: int, seed: int) -> None:
    """A LoRA that is cut to a smaller rank loses as little as is possible (Eckart and Young)."""
    down, up = factors(outputs, inputs, rank, seed)
    change = up @ down
    values = torch.linalg.svdvals(change)
    first_down, first_up = ordered(down, up)
    torch.testing.assert_close(first_up @ first_down, change, rtol=1e-4, atol=1e-4)
    for kept in range(len(first_down) + 1):
        error = torch.linalg.norm(change - first_up[:, :kept] @ first_down[:kept])
        assert error <= torch.linalg.norm(values[kept:]) + 1e-3


@settings(deadline=None)
@given(outputs=EXTENT, inputs=EXTENT, rank=EXTENT, seed=st.integers(0, 99))
def test_the_norm_needs_no_product(outputs: int, inputs: int, rank: int, seed: int) -> None:
    """What is left out of a file is told as a share of its norm, without matrices of full size."""
    down, up = factors(outputs, inputs, rank, seed)
    assert squared_norm(down, up) == pytest.approx((up @ down).square().sum().item(), rel=1e-3, abs=1e-3)


@settings(deadline=None)
@given(scales=st.tuples(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3)), seed=st.integers(0, 99))
def test_balanced_factors_make_the_same_product_to_the_bit(scales: tuple[float, float], seed: int) -> None:
    """A tiny alpha must not push one factor below float16's smallest number."""
    down, up = factors(5, 7, 3, seed)
    down, up = down * scales[0], up * scales[1]
    even_down, even_up = balanced(down, up)
    assert torch.equal(even_up @ even_down, up @ down)
    assert 1 / 2.1 < even_down.abs().max() / even_up.abs().max() < 2.1


def test_zeros_stay_zeros() -> None:
    """A layer that was trained to nothing is none that breaks the file."""
    down, up = torch.zeros(2, 3), torch.randn(4, 2)
    assert all(torch.equal(*pair) for pair in zip(balanced(down, up), (down, up), strict=True))
    assert (factorize(torch.zeros(4, 3), 2)[1] @ factorize(torch.zeros(4, 3), 2)[0] == 0).all()


def test_a_whole_matrix_gives_its_rank_and_the_same_factors_each_time() -> None:
    """LoHa and LoKr have no thin factors in their files; images must not change from one load to the next."""
    down, up = factors(300, 200, 6, 0)
    state = torch.get_rng_state()
    first, second = (factorize(up @ down, 16) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert torch.equal(torch.get_rng_state(), state), "the caller's own random numbers changed"
    assert len(first[0]) == 6
    torch.testing.assert_close(first[1] @ first[0], up @ down, rtol=1e-3, atol=1e-3)
