"""Bodies of the type multipart/form-data (RFC 7578), as browsers and OpenAI's clients send files."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from ..errors import RequestError

logging.getLogger("python_multipart").setLevel(logging.ERROR)  # clients are told what is wrong with their bodies
MEDIA_TYPE = "multipart/form-data"
MOST_PARTS = 64
LONGEST_NAME = 80  # characters of a name that an error repeats


@dataclasses.dataclass
class _Part:
    """A part of a form.

    Attributes:
        filename: None for a field that is no file.
    """

    disposition: bytes = b""
    name: str = ""
    filename: str | None = None
    content: bytes = b""


def read_form(content_type: str, body: bytes) -> dict[str, Any]:
    """The fields of a form: text as ``str``, files as ``bytes``.

    ``image[]``, as clients name an element of a list, is ``image``; ``control_image[canny]`` is ``{"canny": ...}`` in
    ``control_image``. A file input without a file, which browsers send nameless and empty, is left out.

    Raises:
        RequestError: the body is damaged, has too many parts or one twice, or a text is not UTF-8.
    """
    fields: dict[str, Any] = {}
    for part in _parts(content_type, body):
        if part.filename == "" and not part.content:
            continue
        name, _, inner = part.name.removesuffix("[]").partition("[")
        into, key = (fields, name) if not inner else (fields.setdefault(name, {}), inner.removesuffix("]"))
        if not isinstance(into, dict) or key in into:
            raise RequestError(f"{part.name[:LONGEST_NAME]!r} comes more than once: expected one part of that name")
        into[key] = part.content if part.filename is not None else _text(part)
    return fields


def _text(part: _Part) -> str:
    try:
        return part.content.decode()
    except UnicodeDecodeError:
        name = part.name[:LONGEST_NAME]
        raise RequestError(f"{name!r} is not UTF-8: expected text, or a file with its filename") from None


def _parts(content_type: str, body: bytes) -> list[_Part]:
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise RequestError(f"the Content-Type names no boundary: expected {MEDIA_TYPE}; boundary=...")
    reader = _Reader()
    try:
        parser = MultipartParser(boundary, reader.callbacks())
        parser.write(body)
    except FormParserError:
        raise RequestError(f"the body is not valid {MEDIA_TYPE}: send it with a library that makes it") from None
    if not reader.is_whole:
        raise RequestError(f"the body of type {MEDIA_TYPE} is cut off: expected its closing boundary")
    return reader.parts


class _Reader:
    """Collects the parts that a parser meets."""

    def __init__(self) -> None:
        self.parts: list[_Part] = []
        self.is_whole = False
        self._name, self._value = bytearray(), bytearray()  # of the header that is being read
        self._content: list[bytes] = []

    def callbacks(self) -> Any:
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._name.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
            "on_part_data": lambda data, start, end: self._content.append(data[start:end]),
            "on_part_end": self._end,
            "on_end": self._finish,
        }

    def _begin(self) -> None:
        if len(self.parts) == MOST_PARTS:
            raise RequestError(f"the form has more than {MOST_PARTS} parts: expected fewer")
        self.parts.append(_Part())
        self._content = []

    def _end_header(self) -> None:
        if self._name.lower() == b"content-disposition":
            self.parts[-1].disposition = bytes(self._value)
        self._name.clear()
        self._value.clear()

    def _end_headers(self) -> None:
        part = self.parts[-1]
        options = parse_options_header(part.disposition)[1]
        if b"name" not in options:
            raise RequestError('a part of the form has no name: expected Content-Disposition: form-data; name="..."')
        part.name = options[b"name"].decode("utf-8", "replace")
        if b"filename" in options:
            part.filename = options[b"filename"].decode("utf-8", "replace")

    def _end(self) -> None:
        self.parts[-1].content = b"".join(self._content)

    def _finish(self) -> None:
        self.is_whole = True
