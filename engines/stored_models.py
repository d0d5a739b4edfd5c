"""Models as ONNX Runtime optimised them, kept on disk: a later load maps the file and does not make it again.

The environment variable ``HYPERSD_STORED_MODELS`` names the folder; without it nothing is kept. A stored model is a
folder of its own there: a graph and its weights, about the size of the network in float32, for one processor and one
version of ONNX Runtime. The newest of a network replaces the others. All of it may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import TypeVar

from ..errors import BundleError, one_line, warn_user
from .manifest import Component

VARIABLE = "HYPERSD_STORED_MODELS"
GRAPH = "model.onnx"
LAYOUT_VERSION = 1  # to be raised when what is stored, or how, changes
CPU_INFO = Path("/proc/cpuinfo")
# What decides which kernels are chosen, and so how weights are packed; of x86, then of Arm.
CPU_FIELDS = {"vendor_id", "model name", "flags", "CPU implementer", "CPU part", "CPU variant", "Features"}

Session = TypeVar("Session")


class StoredModelWarning(UserWarning):
    """A model could not be stored or read back; it was loaded without."""


@dataclasses.dataclass(frozen=True)
class StoredModel:
    """Where the stored model of a network is, or would be.

    Attributes:
        root: the folder of all stored models.
        network: the network's part of the name: it stands for the path of the bundle's graph.
        key: the hash of all that decides whether the stored model can be used.
    """

    root: Path
    network: str
    key: str

    @property
    def folder(self) -> Path:
        return self.root / f"{self.network}-{self.key}"

    @property
    def graph(self) -> Path:
        return self.folder / GRAPH

    @property
    def temporary(self) -> Path:
        """Where it is written before it is whole; one process at a time writes for a network."""
        return self.root / f".{self.network}.tmp"

    def all_keys(self) -> list[Path]:
        """The network's stored models, of this key and of others."""
        name = re.compile(rf"{re.escape(self.network)}-[0-9a-f]{{16}}")
        return [path for path in self.root.iterdir() if name.fullmatch(path.name)]


def stored_models_folder() -> Path | None:
    """The folder that ``HYPERSD_STORED_MODELS`` names, absolute or from ``~``; None where it is empty or unset."""
    value = os.environ.get(VARIABLE)
    if not value:
        return None
    try:
        folder = Path(value).expanduser()
    except RuntimeError:  # nobody knows the home folder
        folder = Path(value)
    if folder.is_absolute():
        return folder
    _warn(f"expected an absolute folder, got {value!r}")
    return None


def find_stored_model(path: Path, component: Component, runtime: str) -> StoredModel | None:
    """Where the stored model of a component's graph belongs; None if none are kept.

    Args:
        path: the graph in the bundle.
        component: its entry in the manifest.
        runtime: what stores and loads it: the version and the settings.
    """
    root = stored_models_folder()
    if root is None:
        return None
    path = Path(os.path.abspath(path))  # not resolved: the weights lie beside the link
    try:
        files = _file_states(path, component)
    except OSError:  # the session will say what is missing
        return None
    network = f"{path.parent.name}-{_short_hash(str(path))}"
    key = _short_hash([LAYOUT_VERSION, runtime, describe_processor(), component.key, files])
    return StoredModel(root, network, key)


def _file_states(path: Path, component: Component) -> list[tuple[str, int, int]]:
    """Name, size and time of change of the graph and its weights: the SHA-256 of gigabytes would cost seconds."""
    folder = PurePosixPath(component.onnx).parent
    beside = [os.path.relpath(name, folder) for name in component.files[1:]]
    stats = {name: (path.parent / name).stat() for name in (path.name, *beside)}
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()]


def _short_hash(described: object) -> str:
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]


def describe_processor(cpu_info: Path = CPU_INFO) -> str:
    """What tells processors apart that pack weights differently: the model and its instruction sets."""
    try:
        lines = cpu_info.read_text(errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    fields = {line for line in lines if line.partition(":")[0].strip() in CPU_FIELDS}  # cores are mostly of one kind
    return "\n".join([platform.machine(), *sorted(fields)] if fields else [platform.machine(), platform.processor()])


def open_stored(
    stored: StoredModel, store: Callable[[Path], object], load: Callable[[Path], Session]
) -> Session | None:
    """Load a stored model, which is made first if it is not there or damaged.

    Args:
        stored: where it belongs.
        store: writes the graph to a path, and its weights beside it.
        load: loads a stored graph; a ``BundleError`` means that it is damaged.

    Returns:
        What ``load`` returned; None if another process is at it, or, with a warning, if it cannot be stored.
    """
    try:
        if stored.graph.exists():
            with contextlib.suppress(BundleError):
                return load(stored.graph)
        with _sole_writer(stored) as is_ours:
            if not is_ours:
                return None
            _write(stored, store)
            return load(stored.graph)
    except (OSError, NotImplementedError) as error:  # the latter: a file system that has no locks
        _warn(f"{stored.root} cannot be used: {getattr(error, 'strerror', None) or one_line(error)}")
    except BundleError as error:
        _discard(stored.folder)
        _warn(f"no model can be stored in {stored.root}: {error}")
    return None


@contextlib.contextmanager
def _sole_writer(stored: StoredModel) -> Iterator[bool]:
    """Whether this is the one process that may write for the network; who is not does not wait."""
    import filelock  # torch brings it

    stored.root.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(stored.root / f".{stored.network}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _write(stored: StoredModel, store: Callable[[Path], object]) -> None:
    """Write a stored model whole, in the place of all others of its network."""
    _discard(stored.temporary)  # of a process that was killed
    stored.temporary.mkdir()
    try:
        store(stored.temporary / GRAPH)
        for other in stored.all_keys():
            _discard(other)
        stored.temporary.rename(stored.folder)
    finally:
        _discard(stored.temporary)


def _discard(folder: Path) -> None:
    """Delete a stored model; who has mapped it keeps it, and Windows keeps it for them."""
    shutil.rmtree(folder, ignore_errors=True)


def _warn(problem: str) -> None:
    warn_user(f"{VARIABLE}: {problem}; loading as without it", StoredModelWarning)
