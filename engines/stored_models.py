"""Models as a library makes them from a bundle's, stored on disk: a later load maps the files instead.

The environment variable ``HYPERSD_STORED_MODELS`` names the folder; without it nothing is stored. Each stored model is
a folder there: a graph and its weights, for one processor and one version of the library. ONNX Runtime's are optimised,
about the size of the component in float32; OpenVINO's have the half of it, in float16. The newest one of a component
and library replaces the others. All of them may be deleted at any time.
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
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TypeVar

from ..errors import BundleError, UserError, one_line, warn_user
from .files import lock_file, whole_folder
from .specs import Component

VARIABLE = "HYPERSD_STORED_MODELS"
LAYOUT_VERSION = 1  # raise it when the content or its layout changes
CPU_INFO = Path("/proc/cpuinfo")
# They decide which kernels are chosen, and so how weights are packed; of x86, then of Arm.
CPU_FIELDS = {"vendor_id", "model name", "flags", "CPU implementer", "CPU part", "CPU variant", "Features"}

Session = TypeVar("Session")


class StoredModelWarning(UserWarning):
    """A model could not be stored or read back; it was loaded from the bundle."""


@dataclasses.dataclass(frozen=True)
class StoredModel:
    """The place of a component's stored model, which may not be there yet.

    Attributes:
        root: the folder of all stored models.
        network: the component's part of the name: it stands for the path of the bundle's graph and the library.
        key: the hash of everything that decides whether the stored model can be used.
        file: the graph's name in its folder.
    """

    root: Path
    network: str
    key: str
    file: str

    @property
    def folder(self) -> Path:
        return self.root / f"{self.network}-{self.key}"

    @property
    def graph(self) -> Path:
        return self.folder / self.file

    def others(self) -> list[Path]:
        """The network's stored models of other keys, and the parts that a killed process left."""
        name = re.compile(rf"{re.escape(self.network)}-[0-9a-f]{{16}}|\.{re.escape(self.network)}-.*\.(partial|old)")
        return [path for path in self.root.iterdir() if name.fullmatch(path.name) and path != self.folder]


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


def find_stored_model(path: Path, component: Component, runtime: str, file: str) -> StoredModel | None:
    """The place of the stored model of a component's graph; None if no models are stored.

    Args:
        path: the graph in the bundle.
        component: its entry in the manifest.
        runtime: version and settings of the library that stores and loads it.
        file: the name for the stored graph; each library has one of its own.
    """
    root = stored_models_folder()
    if root is None:
        return None
    path = Path(os.path.abspath(path))  # not resolved: the weights lie beside the link
    try:
        files = _file_states(path, component)
    except OSError:  # opening the session reports the missing file
        return None
    network = f"{path.parent.name}-{_short_hash([str(path), file])}"
    key = _short_hash([LAYOUT_VERSION, runtime, describe_processor(), component.key, files])
    return StoredModel(root, network, key, file)


def _file_states(path: Path, component: Component) -> list[tuple[str, int, int]]:
    """Name, size and time of change of the graph and its weights: the SHA-256 of gigabytes would cost seconds."""
    folder = PurePosixPath(component.onnx).parent
    beside = [os.path.relpath(name, folder) for name in component.files[1:]]
    stats = {name: (path.parent / name).stat() for name in (path.name, *beside)}
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()]


def _short_hash(described: object) -> str:
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]


def describe_processor(cpu_info: Path = CPU_INFO) -> str:
    """The processor's model and instruction sets: processors that differ in them pack weights differently."""
    try:
        lines = cpu_info.read_text(errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    fields = {line for line in lines if line.partition(":")[0].strip() in CPU_FIELDS}  # cores are mostly of one kind
    return "\n".join([platform.machine(), *sorted(fields)] if fields else [platform.machine(), platform.processor()])


def open_stored(
    stored: StoredModel, store: Callable[[Path], object], load: Callable[[Path], Session]
) -> Session | None:
    """Load a stored model, which is made first if it is missing or damaged.

    Args:
        stored: its place.
        store: writes the graph to a path, and its weights beside it.
        load: loads a stored graph; a ``BundleError`` means that it is damaged.

    Returns:
        The result of ``load``; None if another process is writing it, or, with a warning, if it cannot be stored.
    """
    try:
        if stored.graph.exists():
            with contextlib.suppress(BundleError):
                return load(stored.graph)
        with lock_file(stored.root / stored.network, _give_up):
            with whole_folder(stored.folder) as partial:
                store(partial / stored.file)
            for other in stored.others():
                shutil.rmtree(other, ignore_errors=True)  # a process that has mapped it keeps it
            return load(stored.graph)
    except _BusyError:
        return None
    except BundleError as error:
        shutil.rmtree(stored.folder, ignore_errors=True)
        _warn(f"no model can be stored in {stored.root}: {error}")
    except (OSError, NotImplementedError, UserError) as error:  # NotImplementedError: a file system without locks
        _warn(f"{stored.root} cannot be used: {getattr(error, 'strerror', None) or one_line(error)}")
    return None


class _BusyError(Exception):
    """Another process stores the network: waiting for it would take longer than loading without."""


def _give_up() -> None:
    raise _BusyError


def _warn(problem: str) -> None:
    warn_user(f"{VARIABLE}: {problem}; loading as without it", StoredModelWarning)
