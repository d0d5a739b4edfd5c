"""The program of a contender's process: answers commands, one line of JSON each, until its input is closed.

It runs under any interpreter that has the contender's libraries, and imports only modules without dependencies.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from ...engines.worker_process import WorkerChannel
from ...errors import HyperSDError, one_line
from .host import DeviceMemory, mapped_host_memory, peak_host_memory, resident_host_memory
from .protocol import Runner, Settings


class Worker:
    """The commands. ``module`` holds the contender's class ``Runner``, whose arguments are ``options``."""

    def __init__(self, module: str, options: dict[str, Any]) -> None:
        self._module = module
        self._options = options
        self._runner: Runner | None = None
        self._device_memory = DeviceMemory()

    def hello(self) -> dict[str, Any]:
        """Show that the process is alive."""
        return {"python": sys.version.split()[0], "pid": os.getpid()}

    def prepare(self) -> dict[str, Any]:
        """Make the files of a contender; ``module`` holds the function ``prepare`` instead of a class."""
        importlib.import_module(self._module).prepare(**self._options)
        return {}

    def load(self) -> dict[str, Any]:
        """Import the contender's libraries, find its files and load it; the answer has seconds and facts."""
        began = time.perf_counter()
        module = importlib.import_module(self._module)
        imported = time.perf_counter()
        self._device_memory.begin()
        self._runner = runner = module.Runner(**self._options)
        found = time.perf_counter()
        facts = runner.load()
        loaded = time.perf_counter()
        answer = {"imports": imported - began, "load": loaded - found, **dataclasses.asdict(facts)}
        return answer | {"versions": _versions(facts.packages), **self._memory()}

    def generate(self, settings: dict[str, Any], save: str | None = None) -> dict[str, Any]:
        """Generate an image and write its pixels to the file ``save``, in numpy's format."""
        assert self._runner is not None, "generate before load"
        made = self._runner.generate(Settings(**settings))
        if save is not None:
            import numpy as np

            np.save(save, made.pixels)
        return {"seconds": made.seconds, "stages": dict(made.stages), **self._memory()}

    def _memory(self) -> dict[str, Any]:
        return {
            "host_memory": peak_host_memory(),
            "resting_memory": resident_host_memory(),
            "mapped_memory": mapped_host_memory(),
            "device_memory": self._device_memory.peak(),
        }


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Versions of the installed packages."""
    versions = {"python": sys.version.split()[0]}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def main(module: str, options: str) -> None:
    """Serve commands; ``options`` are the contender's as JSON. The process ends at once when its input is closed."""
    channel = WorkerChannel(lambda: os._exit(0))
    worker = Worker(module, json.loads(options))
    commands: dict[str, Callable[..., dict[str, Any]]] = {
        "hello": worker.hello,
        "prepare": worker.prepare,
        "load": worker.load,
        "generate": worker.generate,
    }
    while True:
        command = json.loads(channel.receive())
        try:
            answer = commands[command.pop("do")](**command)
        except HyperSDError as error:
            answer = {"error": str(error)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {one_line(error)}"}
        channel.send(json.dumps(answer).encode())
