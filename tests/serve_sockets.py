"""HTTP to the byte, for what no proper client sends."""

from __future__ import annotations

import json
import re
import socket
from typing import Any

from stand_in_service import LONG

Address = tuple[str, int]


def dial(address: Address) -> socket.socket:
    return socket.create_connection(address, timeout=LONG)


def head(path: str = "/v1/images/generations", method: str = "POST", **headers: Any) -> bytes:
    """Request line and headers; an underscore in a name stands for a hyphen."""
    fields = {"Host": "127.0.0.1", "Content_Type": "application/json", **headers}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name.replace('_', '-')}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def whole(body: bytes, path: str = "/v1/images/generations", **headers: Any) -> bytes:
    """A request with its body."""
    return head(path, Content_Length=len(body), **headers) + body


def until_closed(connection: socket.socket) -> bytes:
    """All that the server says until it ends the connection."""
    parts = []
    try:
        while part := connection.recv(1 << 16):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def answer(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the next answer, and no more bytes than it has."""
    start = b""
    while not start.endswith(b"\r\n\r\n"):
        byte = connection.recv(1)
        assert byte, f"closed after {start!r}"
        start += byte
    lines = start.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:] if line)}
    body, length = b"", int(headers.get("content-length", 0))
    while len(body) < length:
        part = connection.recv(length - len(body))
        assert part, "closed within the body"
        body += part
    return int(lines[0].split()[1]), headers, body


def exchange(address: Address, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """The answer to a request of these bytes."""
    with dial(address) as connection:
        connection.sendall(request)
        return answer(connection)


def statuses(text: bytes) -> list[int]:
    """Of answers that came one after the other."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", text)]


def error_of(body: bytes) -> dict[str, Any]:
    return json.loads(body)["error"]
