"""Checks before a request reaches the application: its token, and its body's size and time of arrival."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import secrets
import time
from collections.abc import Iterable
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .metrics import Metrics
from .problems import problem_response
from .settings import ServeSettings

PROTECTED = ("/v1/", "/metrics")
CLIENT_GONE = 499  # nginx's status for requests whose client disconnected
BEARER = "bearer."  # the WebSocket subprotocol that carries the token: a browser can send no header with it
DROPPED_BODIES = 16  # times the largest body: the most that is read and dropped after a rejection
SILENCE_SECONDS = 3.0  # after a rejection: a client that sends nothing for so long does not send any more


class EarlyAnswerError(Exception):
    """The answer to a request whose body is not read: it lacks the token, or the body is too large or too slow."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class ClientGoneError(Exception):
    """The client disconnected before its body was complete."""


class Guard:
    """The outermost ASGI middleware: checks requests, reads their bodies, and counts the answers."""

    def __init__(self, app: ASGIApp, settings: ServeSettings, metrics: Metrics, paths: Iterable[str]) -> None:
        self.app, self.settings, self.metrics, self.paths = app, settings, metrics, frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            if self._is_authorized(scope):
                await self.app(scope, receive, send)
            else:
                await receive()
                await send({"type": "websocket.close", "code": 1008})  # before the accept: HTTP 403
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        began, codes, is_early = time.monotonic(), [], False

        async def noting_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                codes.append(message["status"])
            await send(message)

        try:
            await self._answer(scope, receive, noting_send)
        except EarlyAnswerError as error:
            is_early = True
            response = problem_response(error.status, error.message, close=True)
            await response(scope, receive, _kept_open(noting_send))
        except ClientGoneError:
            pass
        except Exception:  # a bug, which is answered further out
            codes.append(500)
            raise
        finally:
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.metrics.saw_request(path, codes[0] if codes else CLIENT_GONE, time.monotonic() - began)
        if is_early:
            with contextlib.suppress(asyncio.TimeoutError):
                await self._drop_body(receive)
            await send({"type": "http.response.body"})  # the end of the answer, at which the server closes

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._is_authorized(scope):
            raise EarlyAnswerError(
                401, "the token is missing or wrong: expected the header `Authorization: Bearer TOKEN`"
            )
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdigit() and int(length) > self.settings.max_body:
            raise self._too_large()
        try:
            body = await asyncio.wait_for(self._read_body(receive), self.settings.body_timeout)
        except asyncio.TimeoutError:
            seconds = self.settings.body_timeout
            raise EarlyAnswerError(408, f"the body did not arrive within {seconds:g} s: send it faster") from None
        messages = iter([dict[str, Any](type="http.request", body=body, more_body=False)])

        async def replayed() -> Message:
            return next(messages, None) or await receive()

        await self.app(scope, replayed, send)

    async def _read_body(self, receive: Receive) -> bytes:
        """Read the complete body: every route needs all of it in any case."""
        parts, size, is_whole = [], 0, False
        while not is_whole:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            is_whole = not message.get("more_body", False)
            if size > self.settings.max_body:
                raise self._too_large()
        return b"".join(parts)

    async def _drop_body(self, receive: Receive) -> None:
        """Read on after the answer: most clients send all of a body first, and a reset would hide the answer.

        Raises:
            asyncio.TimeoutError: it has not come to its end in time.
        """
        left, is_whole = DROPPED_BODIES * self.settings.max_body, False
        end = time.monotonic() + self.settings.body_timeout
        while left > 0 and not is_whole:
            # One wait_for, and none around it: before Python 3.12 the inner one drops the outer one's cancellation if
            # bytes come at the same moment, and so the limit of the whole.
            message = await asyncio.wait_for(receive(), min(SILENCE_SECONDS, end - time.monotonic()))
            left -= len(message.get("body", b""))
            is_whole = not message.get("more_body", False)  # also when the client has gone

    def _too_large(self) -> EarlyAnswerError:
        return EarlyAnswerError(413, f"the body has more than {self.settings.max_body} bytes: send smaller images")

    def _is_authorized(self, scope: Scope) -> bool:
        token = self.settings.token
        if token is None or not scope["path"].startswith(PROTECTED):
            return True
        given = _token(scope)
        return given is not None and secrets.compare_digest(given, token.encode())


def _kept_open(send: Send) -> Send:
    """``send``, but the answer's last message leaves it unfinished: until it ends, the body can be read."""

    async def sending(message: Message) -> None:
        await send({**message, "more_body": True} if message["type"] == "http.response.body" else message)

    return sending


def _token(scope: Scope) -> bytes | None:
    """The client's token, from a header or a WebSocket's subprotocols."""
    scheme, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip().encode("latin-1")
    for protocol in scope.get("subprotocols", ()):
        if protocol.startswith(BEARER):
            text = protocol.removeprefix(BEARER)
            try:
                return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
            except (binascii.Error, ValueError):
                return None
    return None
