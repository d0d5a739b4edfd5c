"""The one place that talks to the Hugging Face Hub: single files into the Hub's own cache.

`huggingface_hub` does the work, so its settings hold: HF_TOKEN and `hf auth login`, HF_ENDPOINT, HF_HOME, HF_HUB_CACHE,
HF_HUB_OFFLINE. It reads them when it is imported, which is why it is imported inside functions here.

On top of it:
- A download over plain HTTP that was cut, or whose process was killed, goes on where it stopped, also in the next
  process: what has arrived lies beside the finished blobs as `<sha256>.partial`, and the finished file is checked
  against its SHA-256. Files that come through `hf_xet` are left to `huggingface_hub` (HF_HUB_DISABLE_XET=1 turns them
  into plain HTTP).
- Every failure is one line that says what to do.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from ..engines.files import sha256_file
from ..errors import DiskFullError, DownloadError, HyperSDError, NetworkError, disk_full, is_disk_full, one_line

if TYPE_CHECKING:
    from huggingface_hub.file_download import HfFileMetadata

_SHA256 = re.compile(r"[0-9a-f]{64}")
OTHER_DISK = "set HF_HOME to a folder on another disk"
_LOCAL_HINT = "point --base / --lora at local files"


class DownloadProgress(Protocol):
    """Told about one file at a time; nothing is told about a file that is in the cache already."""

    def start(self, filename: str, total: int | None) -> None:
        """A download begins at zero bytes of `total`; called again for the same file after a lost connection."""

    def advance(self, n: int) -> None:
        """`n` more bytes are here, also those kept from an earlier run; negative if the server starts over."""

    def finish(self) -> None:
        """The download ended, well or not."""


@dataclass(frozen=True, kw_only=True)
class HubFile:
    path: Path
    repo_id: str
    filename: str
    revision: str  # the commit that the asked revision stood for


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    repo_id: str
    filename: str
    revision: str

    def __str__(self) -> str:
        return f"{self.filename!r} of {self.repo_id} at revision {self.revision!r}"


def fetch(
    repo_id: str, filename: str, *, revision: str | None = None, progress: DownloadProgress | None = None
) -> HubFile:
    """Download one file of a model repository, or find it in the cache. `revision` is a branch, tag or commit."""
    wanted = _Wanted(repo_id=repo_id, filename=filename, revision=revision or "main")
    with _explained(wanted):
        return _fetch(wanted, progress)


def fetch_optional(
    repo_id: str, filename: str, *, revision: str | None = None, progress: DownloadProgress | None = None
) -> HubFile | None:
    """As `fetch`, but None if the repository has no such file.

    Without network a file counts as missing if the Hub said so before, and with HF_HUB_OFFLINE also if the cache holds
    other files of that revision; otherwise nobody knows, and that is a NetworkError.
    """
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError  # pyright: ignore[reportPrivateImportUsage]

    wanted = _Wanted(repo_id=repo_id, filename=filename, revision=revision or "main")
    with _explained(wanted):
        try:
            return _fetch(wanted, progress)
        except (HTTPError, LocalEntryNotFoundError) as error:
            if _is_absent(wanted, error):
                return None
            raise


def _fetch(wanted: _Wanted, progress: DownloadProgress | None) -> HubFile:
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(wanted.repo_id, wanted.filename, revision=wanted.revision)
    if not isinstance(cached, str) and not constants.HF_HUB_OFFLINE:
        _fetch_blob(wanted, progress)
    path = hf_hub_download(
        wanted.repo_id,
        wanted.filename,
        revision=wanted.revision,
        tqdm_class=_bar_class(wanted.filename, progress),
    )
    snapshot = Path(path).parents[wanted.filename.count("/")]  # <cache>/models--<owner>--<name>/snapshots/<commit>
    return HubFile(path=Path(path), repo_id=wanted.repo_id, filename=wanted.filename, revision=snapshot.name)


def _repo_folder(repo_id: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type="model")


def _is_absent(wanted: _Wanted, error: Exception) -> bool:
    """Whether it is known that the repository lacks the file, as opposed to nobody knowing."""
    from huggingface_hub import _CACHED_NO_EXIST, constants, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return isinstance(error, EntryNotFoundError)
    if try_to_load_from_cache(wanted.repo_id, wanted.filename, revision=wanted.revision) is _CACHED_NO_EXIST:
        return True
    folder = _repo_folder(wanted.repo_id)
    ref = folder / "refs" / wanted.revision
    commit = ref.read_text() if ref.is_file() else wanted.revision
    return constants.HF_HUB_OFFLINE and (folder / "snapshots" / commit).is_dir()


def _fetch_blob(wanted: _Wanted, progress: DownloadProgress | None) -> None:
    """Put a large file's content where `hf_hub_download` looks for it; leave all else to `hf_hub_download`.

    Its own downloads start over in every process. The lock is the one it takes, so that it waits for this download.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import WeakFileLock
    from huggingface_hub.utils._runtime import is_xet_available

    try:
        metadata = get_hf_file_metadata(hf_hub_url(wanted.repo_id, wanted.filename, revision=wanted.revision))
    except HfHubHTTPError:
        return  # hf_hub_download meets the same answer: it tries again, remembers or raises, as the answer requires
    if not (metadata.etag and _SHA256.fullmatch(metadata.etag) and metadata.size and metadata.commit_hash):
        return  # a small file, which lies in git itself
    if metadata.xet_file_data is not None and is_xet_available():
        return
    folder = _repo_folder(wanted.repo_id)
    blob = folder / "blobs" / metadata.etag
    lock = folder.parent / ".locks" / folder.name / f"{metadata.etag}.lock"
    blob.parent.mkdir(parents=True, exist_ok=True)
    lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if not blob.exists():
            _download_blob(wanted, metadata, blob, progress)


