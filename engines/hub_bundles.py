"""Bundles on the Hub: a repository's files that this machine can use, fetched into the Hub's cache."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import BundleError, DownloadError
from .hub import REPO_ID, cached_sha256, fetch
from .manifest import MANIFEST_NAME, Manifest, decode
from .progress import DownloadProgress

PLACE = re.compile(rf"(?P<repo>{REPO_ID.pattern})(?:@(?P<revision>[\w./-]+))?")


def split_place(place: str | Path) -> tuple[str, str | None] | None:
    """A Hub repository and its revision, if any; None if the place can only be a folder.

    ``owner/name`` is a folder if there is a folder ``owner``, whether it holds ``name`` or not.
    """
    found = PLACE.fullmatch(str(place))
    if found is None or str(place).startswith(".") or Path(place).parent.is_dir():
        return None
    return found["repo"], found["revision"]


def bundle_name(place: str | Path) -> str | None:
    """The name of a bundle on the Hub, which is its repository's without the owner; None for a folder."""
    return repo[0].partition("/")[2] if (repo := split_place(place)) else None


def find_bundle(place: str | Path, progress: DownloadProgress | None = None) -> Path:
    """The folder of a bundle, which is fetched first if it is on the Hub.

    Of a repository's files those are fetched that this machine can use: all but the TensorRT plans that cannot run
    here. Files in the Hub's cache are links: read such a bundle, and build engines for a copy.

    Args:
        place: a folder, or a Hub repository ``owner/name``, also ``owner/name@revision`` (branch, tag or commit).
        progress: told about downloads.

    Raises:
        DownloadError: the Hub refused the request, or has no such repository or file.
        NetworkError: the Hub could not be reached.
        BundleError: the repository holds no bundle, a file is not the manifest's, or huggingface_hub is missing.
    """
    if (found := split_place(place)) is None:
        return Path(place)
    repo, revision = found
    try:
        file = fetch(repo, MANIFEST_NAME, revision=revision, progress=progress)
    except ModuleNotFoundError as error:
        extra = "install hypersd[hub] to take a bundle from the Hub"
        raise BundleError(f"there is no folder {place}: check the name, or {extra}") from error
    except DownloadError as error:
        raise type(error)(f"there is no folder {place}, and {error}") from error
    root = file.path.parent
    manifest = decode(file.path.read_bytes(), f"{MANIFEST_NAME} of {repo}")
    for name in _usable_files(manifest):
        path = fetch(repo, name, revision=file.revision, progress=progress).path
        _check_file(path, manifest, name, repo)
    return root


def _usable_files(manifest: Manifest) -> list[str]:
    """The bundle's files without the plans of targets that cannot run on this machine."""
    if not manifest.engines:
        return list(manifest.files)
    from .tensorrt.machine import this_machine, why_not_target  # they import torch

    machine = this_machine()
    left_out = {
        plan.file
        for target in manifest.engines.values()
        if why_not_target(target, manifest, machine) is not None
        for plan in target.plans.values()
    }
    return [name for name in manifest.files if name not in left_out]


def _check_file(path: Path, manifest: Manifest, name: str, repo: str) -> None:
    """Compare a fetched file with the manifest.

    Raises:
        BundleError: they differ.
    """
    digest, record = cached_sha256(path), manifest.files[name]
    if digest != record.sha256:
        raise BundleError(
            f"{name} of {repo} is not the file that its {MANIFEST_NAME} names (SHA-256 {digest[:12]}…, expected "
            f"{record.sha256[:12]}…): ask its owner to push the bundle again"
        )
