"""Lists of tensors and modules in messages: counted, sorted, and readable when a whole file is wrong."""

from __future__ import annotations

from collections.abc import Iterable

LISTED = 30


def listed(names: Iterable[str]) -> str:
    """``2: first, second``; of a long list the first names."""
    names = sorted(names)
    return f"{len(names)}: {', '.join(names[:LISTED])}{', …' if len(names) > LISTED else ''}"


def describe_keys(present: set[str], expected: set[str]) -> str:
    """Left-over and missing keys in one line."""
    differences = {"left over": present - expected, "missing": expected - present}
    return "; ".join(listed(keys).replace(":", f" {what}:", 1) for what, keys in differences.items() if keys)
