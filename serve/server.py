"""Runs the service in this process until SIGTERM or SIGINT."""

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

HEADER_SECONDS = 10.0  # until a request's headers must be complete
GRACE_SECONDS = 30.0  # for images that were begun when the service ends
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class ImpatientProtocol(H11Protocol):
    """uvicorn's HTTP protocol with a time limit for a request's headers.

    uvicorn alone waits for headers without limit: clients that connect and send nothing, or a byte now and then,
    would occupy all connections.
    """

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._opening = self.loop.call_later(HEADER_SECONDS, self._close)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:  # the headers are complete
            self._opening.cancel()
        elif self._opening.cancelled():  # the beginning of another request
            self._opening = self.loop.call_later(HEADER_SECONDS, self._close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._opening.cancel()
        super().connection_lost(exc)

    def _close(self) -> None:
        if self.transport.get_protocol() is self:  # a WebSocket has another by then
            self.transport.close()


class _Server(uvicorn.Server):
    """Stops the service at the first signal, so that waiting requests fail at once and not after those under way."""

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

    ``on_listening`` is called with the address; ``/readyz`` answers 200 there once the bundles are loaded. Port 0
    picks a free port.

    Raises:
        RequestError: the server cannot listen on the address.
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
    """Open the listening socket before the bundles are loaded, so that a port in use is reported at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"cannot listen on {host} port {port} ({reason}): take another --host or --port") from error
    with listener:
        yield listener
