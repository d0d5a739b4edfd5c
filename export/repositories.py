"""Opens the places of files: Hub repositories, local folders, the clone's demonstration weights."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, Protocol

from ..engines.files import sha256_file
from ..engines.hub import REPO_ID, cached_sha256, fetch, fetch_optional
from ..engines.manifest import SourceFile
from ..engines.progress import DownloadProgress
from ..errors import WeightsError
from .checkpoints import DEMO_FOLDERS

DEMO_ROOT = Path(__file__).resolve().parents[1] / "tests/assets/demo"
TOKENIZER_FILES = ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json", "tokenizer.json")
SAFETENSORS_HINT = "only .safetensors weights are read (pickled .bin and .ckpt files can run code): convert them"


@dataclasses.dataclass(frozen=True)
class Found:
    """A file on this machine.

    Attributes:
        path: the file.
        filename: its path in the repository or folder.
        repo: the Hub repository or demonstration folder that it came from, if any.
        revision: the repository's commit.
    """

    path: Path
    filename: str
    repo: str | None = None
    revision: str | None = None

    def record(self) -> SourceFile:
        """The manifest's record of the file, with the SHA-256 of its contents."""
        return SourceFile(
            filename=self.filename,
            size=self.path.stat().st_size,
            sha256=cached_sha256(self.path) if self.repo else sha256_file(self.path),
            repo=self.repo,
            revision=self.revision,
            path=None if self.repo else str(self.path.resolve()),
        )


class Files(Protocol):
    """The files of a model in diffusers layout."""

    @property
    def name(self) -> str: ...

    @property
    def revision(self) -> str | None: ...

    def find(self, filename: str) -> Found | None:
        """The file, or None if there is none of that name."""
        ...


@dataclasses.dataclass
class HubRepo:
    """A repository on the Hub, pinned to the commit of the first file that was fetched from it."""

    name: str
    revision: str | None = None
    progress: DownloadProgress | None = None

    def find(self, filename: str) -> Found | None:
        file = fetch_optional(self.name, filename, revision=self.revision, progress=self.progress)
        if file is None:
            return None
        self.revision = file.revision
        return Found(file.path, filename, self.name, file.revision)

    def get(self, filename: str) -> Found:
        """The file; if it is missing, the Hub's reason is the error."""
        file = fetch(self.name, filename, revision=self.revision, progress=self.progress)
        return Found(file.path, filename, self.name, file.revision)


@dataclasses.dataclass
class LocalFolder:
    """A folder in diffusers layout."""

    root: Path
    revision: str | None = None

    @property
    def name(self) -> str:
        return str(self.root.resolve())

    def find(self, filename: str) -> Found | None:
        path = self.root / filename
        return Found(path, filename) if path.is_file() else None


@dataclasses.dataclass
class DemoFolder:
    """A folder of demonstration weights. Bundles record its name alone, so that every clone makes the same bundle."""

    name: str
    revision: str | None = None

    def find(self, filename: str) -> Found | None:
        folder = DEMO_ROOT / self.name
        if not folder.is_dir():
            raise WeightsError(
                f"there is no {folder}: demonstration weights lie in the clone only, run hypersd from one"
            )
        path = folder / filename
        return Found(path, filename, self.name) if path.is_file() else None

    def get(self, filename: str) -> Found:
        """The file; a WeightsError if it is missing."""
        if (found := self.find(filename)) is None:
            raise WeightsError(f"there is no {DEMO_ROOT / self.name / filename}: restore it from git")
        return found


def open_files(location: str, revision: str | None, progress: DownloadProgress | None, option: str) -> Files:
    """Open a demonstration folder, a local folder, or else a Hub repository.

    Raises:
        WeightsError: the location is none of these, or is a folder with a revision; the message names ``option``.
    """
    if location in DEMO_FOLDERS:
        folder = DemoFolder(location)
    elif location and Path(location).is_dir():
        folder = LocalFolder(Path(location))
    elif os.path.isfile(location):
        raise WeightsError(f"{option} {location!r} is a file: expected a folder in diffusers layout, or a repository")
    elif REPO_ID.fullmatch(location) and not location.startswith("."):
        return HubRepo(location, revision, progress)
    else:
        raise WeightsError(f"{option} {location!r} is neither a folder nor the name of a Hub repository (owner/name)")
    if revision:
        raise WeightsError(f"{option} {location} is a folder and has no revisions: leave --revision out")
    return folder


def open_known(place: str, revision: str | None, progress: DownloadProgress | None) -> HubRepo | DemoFolder:
    """Open a place from the table of checkpoints, even if the current folder holds something of that name."""
    if place not in DEMO_FOLDERS:
        return HubRepo(place, revision, progress)
    if revision:
        raise WeightsError(f"{place} is a folder and has no revisions: leave {revision!r} out")
    return DemoFolder(place)


def get_file(files: Files, filename: str) -> Found:
    """The file of that name; a WeightsError if it is missing."""
    if (found := files.find(filename)) is None:
        raise WeightsError(f"{files.name} has no {filename}: expected a model in diffusers layout")
    return found


def read_json(found: Found) -> dict[str, Any]:
    """A JSON object from a configuration file."""
    try:
        value = json.loads(found.path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{found.path} is not JSON ({error}): download it again") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{found.path} holds no JSON object: download it again")
    return value


def tokenizer_folder(files: Files, name: str) -> Path:
    """Fetch a CLIP tokenizer's files; returns their local folder."""
    found = [file for filename in TOKENIZER_FILES if (file := files.find(f"{name}/{filename}"))]
    if not {"vocab.json", "tokenizer.json"} & {file.path.name for file in found}:
        raise WeightsError(f"{files.name} has no {name}/vocab.json: expected a model in diffusers layout")
    return found[0].path.parent
