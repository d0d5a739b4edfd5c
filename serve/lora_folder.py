"""A folder of LoRA files, which pipelines offer as adapters; its changes are followed while they generate."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import threading
from collections.abc import Mapping
from pathlib import Path

from ..errors import RequestError, one_line
from ..runtime import Pipeline
from ..runtime.adapter import Adapter, load_adapter

LOG = logging.getLogger(__name__)
ENDING = ".safetensors"
INTERVAL = 0.5  # seconds between two looks at the folder
Stamps = Mapping[str, tuple[int, ...]]  # by name: changes with the file


class LoraFolder:
    """Offers the LoRA files of a folder to pipelines, by the files' names without their ending.

    A file is loaded once it has stayed the same from one look to the next, so that a copy is not read half-way. One
    that does not fit a bundle is left out of it with a line in the log, and tried again when it has changed. Requests
    that were accepted keep the files that they were accepted with.
    """

    def __init__(self, path: Path, is_strict: bool = False) -> None:
        """``is_strict``: leave out files of which a part would be left out.

        Raises:
            RequestError: there is no such folder.
        """
        if not path.is_dir():
            raise RequestError(f"the LoRA folder {path} is not there: expected a folder with {ENDING} files")
        self.path, self._is_strict = path, is_strict
        self._offers: dict[str, _Offer] = {}
        self._seen: Stamps = {}
        self._is_lost = False  # the folder cannot be read
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def join(self, pipelines: Mapping[str, Pipeline]) -> None:
        """Load the files as they are now into a device's pipelines, by their bundles' names, and all later ones."""
        with self._lock:
            for bundle, pipe in pipelines.items():
                if pipe.manifest.lora_slot is not None:
                    self._offers.setdefault(bundle, _Offer(bundle, self.path, self._is_strict)).join(pipe)
            self._follow(is_first=True)

    def look(self) -> None:
        """Load files that are new or have changed, and forget those that have gone."""
        with self._lock:
            self._follow()

    def watch(self) -> None:
        """Look again and again, in a thread of its own, until :meth:`end`."""
        threading.Thread(target=self._watch, name="hypersd LoRA folder", daemon=True).start()

    def end(self) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(INTERVAL):
            self.look()

    def _follow(self, is_first: bool = False) -> None:
        try:
            stamps = _stamps(self.path)
        except OSError as error:
            if not self._is_lost:
                LOG.warning("%s cannot be read (%s): its LoRAs stay as they were", self.path, error.strerror or error)
            self._is_lost = True
            return
        settled = {name: stamp for name, stamp in stamps.items() if is_first or self._seen.get(name) == stamp}
        self._seen, self._is_lost = stamps, False
        for offer in self._offers.values():
            offer.follow(stamps, settled)


class _Offer:
    """The files that one bundle's pipelines have loaded, and those that do not fit it."""

    def __init__(self, bundle: str, folder: Path, is_strict: bool) -> None:
        self._bundle, self._folder, self._is_strict = bundle, folder, is_strict
        self._pipes: list[Pipeline] = []  # one for each device
        self._tried: dict[str, tuple[int, ...]] = {}
        self._adapters: dict[str, Adapter] = {}

    def join(self, pipe: Pipeline) -> None:
        for adapter in self._adapters.values():
            pipe.add_adapter(adapter)
        self._pipes.append(pipe)

    def follow(self, stamps: Stamps, settled: Stamps) -> None:
        for name in self._tried.keys() - stamps.keys():
            del self._tried[name]
            self._forget(name)
        for name, stamp in sorted(settled.items()):
            if self._tried.get(name) != stamp:
                self._tried[name] = stamp
                self._load(name)

    def _load(self, name: str) -> None:
        try:
            adapter = load_adapter(self._pipes[0].manifest, self._folder / f"{name}{ENDING}", name, self._is_strict)
        except Exception as error:  # whatever is wrong with a file, the service goes on
            LOG.warning("LoRA %r is left out of %s: %s", name, self._bundle, one_line(error))
            self._forget(name)
            return
        self._adapters[name] = adapter
        for pipe in self._pipes:
            pipe.add_adapter(adapter)

    def _forget(self, name: str) -> None:
        if self._adapters.pop(name, None) is not None:
            for pipe in self._pipes:
                pipe.unload_lora_weights(name)


def _stamps(folder: Path) -> Stamps:
    """The LoRA files of a folder, without hidden ones: those are of programs that copy."""
    stamps = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(ENDING) and not entry.name.startswith("."):
                with contextlib.suppress(OSError):  # it has just gone
                    found = entry.stat()
                    if stat.S_ISREG(found.st_mode):
                        key = found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
                        stamps[entry.name.removesuffix(ENDING)] = key
    return stamps
