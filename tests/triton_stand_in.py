"""A stand-in for ``triton_python_backend_utils``, which only Triton's own processes have.

It has what the README of Triton's Python backend documents and hypersd uses: requests with inputs, tensors, responses
and errors with codes. tests/triton_backend/test_server.py runs the real one.
"""

from __future__ import annotations

from typing import Any

import numpy as np


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class TritonError:
    INTERNAL, INVALID_ARG, CANCELLED = "INTERNAL", "INVALID_ARG", "CANCELLED"

    def __init__(self, message: str, code: str = INTERNAL) -> None:
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> str:
        return self._code


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor] | None = None, error: TritonError | None = None) -> None:
        self._tensors, self._error = output_tensors or [], error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error


class InferenceRequest:
    """``inputs``: one row each, or arrays with a batch dimension."""

    def __init__(self, is_cancelled: bool = False, **inputs: Any) -> None:
        self._inputs, self._is_cancelled = [Tensor(name, _rows(value)) for name, value in inputs.items()], is_cancelled

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def is_cancelled(self) -> bool:
        return self._is_cancelled


def _rows(value: Any) -> np.ndarray:
    """As Triton hands them over: strings as bytes in an array of objects."""
    if isinstance(value, np.ndarray):
        return value
    values = value if isinstance(value, list) else [value]
    if isinstance(values[0], (str, bytes)):
        return np.array([[v.encode() if isinstance(v, str) else v for v in values]], np.object_)
    return np.array([values], np.int64 if isinstance(values[0], int) else np.float32)
