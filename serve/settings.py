"""The operator's settings of the HTTP side."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ..errors import RequestError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Limits of the HTTP side.

    Attributes:
        timeout: seconds after which an unfinished request is given up.
        max_count: the most images of one request.
        max_body: the most bytes of a request's body, images included (two photographs of a phone), and of a
            WebSocket's message.
        max_prompt: the most characters of a prompt, and of a negative prompt.
        max_pixels: the most pixels of an image from a client, before it is fitted.
        body_timeout: seconds within which a body must arrive.
        max_live: the most WebSockets at a time.
        token: the required value of ``Authorization: Bearer``; None for no check.
        loopback_only: reject requests whose Host is not a loopback name or address; otherwise a web page could reach
            the service through a name that resolves to this machine.
    """

    timeout: float = 60.0
    max_count: int = 8
    max_body: int = 24 << 20
    max_prompt: int = 2000
    max_pixels: int = 1 << 25
    body_timeout: float = 60.0
    max_live: int = 64
    token: str | None = None
    loopback_only: bool = False


def read_token(path: Path) -> str:
    """Read the token from a file.

    Raises:
        RequestError: the file cannot be read, or does not hold one token.
    """
    try:
        token = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"token file {path} cannot be read ({error}): expected a text file") from error
    if not token or not token.isascii() or any(c.isspace() for c in token):
        raise RequestError(f"token file {path}: expected one token of ASCII characters without spaces in it")
    return token
