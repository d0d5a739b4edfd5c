"""The extents at which two computations are compared."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hypersd.engines.random_inputs import ends_of_ranges


@given(names=st.lists(st.sampled_from(["batch", "latent_height", "latent_width", "rows"]), unique=True))
def test_both_ends_of_every_range_are_taken_and_never_two_largest(names: list[str]) -> None:
    """Memory grows with the product of all ranges: 13.6 GB for one attention of SDXL at their largest."""
    selections = list(ends_of_ranges(names))
    assert all(selection.keys() == set(names) for selection in selections)
    for name in names:
        assert {"min", "max"} <= {selection[name] for selection in selections}
    assert all(list(selection.values()).count("max") <= 1 for selection in selections)
    assert len(selections) == 1 + len(names)
