"""Bundles on the machines of a cluster: without a shared file system each machine gets one copy."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

from ..engines import Bundle
from ..engines.files import cache_folder, lock_file, whole_folder, write_whole
from ..engines.manifest import MANIFEST_NAME, decode
from ..errors import BundleError, disk_errors

CHUNK = 16 << 20  # bytes that one message carries

#: ``read(digest, file, offset)``: up to CHUNK bytes of a bundle's file, none after its end
Read = Callable[[str, str, int], bytes]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedBundle:
    """A bundle as seen by the machine that shares it.

    Attributes:
        name: the folder's name.
        folder: its path there, and on every machine with the same file system.
        digest: SHA-256 of its manifest, which holds the SHA-256 of every other file.
        files: the files that exist; plans of TensorRT may have been deleted.
    """

    name: str
    folder: Path
    digest: str
    files: tuple[str, ...]


def share(folder: Path) -> SharedBundle:
    """Describe a bundle of this machine.

    Raises:
        BundleError: the folder is not a bundle.
    """
    bundle = Bundle.load(folder.resolve())
    plans = bundle.plan_files()
    files = (name for name in bundle.manifest.files if name not in plans or (bundle.root / name).is_file())
    return SharedBundle(
        name=bundle.root.name, folder=bundle.root, digest=_digest(bundle.root) or "", files=tuple(files)
    )


class BundleShelf:
    """Reads files of bundles on the machine that has them."""

    def __init__(self, bundles: Iterable[SharedBundle]) -> None:
        """``bundles``: the bundles that may be read.

        Raises:
            BundleError: this machine does not have them.
        """
        self._bundles = {bundle.digest: Bundle.load(bundle.folder) for bundle in bundles}

    def read(self, digest: str, file: str, offset: int) -> bytes:
        """Read up to CHUNK bytes of a file; none after its end.

        Raises:
            BundleError: the bundle has no such file.
        """
        bundle = self._bundles[digest]
        if file != MANIFEST_NAME and file not in bundle.manifest.files:
            raise BundleError(f"{bundle.root} has no file {file!r}: expected one that its manifest lists")
        with bundle.path(file).open("rb") as stream:
            stream.seek(offset)
            return stream.read(CHUNK)


def find_or_fetch(bundle: SharedBundle, read: Read, cache: Path | None = None) -> Path:
    """The bundle's folder on this machine: the shared folder itself, else a copy.

    One process makes the copy while the others wait; it appears whole, and the SHA-256 of every file is checked. It is
    in ``cache``, or in this package's cache folder, under the manifest's hash: another bundle with the same name is
    another copy.

    Raises:
        BundleError: the copy differs from the shared bundle.
        UserError: the cache folder cannot be written.
    """
    if _digest(bundle.folder) == bundle.digest:
        return bundle.folder
    target = (cache or cache_folder() / "bundles") / bundle.digest[:16] / bundle.name
    with lock_file(target, on_wait=lambda: None):
        if _digest(target) != bundle.digest:
            _fetch(bundle, read, target)
    return target


def _fetch(bundle: SharedBundle, read: Read, target: Path) -> None:
    """Copy a bundle's files; the folder gets its name once it is complete."""
    with disk_errors(target, "move the cache with XDG_CACHE_HOME"), whole_folder(target) as partial:
        manifest = b"".join(_chunks(bundle, read, MANIFEST_NAME))
        decode(manifest, f"the manifest of {bundle.name}")  # rejects names that lead out of the folder
        for file in bundle.files:
            _copy(_chunks(bundle, read, file), partial / file)
        write_whole(partial / MANIFEST_NAME, manifest)
        if _digest(partial) != bundle.digest:
            raise BundleError(f"{bundle.name} was exported again during the copy: restart the service")
        Bundle.load(partial, hashes=True)


def _chunks(bundle: SharedBundle, read: Read, file: str) -> Iterable[bytes]:
    offset = 0
    while chunk := read(bundle.digest, file, offset):
        yield chunk
        offset += len(chunk)


def _copy(chunks: Iterable[bytes], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as stream:
        for chunk in chunks:
            stream.write(chunk)


def _digest(folder: Path) -> str | None:
    """SHA-256 of the folder's manifest; None without one."""
    try:
        return hashlib.sha256((folder / MANIFEST_NAME).read_bytes()).hexdigest()
    except OSError:
        return None
