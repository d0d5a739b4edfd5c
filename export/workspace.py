"""Writes a bundle so that a kill at any moment leaves either no bundle or a whole one.

Everything is written to a hidden sibling of the output, ``.NAME.partial``, which is renamed when it is whole. Finished
components are recorded there, so that a second run resumes where the first one stopped. A component that a bundle
beside the output already has, made from the same inputs, is linked instead of made again; one that differs in its
weights alone lends its graph.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from ..engines.bundle import Bundle, write_manifest
from ..engines.files import link_or_copy, lock_file, partial_path, replace_folder, sha256_file, write_whole
from ..engines.manifest import MANIFEST_NAME, FileRecord, Manifest, encode
from ..engines.specs import Component
from ..errors import BundleError, DiskFullError, HyperSDError, UserError, disk_full, is_disk_full

PROGRESS_NAME = "progress.json"


class Finished(msgspec.Struct, frozen=True):
    """The finished components of an unfinished bundle, and their files' hashes."""

    components: dict[str, Component]
    files: dict[str, FileRecord]


class Workspace:
    """The unfinished bundle of one output folder, held by one process at a time."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.root = partial_path(out)
        self._finished = Finished({}, {})
        self._resumed = False

    @classmethod
    @contextlib.contextmanager
    def open(cls, out: Path, on_wait: Callable[[], None]) -> Iterator[Workspace]:
        """Take the output's lock, waiting for another export of it to end (``on_wait`` is told).

        Raises:
            DiskFullError: the disk filled up; everything that was written is deleted, to give the space back.
            UserError: the output's folder cannot be written.
        """
        workspace = cls(out)
        with lock_file(out, on_wait):
            try:
                yield workspace
            except BaseException as error:
                if not isinstance(error, HyperSDError) and is_disk_full(error):
                    shutil.rmtree(workspace.root, ignore_errors=True)
                    raise disk_full(out.parent, "choose another --out; nothing was kept") from error
                if workspace._resumed and not workspace._finished.components:
                    shutil.rmtree(workspace.root, ignore_errors=True)
                raise

    def resume(self) -> dict[str, Component]:
        """Keep the finished components of an earlier run, delete the unfinished ones, and return the finished ones."""
        self.root.mkdir(exist_ok=True)
        self._resumed = True
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            self._finished = msgspec.json.decode((self.root / PROGRESS_NAME).read_bytes(), type=Finished)
        if any(not self._is_whole(name, record) for name, record in self._finished.files.items()):
            self._finished = Finished({}, {})
        self._sweep(self.root)
        return dict(self._finished.components)

    def _sweep(self, folder: Path) -> None:
        """Delete everything but finished components, whose folders may be nested (``controlnet/canny``)."""
        for path in folder.iterdir():
            name = path.relative_to(self.root).as_posix()
            if not path.is_dir():
                if name != PROGRESS_NAME:
                    path.unlink()
            elif any(component.startswith(f"{name}/") for component in self._finished.components):
                self._sweep(path)
            elif name not in self._finished.components:
                shutil.rmtree(path)

    def _remove(self, name: str) -> None:
        """Delete a component's folder, and the folder around it if it is then empty."""
        folder = self.root / name
        shutil.rmtree(folder, ignore_errors=True)
        if folder.parent != self.root:
            with contextlib.suppress(OSError):  # there are others
                folder.parent.rmdir()

    def _is_whole(self, name: str, record: FileRecord) -> bool:
        path = self.root / name
        return path.is_file() and path.stat().st_size == record.size and sha256_file(path) == record.sha256

    def discard(self, name: str) -> None:
        """Delete a finished component that this run does not need."""
        finished = self._finished
        component = finished.components[name]
        self._finished = Finished(
            {n: c for n, c in finished.components.items() if n != name},
            {n: r for n, r in finished.files.items() if n not in component.files},
        )
        write_whole(self.root / PROGRESS_NAME, encode(self._finished))
        self._remove(name)

    @contextlib.contextmanager
    def component_folder(self, name: str) -> Iterator[Path]:
        """A new folder for a component's files, deleted again if it does not get finished."""
        self._remove(name)
        folder = self.root / name
        folder.mkdir(parents=True)
        try:
            yield folder
        except BaseException:
            self._remove(name)
            raise

    def finish_component(self, name: str, component: Component) -> None:
        """Record that a component's files are whole."""
        self._note(name, component, {file: self._record(file) for file in component.files})

    def reuse(self, name: str, key: str) -> Component | None:
        """Link a component of the same key from a bundle beside the output, if there is one."""
        for bundle in self._neighbours():
            component = bundle.manifest.components.get(name)
            if component is None or component.key != key:
                continue
            records = {file: bundle.manifest.files[file] for file in component.files}
            with contextlib.suppress(OSError):  # it is being replaced or removed at this moment: make our own
                if any(sha256_file(bundle.path(file)) != record.sha256 for file, record in records.items()):
                    continue
                with self.component_folder(name):
                    for file in component.files:
                        link_or_copy(bundle.path(file), self.root / file)
                    self._note(name, component, records)
                return component
        return None

    def find_graph(self, graph: str) -> tuple[bytes, str] | None:
        """The ONNX file of a component of that ``graph``, and the name of the component or of the bundle beside."""
        for name, component in self._finished.components.items():
            if component.graph == graph:
                return (self.root / component.onnx).read_bytes(), name
        for bundle in self._neighbours():
            for component in bundle.manifest.components.values():
                if component.graph == graph:
                    with contextlib.suppress(OSError):  # it is being replaced or removed at this moment
                        content = bundle.path(component.onnx).read_bytes()
                        if hashlib.sha256(content).hexdigest() == bundle.manifest.files[component.onnx].sha256:
                            return content, bundle.root.name
        return None

    def _neighbours(self) -> Iterator[Bundle]:
        for manifest in sorted(self.out.parent.glob(f"[!.]*/{MANIFEST_NAME}")):  # hidden ones are unfinished
            with contextlib.suppress(BundleError):
                yield Bundle.load(manifest.parent)

    def publish(self, make_manifest: Callable[[dict[str, FileRecord]], Manifest], replace: bool) -> Bundle:
        """Write the manifest and rename the whole folder to its final name."""
        names = sorted(path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if path.is_file())
        known = self._finished.files
        manifest = make_manifest(
            {
                name: known.get(name) or self._record(name)
                for name in names
                if name not in (MANIFEST_NAME, PROGRESS_NAME)
            }
        )
        write_manifest(self.root, manifest)
        if replace:
            replace_folder(self.root, self.out)
        else:
            self.root.rename(self.out)  # fails where another process has put a bundle meanwhile
        (self.out / PROGRESS_NAME).unlink(missing_ok=True)
        return Bundle.load(self.out)

    def _note(self, name: str, component: Component, files: dict[str, FileRecord]) -> None:
        self._finished = Finished({**self._finished.components, name: component}, {**self._finished.files, **files})
        write_whole(self.root / PROGRESS_NAME, encode(self._finished))

    def _record(self, name: str) -> FileRecord:
        path = self.root / name
        return FileRecord(size=path.stat().st_size, sha256=sha256_file(path))


def check_place(out: Path) -> None:
    """Check that the output can become a bundle, before the slow work starts.

    Raises:
        UserError: something else is there, or its folder cannot be written.
    """
    is_bundle = (out / MANIFEST_NAME).exists()
    if out.exists() and not is_bundle and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not a bundle: choose another --out")
    existing = next(path for path in out.absolute().parents if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"{out} cannot be written: {existing} is no folder that you may write to; choose another --out")


def check_space(
    folder: Path, needed: int, what: str = "the bundle needs", remedy: str = "choose another --out"
) -> None:
    """Check the free space before anything is written.

    Args:
        folder: the folder to write to; need not exist yet.
        needed: bytes.
        what: the beginning of the error, up to the number.
        remedy: another remedy besides freeing space.

    Raises:
        DiskFullError: less than ``needed`` bytes are free.
    """
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise DiskFullError(
            f"{what} about {needed / 1e6:,.0f} MB, {folder} has {free / 1e6:,.0f} MB free: free some space or {remedy}"
        )