def _download_blob(wanted: _Wanted, metadata: HfFileMetadata, blob: Path, progress: DownloadProgress | None) -> None:
    from huggingface_hub import hf_hub_url

    assert metadata.size is not None
    partial = blob.with_name(f"{blob.name}.partial")
    url = hf_hub_url(wanted.repo_id, wanted.filename, revision=metadata.commit_hash)
    with partial.open("ab") as file:
        missing, free = metadata.size - file.tell(), shutil.disk_usage(blob.parent).free
        if missing > free:
            raise DiskFullError(
                f"the download of {wanted} needs {_gigabytes(missing)}, {blob.parent} has {_gigabytes(free)} free: "
                f"free some space or {OTHER_DISK}"
            )
        _download(url, file, metadata.size, _bar_class(wanted.filename, progress))
    digest = sha256_file(partial)
    if digest != metadata.etag:
        partial.unlink()
        raise DownloadError(
            f"the download of {wanted} is damaged (SHA-256 {digest}, expected {metadata.etag}) and was deleted: "
            "run the command again to download it anew"
        )
    os.replace(partial, blob)


def _download(url: str, file: BinaryIO, size: int, bar: type[Any]) -> None:
    """Append what is missing of `size` bytes. A redirect to another host (the CDN) goes without the token."""
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    headers = build_hf_headers(headers={"Accept-Encoding": "identity"})  # ranges of the file, not of its compression
    while (have := file.tell()) < size:
        try:
            http_get(url, file, resume_size=have, headers=headers, expected_size=size, tqdm_class=bar)
        except HTTPError:  # http_get resumes by itself when a connection ends, but not when it is reset
            if file.tell() <= have:
                raise


def _bar_class(filename: str, progress: DownloadProgress | None) -> type[Any]:
    """What `huggingface_hub` takes for a tqdm class: tells `progress`, never draws anything itself."""

    class Bar:
        def __init__(self, *_: object, total: int | None = None, initial: int = 0, **__: object) -> None:
            self.total = total
            if progress is not None:
                progress.start(filename, total)
                self.update(initial)

        def update(self, n: float | None = 1) -> None:
            if progress is not None and n:
                progress.advance(int(n))

        def close(self) -> None:
            if progress is not None:
                progress.finish()

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            self.close()

        def ignore(self, *_: object, **__: object) -> None:
            """The rest of the protocol: that `update_transfer` exists makes hf_xet use one bar and not two."""

        update_transfer = set_transfer_postfix_str = set_postfix_str = refresh = ignore

    return Bar


