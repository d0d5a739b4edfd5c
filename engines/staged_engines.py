"""A bundle's engines of which one stage is loaded at a time, for machines with little memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping

from torch import Tensor

from .engine import Engine, EngineWrapper
from .late_engine import LateEngine
from .stages import stage_of


class StagedEngines(Mapping[str, Engine]):
    """Components by name, each loaded at its first run, after those of other stages were released.

    A run keeps runs of other threads waiting: nothing is loaded twice, and nothing is released that runs. Threads that
    run different stages in turn would load at every run, so callers should take turns for a whole image, and
    :meth:`release` at its end what is left.
    """

    def __init__(self, engines: Mapping[str, LateEngine]) -> None:
        self._loaded = _LoadedStage(engines)
        self._engines = {name: _StagedEngine(engine, stage_of(name), self._loaded) for name, engine in engines.items()}

    def __getitem__(self, name: str) -> Engine:
        return self._engines[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._engines)

    def __len__(self) -> int:
        return len(self._engines)

    def release(self) -> None:
        """Release all engines, after the work that runs."""
        with self._loaded.lock:
            self._loaded.begin(None)


class _LoadedStage:
    """The stage that may be loaded, and the lock that its runs hold."""

    def __init__(self, engines: Mapping[str, LateEngine]) -> None:
        self.lock = threading.RLock()
        self._engines = engines
        self._stage: str | None = None

    def begin(self, stage: str | None) -> None:
        """Release the engines of all other stages."""
        if stage != self._stage:
            for engine in self._engines.values():
                engine.release()
            self._stage = stage


class _StagedEngine(EngineWrapper):
    def __init__(self, engine: LateEngine, stage: str, loaded: _LoadedStage) -> None:
        super().__init__(engine)
        self._stage, self._loaded = stage, loaded

    def run(self, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        with self._loaded.lock:
            self._loaded.begin(self._stage)
            return self.engine.run(feeds)
