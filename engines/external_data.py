"""Places from which an ONNX file takes its weights, read without the `onnx` library.

ONNX Runtime before 1.24 follows them anywhere on the disk: a stranger's bundle could show what is in other files.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from pathlib import Path

from ..errors import BundleError, one_line
from .specs import Component

# Fields of ONNX's messages that lead to external data, by number: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
FIELDS = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TensorProto": {13: "StringStringEntryProto"},
}
KEY, VALUE = 1, 2  # of a StringStringEntryProto
FIXED = {1: 8, 5: 4}  # bytes of a value, by its wire type
VARINT, BYTES = 0, 2


def check_external_data(path: Path, component: Component) -> None:
    """Check that a component's graph takes its weights from the component's own files.

    Raises:
        BundleError: it names another file, or it cannot be read as an ONNX file.
    """
    own = {posixpath.relpath(file, posixpath.dirname(component.onnx)) for file in component.files}
    try:
        places = external_locations(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read as an ONNX file ({one_line(error)}): export it again") from error
    if strange := sorted(places - own):
        raise BundleError(
            f"{path} reads weights from {strange[0]!r}, expected a file of its own component: do not trust it"
        )


def external_locations(model: bytes) -> set[str]:
    """The places of all external data of a serialized ModelProto, as it names them.

    Raises:
        ValueError: it is no protocol buffer.
    """
    places: set[str] = set()
    waiting = [("ModelProto", memoryview(model))]
    while waiting:
        kind, message = waiting.pop()
        inner = FIELDS[kind]
        for number, part in _parts(message):
            if (kind := inner.get(number, "")) == "StringStringEntryProto":
                places |= _location(part)
            elif kind:
                waiting.append((kind, part))
    return places


def _location(entry: memoryview) -> set[str]:
    parts = [(number, bytes(part)) for number, part in _parts(entry)]
    if (KEY, b"location") not in parts:
        return set()
    return {part.decode(errors="replace") for number, part in parts if number == VALUE}


def _parts(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The fields of a message that are messages or bytes, with their numbers."""
    at, end = 0, len(message)
    while at < end:
        tag, at = _varint(message, at)
        wire = tag & 7
        if wire == BYTES:
            length, at = _varint(message, at)
            yield tag >> 3, message[at : at + length]
            at += length
        elif wire == VARINT:
            _, at = _varint(message, at)
        elif wire in FIXED:
            at += FIXED[wire]
        else:
            raise ValueError(f"a field of wire type {wire}")
    if at > end:
        raise ValueError("a field that is longer than its message")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """A number of variable length, and the place after it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number that does not end")
