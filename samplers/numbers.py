"""Numbers that callers give, checked."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from ..errors import RequestError, shown


def is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def whole_number(name: str, value: Any, least: int, most: int) -> int:
    """A whole number in a range; both ends belong to it."""
    if not is_whole(value) or not least <= value <= most:
        raise RequestError(f"{name} {shown(value)} is out of range: expected a whole number from {least} to {most}")
    return int(value)


def real_number(name: str, value: Any, least: float, most: float) -> float:
    """A number in a range; both ends belong to it, and nan does not."""
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not least <= number <= most:  # so is nan
        raise RequestError(f"{name} {shown(value)} is out of range: expected a number from {least:g} to {most:g}")
    return number
