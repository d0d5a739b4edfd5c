"""A contender's process: reads a command from a line of JSON and answers with one, until its input is closed.

It runs under any interpreter that has the contender's libraries: of this package it imports what needs nothing else.
The answers go through a pipe of their own, so that nothing that a library prints can come between them.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from ...errors import HyperSDError, one_line
from .drawing import Drawer, Settings
from .memory import DeviceMemory, peak_host_memory


class Worker:
    """The commands. ``module`` holds the class ``Drawer`` of the contender, which takes ``options``."""

    def __init__(self, module: str, options: dict[str, Any]) -> None:
        self._module = module
        self._options = options
        self._drawer: Drawer | None = None
        self._device_memory = DeviceMemory()

    def hello(self) -> dict[str, Any]:
        """That the process is there."""
        return {"python": sys.version.split()[0]}

    def load(self) -> dict[str, Any]:
        """Import the contender's libraries, find its files, load it: seconds of each, and what it says of itself."""
        began = time.perf_counter()
        module = importlib.import_module(self._module)
        imported = time.perf_counter()
        self._device_memory.begin()
        self._drawer = drawer = module.Drawer(**self._options)
        found = time.perf_counter()
        facts = drawer.load()
        loaded = time.perf_counter()
        answer = {"imports": imported - began, "load": loaded - found, **dataclasses.asdict(facts)}
        return answer | {"versions": _versions(facts.packages), **self._memory()}

    def draw(self, settings: dict[str, Any], save: str | None = None) -> dict[str, Any]:
        """Draw an image; ``save`` is where its pixels go, as a file of numpy's."""
        assert self._drawer is not None, "draw before load"
        drawn = self._drawer.draw(Settings(**settings))
        if save is not None:
            import numpy as np

            np.save(save, drawn.pixels)
        return {"seconds": drawn.seconds, "stages": dict(drawn.stages), **self._memory()}

    def _memory(self) -> dict[str, Any]:
        return {"host_memory": peak_host_memory(), "device_memory": self._device_memory.peak()}


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Of those that are installed."""
    versions = {"python": sys.version.split()[0]}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _commands(fd: int) -> Iterator[dict[str, Any]]:
    """The commands as they come. When nobody can send any more the process ends at once, whatever it is busy with."""
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        with os.fdopen(fd, encoding="utf-8") as lines:
            for line in lines:
                waiting.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield json.loads(waiting.get())


def _own_input() -> int:
    """The commands' file descriptor, away from standard input, which processes of libraries would inherit."""
    fd, nothing = os.dup(0), os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return fd


def main(answers_fd: int, module: str, options: str) -> None:
    """Serve. ``answers_fd`` is where answers go, ``options`` are the contender's as JSON."""
    os.set_inheritable(answers_fd, False)
    worker = Worker(module, json.loads(options))
    commands: dict[str, Callable[..., dict[str, Any]]] = {
        "hello": worker.hello,
        "load": worker.load,
        "draw": worker.draw,
    }
    with os.fdopen(answers_fd, "w", encoding="utf-8") as answers:
        for command in _commands(_own_input()):
            try:
                answer = commands[command.pop("do")](**command)
            except HyperSDError as error:
                answer = {"error": str(error)}
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {one_line(error)}"}
            print(json.dumps(answer), file=answers, flush=True)
