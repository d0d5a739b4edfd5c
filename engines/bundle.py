"""A bundle on disk: its files, and the checks that they are unaltered."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from ..errors import BundleError, RequestError
from .files import sha256_file, write_whole
from .manifest import MANIFEST_NAME, Manifest, decode, encode
from .specs import Component, Plan


def _blobs(root: Path) -> Path | None:
    """The folder of contents of the Hub's cache, if ``root`` is a snapshot there or a folder of one.

    Layout: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
    """
    for folder in (root, *root.parents):
        repository = folder.parent.parent
        if folder.parent.name == "snapshots" and repository.name.startswith("models--"):
            return repository / "blobs"
    return None


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write ``bundle.json`` atomically."""
    write_whole(root / MANIFEST_NAME, encode(manifest))


@dataclasses.dataclass(frozen=True)
class Bundle:
    """An exported checkpoint: a folder and its manifest."""

    root: Path
    manifest: Manifest

    @classmethod
    def load(cls, root: str | Path, *, hashes: bool = False) -> Bundle:
        """Open a bundle and check it.

        Args:
            root: the bundle's folder.
            hashes: also read every file and compare its SHA-256, which takes seconds per gigabyte.

        TensorRT plans are checked when they are loaded: a bundle without its plans is still complete.

        Raises:
            BundleError: no bundle there, an invalid manifest, or a file that is missing, shortened or altered.
        """
        root = Path(root)
        try:
            text = (root / MANIFEST_NAME).read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            hint = "make one with `hypersd export --ckpt NAME`"
            raise BundleError(f"{root} is not a bundle: it has no readable {MANIFEST_NAME}; {hint}") from error
        bundle = cls(root, decode(text, str(root / MANIFEST_NAME)))
        plans = bundle.plan_files()
        for name in bundle.manifest.files:
            if name not in plans or (hashes and os.path.exists(root / name)):  # Path.exists raises for a long name
                bundle.check_file(name, hashes)
        return bundle

    def plan_files(self) -> set[str]:
        """The files that are TensorRT plans."""
        return {plan.file for target in self.manifest.engines.values() for plan in target.plans.values()}

    def is_whole(self, plan: Plan, hashes: bool = False) -> bool:
        """Whether a plan's file exists, has the recorded size and, with ``hashes``, is unaltered."""
        try:
            self.check_file(plan.file, hashes)
        except BundleError:
            return False
        return True

    def path(self, name: str) -> Path:
        """The full path of a file that the manifest lists; a path that leaves the folder is rejected.

        In the Hub's cache every file of a snapshot is a link to its contents, in the same repository's ``blobs``.
        """
        path = self.root / name
        try:
            root, real = self.root.resolve(), path.resolve()
            inside = real.is_relative_to(root) or real.parent == _blobs(root)
        except (OSError, RuntimeError) as error:  # links in a circle
            raise BundleError(f"{path} cannot be followed: export or copy the bundle again") from error
        if not inside:
            raise BundleError(f"{path} leads out of the bundle {self.root}: copy the bundle with its files, not links")
        return path

    def component(self, name: str) -> Component:
        """The manifest's entry for a component."""
        try:
            return self.manifest.components[name]
        except KeyError:
            has = ", ".join(sorted(self.manifest.components))
            raise BundleError(f"{self.root} has no component {name!r}, it has {has}; export it again") from None

    def check_weights(self, allow_random: bool, option: str) -> None:
        """Reject a bundle with random weights unless they are allowed; the error names ``option``, which allows them.

        Raises:
            RequestError: its images are noise.
        """
        if self.manifest.random_weights and not allow_random:
            raise RequestError(
                f"{self.root} has random weights, its images are noise: export {self.manifest.checkpoint} without "
                f"--random-weights, or take it with {option}"
            )

    def check_file(self, name: str, hashes: bool = False) -> None:
        """Raise a BundleError if a file is missing, shortened or, with ``hashes``, altered."""
        record, path = self.manifest.files[name], self.path(name)
        again = (
            "build it again with `hypersd build`" if name in self.plan_files() else "export or copy the bundle again"
        )
        try:
            size = path.stat().st_size if path.is_file() else None
        except OSError:  # a name too long for this system
            size = None
        if size is None:
            raise BundleError(f"{path} is missing from the bundle: {again}")
        if size != record.size:
            raise BundleError(f"{path} has {size} bytes, the manifest says {record.size}: {again}")
        if hashes and (digest := sha256_file(path)) != record.sha256:
            raise BundleError(f"{path} was altered: SHA-256 {digest[:12]}…, expected {record.sha256[:12]}…: {again}")