@contextmanager
def _explained(wanted: _Wanted) -> Iterator[None]:
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    try:
        yield
    except (HTTPError, OSError, ValueError, RuntimeError) as error:  # hf_xet reports what failed as RuntimeError
        raise _explain(error, wanted) from error


def _explain(error: Exception, wanted: _Wanted) -> HyperSDError:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        FileMetadataError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    endpoint = constants.ENDPOINT
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # "not in the cache either": the cause is why the Hub was no help
    if isinstance(error, HFValidationError):
        return DownloadError(
            f"{wanted.repo_id!r} is neither a Hub repository (owner/name) nor a local path that exists: check the name"
        )
    if isinstance(error, HfHubHTTPError):
        return _explain_status(error, wanted, endpoint)
    if isinstance(error, (OfflineModeIsEnabled, LocalEntryNotFoundError)):
        return NetworkError(
            f"HF_HUB_OFFLINE is set and {wanted} is not in the cache {constants.HF_HUB_CACHE}: "
            f"unset HF_HUB_OFFLINE to download it, or {_LOCAL_HINT}"
        )
    if isinstance(error, FileMetadataError):
        return DownloadError(
            f"{endpoint} does not answer as a Hub does when asked for {wanted}: check HF_ENDPOINT and any proxy"
        )
    if isinstance(error, OSError) and is_disk_full(error):
        return DiskFullError(f"cannot store {wanted}: {disk_full(constants.HF_HUB_CACHE, OTHER_DISK)}")
    if isinstance(error, OSError) and error.errno is not None:
        return DownloadError(
            f"cannot store {wanted} in the cache {constants.HF_HUB_CACHE} ({one_line(error)}): "
            "set HF_HOME to a folder that you can write to"
        )
    if isinstance(error, ValueError):
        return DownloadError(f"cannot download {wanted}: {one_line(error)}")
    return NetworkError(
        f"could not download {wanted} from {endpoint} ({one_line(error)}): "
        f"check the connection, or set HF_ENDPOINT to a mirror, or {_LOCAL_HINT}"
    )


def _explain_status(error: Any, wanted: _Wanted, endpoint: str) -> HyperSDError:
    """The Hub answered, with an error status. `error` is an HfHubHTTPError."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    status, repo_id = error.response.status_code, wanted.repo_id
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, EntryNotFoundError):
        return DownloadError(
            f"{repo_id} has no file {wanted.filename!r} at revision {wanted.revision!r}: check the name"
        )
    if isinstance(error, RevisionNotFoundError):
        return DownloadError(
            f"{repo_id} has no revision {wanted.revision!r}: give a branch, a tag or a full commit hash"
        )
    if isinstance(error, GatedRepoError):
        return DownloadError(
            f"the Hub refused access to {repo_id} ({status}): "
            f"accept the licence on the model page {endpoint}/{repo_id} and {log_in}"
        )
    if status in (401, 403):  # the Hub says 401, too, of a repository that does not exist, to who is not logged in
        return DownloadError(
            f"the Hub refused access to {repo_id} ({status}): "
            f"check the name; if it is private or gated, {log_in} with an account that may read it"
        )
    if isinstance(error, RepositoryNotFoundError):
        return DownloadError(f"{endpoint} has no repository {repo_id} ({status}): check the name, or {_LOCAL_HINT}")
    if status in (408, 429) or status >= 500:
        return NetworkError(
            f"{endpoint} answered {status} when asked for {wanted}: "
            f"try again later, or set HF_ENDPOINT to a mirror, or {_LOCAL_HINT}"
        )
    return DownloadError(f"{endpoint} answered {status} when asked for {wanted}: check the names and HF_ENDPOINT")


def _gigabytes(n: int) -> str:
    return f"{n / 1e9:.1f} GB"
