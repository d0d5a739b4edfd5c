"""Runs the service in this process until it is told to end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import RequestError
from .app import make_app
from .service import LocalService
from .settings import ServeSettings

HEADER_SECONDS = 10.0  # in which a client that has connected must have said what it wants
GRACE_SECONDS = 30.0  # for what is being drawn when the service ends
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class ImpatientProtocol(H11Protocol):
    """uvicorn's HTTP, but a connection is closed on which a request's headers are not whole after a while.

    uvicorn itself waits for them for ever; a client that opens connections and sends nothing, or a byte now and then,
    would keep them all.
    """

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._opening = self.loop.call_later(HEADER_SECONDS, self._close)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:  # the headers are whole
            self._opening.cancel()
        elif self._opening.cancelled():  # the beginning of a further request
            self._opening = self.loop.call_later(HEADER_SECONDS, self._close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._opening.cancel()
        super().connection_lost(exc)

    def _close(self) -> None:
        if self.transport.get_protocol() is self:  # a WebSocket has another by then
            self.transport.close()


class _Server(uvicorn.Server):
    """Tells the service at the first signal: who waits in its queue must not wait for the drawings under way."""

    def __init__(self, config: uvicorn.Config, service: LocalService, on_listening: Callable[[str], None]) -> None:
        super().__init__(config)
        self.service, self.on_listening = service, on_listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.on_listening(self._address())
            self._watcher = asyncio.create_task(self._end_if_loading_fails())

    def handle_exit(self, sig: int, frame: Any) -> None:
        if sig == signal.SIGTERM:
            self.should_exit = True
        else:
            super().handle_exit(sig, frame)  # which raises it again at the end: SIGTERM, too, though that ended well
        # Not here: the signal may have interrupted a thread that holds the queue's lock.
        threading.Thread(target=self.service.stop, name="hypersd stop").start()

    async def _end_if_loading_fails(self) -> None:
        while not self.service.is_ready():
            if self.service.failure is not None:
                self.should_exit = True
                return
            await asyncio.sleep(0.05)

    def _address(self) -> str:
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def run_server(
    service: LocalService, settings: ServeSettings, host: str, port: int, on_listening: Callable[[str], None]
) -> None:
    """Load the service's bundles and answer requests until SIGTERM or SIGINT.

    ``on_listening`` is told the address, at which ``/readyz`` is 200 once the bundles are loaded. Port 0 takes any.

    Raises:
        RequestError: the address cannot be listened on.
        HyperSDError: a bundle could not be loaded.
    """
    with _listening(host, port) as listener:
        service.start()
        _Server(_config(service, settings), service, on_listening).run(sockets=[listener])
    service.stop()
    if failure := service.failure:
        raise failure
    service.join(GRACE_SECONDS)


def _config(service: LocalService, settings: ServeSettings) -> uvicorn.Config:
    return uvicorn.Config(
        make_app(service, settings),
        http=ImpatientProtocol,
        ws="websockets-sansio",
        ws_max_size=settings.max_body,
        ws_per_message_deflate=False,  # images are compressed already
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(GRACE_SECONDS),
    )


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens: before anything is loaded, so that a port in use is said at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"cannot listen on {host} port {port} ({reason}): take another --host or --port") from error
    with listener:
        yield listener
