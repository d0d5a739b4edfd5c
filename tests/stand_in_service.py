"""Parts for tests of the service: a pipeline that can be held back or made to fail, and a real server in a thread."""

from __future__ import annotations

import asyncio
import io
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
from PIL import Image
from waiting import LONG, wait_until

from hypersd import Pipeline
from hypersd.engines.specs import Range
from hypersd.runtime.adapter import Adapter
from hypersd.runtime.params import Params
from hypersd.runtime.pipeline import PipelineOutput
from hypersd.serve import server
from hypersd.serve.service import LocalService
from hypersd.serve.settings import ServeSettings

GENERATIONS = "/v1/images/generations"


def file_of(image: Image.Image, kind: str = "PNG") -> bytes:
    """An image as the bytes of a file."""
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


async def until(holds: Callable[[], object]) -> None:
    """The same, where an event loop must go on."""
    await asyncio.to_thread(wait_until, holds)


class GatedPipeline:
    """A stand-in for a pipeline: a real one, but each call is counted, waits for a gate, and may fail.

    It says that its networks take ``batch`` images at a time, so that a worker on a CPU gives it as many; the real
    one cuts them up again.

    Attributes:
        calls: prompts of each call, the warm-up's left out.
        gate: a call waits until it is set, which it is at first.
        on_call: is given the prompts and may raise.
    """

    def __init__(self, pipe: Pipeline, batch: int = 1) -> None:
        self.pipe = pipe
        at_once = Range(name="batch", min=batch, opt=batch, max=batch)
        shapes = msgspec.structs.replace(pipe.manifest.shapes, batch=at_once)
        self.manifest = msgspec.structs.replace(pipe.manifest, shapes=shapes)
        self.choice, self.device, self.decide = pipe.choice, pipe.device, pipe.decide
        self.graph_batches = pipe.graph_batches
        self.calls: list[list[str]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.on_call: Callable[[list[str]], object] = lambda prompts: None

    def generate(self, params: Params) -> PipelineOutput:
        if params.prompt != "warm-up":
            self.calls.append(list(params.prompt))
            assert self.gate.wait(LONG), "nobody opened the gate"
            self.on_call(list(params.prompt))
        return self.pipe.generate(params)

    @property
    def adapters(self) -> list[Adapter]:
        return self.pipe.adapters

    @property
    def prompts(self) -> list[str]:
        """Prompts of all calls."""
        return [prompt for call in self.calls for prompt in call]

    async def begun(self, calls: int = 1) -> None:
        """Until so many calls have begun, the event loop going on."""
        await until(lambda: len(self.calls) >= calls)


class StandInService(LocalService):
    """A service whose pipelines are given: one set of them for each worker."""

    def __init__(self, bundle: Path, *pipes: Any, **options: Any) -> None:
        super().__init__([bundle], devices=["cpu"] * len(pipes), **options)
        self._given = iter(pipes)
        self._taking = threading.Lock()

    def _load_all(self, device: str) -> Mapping[str, Any]:  # type: ignore[override]
        with self._taking:
            return {next(iter(self.folders)): next(self._given)}


class RunningServer:
    """The server that ``run_server`` runs, in a thread and on a port that is free, until the block is left.

    Attributes:
        url: such as ``http://127.0.0.1:40123``.
    """

    def __init__(self, service: LocalService, settings: ServeSettings, host: str = "127.0.0.1") -> None:
        self.service, self.settings, self.host = service, settings, host
        self.url = ""
        self._listening = threading.Event()
        self._thread = threading.Thread(target=self._run, name="server under test", daemon=True)

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host.strip("[]"), int(port)

    @property
    def live_url(self) -> str:
        return self.url.replace("http://", "ws://") + "/v1/live"

    def __enter__(self) -> RunningServer:
        self._thread.start()
        assert self._listening.wait(LONG)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end()
        self.wait_ended()

    def end(self) -> None:
        """End as after a signal."""
        self._server.handle_exit(signal.SIGTERM, None)

    def wait_ended(self) -> None:
        self._thread.join(LONG)
        assert not self._thread.is_alive(), "the server did not end"

    def _run(self) -> None:
        self._server = server._Server(server._config(self.service, self.settings), self.service, self._hear)
        with server._listening(self.host, 0) as listener:
            self.service.start()
            self._server.run(sockets=[listener])
        self.service.stop()
        self.service.join(LONG)

    def _hear(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._listening.set()
