"""The one place that talks to the Hugging Face Hub: single files into the Hub's own cache.

`huggingface_hub` does the work, so its settings hold: HF_TOKEN and `hf auth login`, HF_ENDPOINT, HF_HOME, HF_HUB_CACHE,
HF_HUB_OFFLINE. It reads them when it is imported, which is why it is imported inside functions here.

`hf_hub_download` starts over in every process. Large files that come over plain HTTP are therefore downloaded here, to
the place in the cache where it looks for them: a download that was cut or killed resumes, also in the next process.
Files that come through `hf_xet` are left to it (HF_HUB_DISABLE_XET=1 turns them into plain HTTP).
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import DiskFullError, DownloadError, HyperSDError, NetworkError, disk_full, is_disk_full, one_line
from .files import lock_file, partial_path, sha256_file
from .progress import DownloadProgress
from .vocabulary import SHA256

REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
OTHER_DISK = "set HF_HOME to a folder on another disk"
LOCAL_HINT = "use local files"


@dataclass(frozen=True, kw_only=True)
class HubFile:
    """A file in the Hub's cache; `revision` is the commit that the requested revision stood for."""

    path: Path
    repo_id: str
    filename: str
    revision: str


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
    """Download one file of a model repository, or find it in the cache.

    Args:
        repo_id: OWNER/NAME.
        filename: the file's path in the repository.
        revision: branch, tag or commit; `main` by default.
        progress: told about the download.

    Raises:
        DownloadError: the Hub refused the request, has no such file, or the file cannot be stored.
        NetworkError: the Hub could not be reached.
        DiskFullError: the cache's disk has no room for the file.
    """
    wanted = _Wanted(repo_id=repo_id, filename=filename, revision=revision or "main")
    with _explained(wanted):
        return _fetch(wanted, progress)


def fetch_optional(
    repo_id: str, filename: str, *, revision: str | None = None, progress: DownloadProgress | None = None
) -> HubFile | None:
    """As `fetch`, but None if the repository has no such file.

    Without network a file counts as missing if the Hub said so before, and with HF_HUB_OFFLINE also if the cache holds
    other files of that revision; otherwise it is a NetworkError.
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


def cached_sha256(path: Path) -> str:
    """The SHA-256 of a file that was fetched; of a large file it is the name in the cache, checked by the download."""
    blob = path.resolve().name
    return blob if re.fullmatch(SHA256, blob) else sha256_file(path)


def _fetch(wanted: _Wanted, progress: DownloadProgress | None) -> HubFile:
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    bar, name, revision = _bar_class(wanted.filename, progress), wanted.filename, wanted.revision
    is_cached = isinstance(try_to_load_from_cache(wanted.repo_id, name, revision=revision), str)
    if not is_cached and not constants.HF_HUB_OFFLINE:
        _fetch_blob(wanted, bar)
    path = Path(hf_hub_download(wanted.repo_id, name, revision=revision, tqdm_class=bar))
    snapshot = path.parents[name.count("/")]  # <cache>/models--<owner>--<name>/snapshots/<commit>
    return HubFile(path=path, repo_id=wanted.repo_id, filename=name, revision=snapshot.name)


def _repo_folder(repo_id: str) -> Path:
    """A repository's folder in the cache (https://huggingface.co/docs/huggingface_hub/guides/manage-cache)."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}"


def _is_absent(wanted: _Wanted, error: Exception) -> bool:
    """Whether the repository is known to lack the file."""
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


