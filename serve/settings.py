"""What an operator decides."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ..errors import RequestError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Limits of the HTTP side.

    Attributes:
        timeout: seconds after which an image that is not finished is given up.
        max_count: the most images of one request.
        max_body: bytes of a request's body, control images included, and of a WebSocket's message.
        max_prompt: characters of a prompt, and of a negative one.
        max_control_pixels: of a control image, before it is fitted.
        body_timeout: seconds in which a body has to arrive.
        max_live: the most WebSockets at a time.
        token: what ``Authorization: Bearer`` must hold; None for no check.
        loopback_only: refuse requests that were not addressed to this machine's loopback name or address: a page
            elsewhere could otherwise reach the service through a name that it points here.
    """

    timeout: float = 60.0
    max_count: int = 8
    max_body: int = 8 << 20
    max_prompt: int = 2000
    max_control_pixels: int = 1 << 24
    body_timeout: float = 20.0
    max_live: int = 64
    token: str | None = None
    loopback_only: bool = False


def read_token(path: Path) -> str:
    """The token that a file holds.

    Raises:
        RequestError: it cannot be read, or holds something else.
    """
    try:
        token = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"token file {path} cannot be read ({error}): expected a text file") from error
    if not token or not token.isascii() or any(c.isspace() for c in token):
        raise RequestError(f"token file {path}: expected one token of ASCII characters without spaces in it")
    return token
