"""The live WebSocket: generates as the user types; of a connection's inputs the newest wins."""

from __future__ import annotations

import asyncio
import json
import struct
from typing import Any

from fastapi import WebSocket, WebSocketDisconnect
from pydantic import ValidationError
from starlette.datastructures import Headers

from ..errors import HyperSDError, validation_in_words
from .image_codec import encode
from .intake import read_request
from .problems import problem, status_of
from .schemas import LiveInput, json_of
from .service import Service
from .service_errors import UnavailableError
from .service_request import GeneratedImage
from .settings import ServeSettings

SUBPROTOCOL = "hypersd.live"
LENGTH_BYTES = 4  # of the length that begins a binary message
BAD_FRAME = "a binary message: expected the length of its header (4 bytes, big-endian), the header (JSON) and an image"
TRY_AGAIN_LATER, POLICY_VIOLATION = 1013, 1008  # RFC 6455, section 7.4, and its registry


class LiveConnections:
    """All WebSockets of a service."""

    def __init__(self, service: Service, settings: ServeSettings) -> None:
        self.service, self.settings = service, settings
        self._open = 0

    async def serve(self, socket: WebSocket) -> None:
        """Serve one WebSocket until it is closed."""
        if not is_same_origin(socket.headers):
            await socket.close(POLICY_VIOLATION)  # before the accept: HTTP 403
            return
        await socket.accept(SUBPROTOCOL if SUBPROTOCOL in socket.scope.get("subprotocols", ()) else None)
        if self._open >= self.settings.max_live:
            await socket.close(TRY_AGAIN_LATER, f"{self._open} pages are open: try again later")
            return
        self._open += 1
        self.service.metrics.saw_live(1)
        try:
            await _Connection(socket, self.service, self.settings).serve()
        finally:
            self._open -= 1
            self.service.metrics.saw_live(-1)


class _Connection:
    """One WebSocket: one task keeps the newest input, another generates from it.

    An input is answered at once if the connection is idle; else it waits for the image under way and replaces any
    other waiting input. Images are sent before the next input is answered: a slow reader causes fewer images.
    """

    def __init__(self, socket: WebSocket, service: Service, settings: ServeSettings) -> None:
        self.socket, self.service, self.settings = socket, service, settings
        self._newest: str | bytes | None = None
        self._arrived = asyncio.Event()
        self._superseded = asyncio.Event()  # of the input that is being answered

    async def serve(self) -> None:
        tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._generate())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except (WebSocketDisconnect, RuntimeError):  # starlette raises the second for a send after the close
            pass
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self) -> None:
        """Keep the input that arrived last."""
        while True:
            message = await self._receive()
            if self._newest is not None:
                self.service.metrics.saw_dropped("superseded", 1)
            self._newest = message
            self._arrived.set()
            self._superseded.set()

    async def _receive(self) -> str | bytes:
        message = await self.socket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1005))
        text = message.get("text")
        return message["bytes"] if text is None else text

    async def _generate(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            self._superseded = asyncio.Event()
            message, self._newest = self._newest, None
            if message is not None:
                await self._answer(message)

    async def _answer(self, message: str | bytes) -> None:
        """Generate from an input and send its images, or its error."""
        text, image = _unframed(message)
        if image is not None and not text:
            await self._send_problem(None, 400, BAD_FRAME)
            return
        try:
            body = LiveInput.model_validate_json(text)
        except ValidationError as error:
            await self._send_problem(_id_of(text), 400, *validation_in_words(error))
            return
        if image is not None:
            if body.image is not None:
                await self._send_problem(body.id, 400, "image comes twice: send it in the header or after it", "image")
                return
            body = body.model_copy(update={"image": image})
        try:
            service_request = await asyncio.to_thread(lambda: read_request(body, self.service.models(), self.settings))
            images = await self.service.generate(service_request, self.settings.timeout, self._superseded)
        except HyperSDError as error:
            status, code = status_of(error)
            await self._send_problem(body.id, status, str(error), None, code)
            if isinstance(error, UnavailableError):  # slows down the next input
                await asyncio.sleep(min(error.retry_after, 1))
            return
        for i, one in enumerate(images):
            file = await asyncio.to_thread(encode, one.image, body.output_format, body.output_compression, one.metadata)
            await self.socket.send_bytes(
                _frame(_header(body, service_request.model, one, i, len(service_request.seeds)), file)
            )

    async def _send_problem(
        self, number: int | None, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        error = json_of(problem(status, message, param, code))
        await self.socket.send_text(json.dumps({"id": number, "error": error}))


def is_same_origin(headers: Headers) -> bool:
    """Whether the connection comes from the service's own page, or from no browser: browsers name a page's origin."""
    origin = headers.get("origin")
    return origin is None or origin.partition("://")[2] == headers.get("host")


def _unframed(message: str | bytes) -> tuple[str | bytes, bytes | None]:
    """An input as JSON, and its init image: a binary message is framed as those of the answers (:func:`_frame`).

    The JSON is empty if the message is shorter than its frame says.
    """
    if isinstance(message, str):
        return message, None
    (length,) = struct.unpack_from(">I", message) if len(message) >= LENGTH_BYTES else (0,)
    end = LENGTH_BYTES + length
    return (message[LENGTH_BYTES:end], message[end:]) if end <= len(message) else (b"", b"")


def _id_of(text: str | bytes) -> int | None:
    """The ``id`` of an invalid input, if it has one."""
    try:
        number = json.loads(text).get("id")
    except (ValueError, AttributeError, RecursionError):
        return None
    return number if isinstance(number, int) and not isinstance(number, bool) else None


def _header(body: LiveInput, model: str, image: GeneratedImage, index: int, count: int) -> dict[str, Any]:
    request = image.request
    return {
        "id": body.id,
        "index": index,
        "count": count,
        "seed": image.seed,
        "mime": f"image/{body.output_format}",
        "width": image.image.width,
        "height": image.image.height,
        "steps": request.steps,
        "eta": request.eta,
        "model": model,
        "waited": image.waited,
        "timings": dict(image.timings),
    }


def _frame(header: dict[str, Any], image: bytes) -> bytes:
    """A binary message: the header's length (4 bytes, big-endian), the header (JSON), the image's file."""
    text = json.dumps(header).encode()
    return struct.pack(">I", len(text)) + text + image