def _fetch_blob(wanted: _Wanted, bar: type[Any]) -> None:
    """Put a large file's content where `hf_hub_download` looks for it. Small files and errors are left to it."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    url = hf_hub_url(wanted.repo_id, wanted.filename, revision=wanted.revision)
    try:
        metadata = get_hf_file_metadata(url)
    except HfHubHTTPError:
        return
    etag, size = metadata.etag or "", metadata.size
    has_xet = not constants.HF_HUB_DISABLE_XET and importlib.util.find_spec("hf_xet") is not None
    if not (re.fullmatch(SHA256, etag) and size and metadata.commit_hash) or (metadata.xet_file_data and has_xet):
        return
    blob = _repo_folder(wanted.repo_id) / "blobs" / etag
    blob.parent.mkdir(parents=True, exist_ok=True)
    with lock_file(blob.parents[2] / ".locks" / blob.parents[1].name / etag, lambda: None):
        if blob.exists():
            return
        partial = partial_path(blob)
        with partial.open("ab") as file:
            missing, free = size - file.tell(), shutil.disk_usage(blob.parent).free
            if missing > free:
                raise DiskFullError(
                    f"the download of {wanted} needs {missing / 1e9:.1f} GB, {blob.parent} has {free / 1e9:.1f} GB "
                    f"free: free some space or {OTHER_DISK}"
                )
            _append(url, file, size, bar)
        if (digest := sha256_file(partial)) != etag:
            partial.unlink()
            raise DownloadError(
                f"the download of {wanted} is damaged (SHA-256 {digest}, expected {etag}) and was deleted: "
                "run the command again to download it anew"
            )
        partial.replace(blob)


def _append(url: str, file: BinaryIO, size: int, bar_class: type[Any]) -> None:
    """Append the missing bytes of a file; a connection that is lost is made again as long as bytes arrive."""
    from huggingface_hub import constants, get_session, hf_raise_for_status
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # pyright: ignore[reportPrivateImportUsage]
    from huggingface_hub.utils import build_hf_headers

    headers = build_hf_headers(headers={"Accept-Encoding": "identity"})  # ranges of the file, not of its compression
    options = {"timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT, "follow_redirects": True}
    if file.tell() >= size:
        return
    with bar_class(total=size, initial=file.tell()) as bar:
        while (have := file.tell()) < size:
            ranges = {"Range": f"bytes={have}-"} if have else {}
            try:
                # A redirect to another host (the CDN) goes without the token.
                with get_session().stream("GET", url, headers=headers | ranges, **options) as response:
                    hf_raise_for_status(response)
                    if have and response.status_code != 206:  # the server sends the whole file
                        file.truncate(0)
                        bar.update(-have)
                    for chunk in response.iter_raw():
                        file.write(chunk)
                        file.flush()  # a killed process loses nothing that has arrived
                        bar.update(len(chunk))
            except HTTPError as error:
                if file.tell() <= have or isinstance(error, HfHubHTTPError):
                    raise
                time.sleep(1)


def _bar_class(filename: str, progress: DownloadProgress | None) -> type[Any]:
    """A class for `huggingface_hub` to use in the place of tqdm: it tells `progress` and prints nothing."""

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
            """The rest of tqdm's protocol. Because `update_transfer` exists, hf_xet uses one bar, not two."""

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
    """The library's error in one line that says what to do."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hf

    endpoint, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
    if isinstance(error, hf.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # "not in the cache either": the cause is why the Hub was no help
    if isinstance(error, hf.HFValidationError):
        name = f"{wanted.repo_id!r} is neither a Hub repository (owner/name) nor a local path that exists"
        return DownloadError(f"{name}: check the name")
    if isinstance(error, hf.HfHubHTTPError):
        return _explain_status(error, wanted, endpoint)
    if isinstance(error, (hf.OfflineModeIsEnabled, hf.LocalEntryNotFoundError)):
        remedy = f"unset HF_HUB_OFFLINE to download it, or {LOCAL_HINT}"
        return NetworkError(f"HF_HUB_OFFLINE is set and {wanted} is not in the cache {cache}: {remedy}")
    if isinstance(error, hf.FileMetadataError):
        no_hub = f"{endpoint} does not answer as a Hub does when asked for {wanted}"
        return DownloadError(f"{no_hub}: check HF_ENDPOINT and any proxy")
    if isinstance(error, OSError) and is_disk_full(error):
        return DiskFullError(f"cannot store {wanted}: {disk_full(cache, OTHER_DISK)}")
    if isinstance(error, OSError) and error.errno is not None:
        failure = f"cannot store {wanted} in the cache {cache} ({one_line(error)})"
        return DownloadError(f"{failure}: set HF_HOME to a folder that you can write to")
    if isinstance(error, ValueError):
        return DownloadError(f"cannot download {wanted}: {one_line(error)}")
    remedy = f"check the connection, or set HF_ENDPOINT to a mirror, or {LOCAL_HINT}"
    return NetworkError(f"could not download {wanted} from {endpoint} ({one_line(error)}): {remedy}")


def _explain_status(error: Any, wanted: _Wanted, endpoint: str) -> HyperSDError:
    """The Hub's answer with an error status, in words. `error` is an HfHubHTTPError."""
    from huggingface_hub import errors as hf

    status, repo_id, revision = error.response.status_code, wanted.repo_id, wanted.revision
    refused, log_in = f"the Hub refused access to {repo_id} ({status})", "log in with `hf auth login` or set HF_TOKEN"
    answer = f"{endpoint} answered {status} when asked for {wanted}"
    if isinstance(error, hf.EntryNotFoundError):
        return DownloadError(f"{repo_id} has no file {wanted.filename!r} at revision {revision!r}: check the name")
    if isinstance(error, hf.RevisionNotFoundError):
        return DownloadError(f"{repo_id} has no revision {revision!r}: give a branch, a tag or a full commit hash")
    if isinstance(error, hf.GatedRepoError):
        page = f"{endpoint}/{repo_id}"
        return DownloadError(f"{refused}: accept the licence on the model page {page} and {log_in}")
    if status in (401, 403):  # to a caller who is not logged in, the Hub says 401 of a missing repository too
        may_read = "with an account that may read it"
        return DownloadError(f"{refused}: check the name; if it is private or gated, {log_in} {may_read}")
    if isinstance(error, hf.RepositoryNotFoundError):
        return DownloadError(f"{endpoint} has no repository {repo_id} ({status}): check the name, or {LOCAL_HINT}")
    if status in (408, 429) or status >= 500:
        return NetworkError(f"{answer}: try again later, or set HF_ENDPOINT to a mirror, or {LOCAL_HINT}")
    return DownloadError(f"{answer}: check the names and HF_ENDPOINT")
