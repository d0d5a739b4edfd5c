"""The tiny repositories in the place of the Hub."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from make_tiny_repos import SD15_REPO, SDXL_REPO

from hypersd.engines.hub import HubFile

BASES = {"sd15": SD15_REPO, "sdxl": SDXL_REPO}
COMMIT = "c0ffee" + "0" * 34


@dataclass
class FakeHub:
    """The tiny repositories as the Hub; ``tests/export/test_hub.py`` tests the real client."""

    root: Path
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)

    def fetch_optional(
        self, repo_id: str, filename: str, *, revision: str | None = None, progress: object = None
    ) -> HubFile | None:
        self.asked.append((repo_id, filename, revision))
        path = self.root / repo_id / filename
        if not path.is_file():
            return None
        return HubFile(path=path, repo_id=repo_id, filename=filename, revision=COMMIT)

    def fetch(self, repo_id: str, filename: str, **options: Any) -> HubFile:
        file = self.fetch_optional(repo_id, filename, **options)
        assert file is not None, f"{repo_id} has no {filename}"
        return file

    def repos(self) -> set[str]:
        return {repo for repo, _, _ in self.asked}
