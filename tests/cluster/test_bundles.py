"""Bundles reach a machine once, complete and unchanged."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hypersd.cluster import bundles
from hypersd.cluster.bundles import BundleShelf, SharedBundle, find_or_fetch, share
from hypersd.engines import Bundle
from hypersd.errors import BundleError, UserError


def elsewhere(bundle: SharedBundle) -> SharedBundle:
    """The bundle as seen by a machine without the shared file system."""
    return dataclasses.replace(bundle, folder=Path("/nowhere") / bundle.name)


def test_a_bundle_on_this_machine_is_not_copied(sd15_bundle: Path, tmp_path: Path) -> None:
    """A shared file system, or a cluster of one machine: nothing is copied."""

    def read(*_: object) -> bytes:
        raise AssertionError("read over the network")

    assert find_or_fetch(share(sd15_bundle), read, tmp_path) == sd15_bundle.resolve()
    assert not list(tmp_path.iterdir())


def test_replicas_that_start_together_copy_a_bundle_once(
    sd15_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight start on one machine: one fetches each byte once, the others wait; the copy is the bundle."""
    monkeypatch.setattr(bundles, "CHUNK", 4096)
    shared, seen = share(sd15_bundle), []
    shelf = BundleShelf([shared])

    def read(digest: str, file: str, offset: int) -> bytes:
        seen.append((file, offset))
        return shelf.read(digest, file, offset)

    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(lambda _: find_or_fetch(elsewhere(shared), read, tmp_path), range(8)))
    [folder] = folders
    assert len(seen) == len(set(seen)) > len(shared.files)
    assert Bundle.load(folder, hashes=True).manifest == Bundle.load(sd15_bundle).manifest
    assert folder.name == sd15_bundle.name  # what requests call it


def test_a_byte_that_changes_on_the_way_is_noticed(sd15_bundle: Path, tmp_path: Path) -> None:
    """Every file's SHA-256 is checked, and nothing that failed can be taken for a bundle later."""
    shared = share(sd15_bundle)
    shelf = BundleShelf([shared])

    def read(digest: str, file: str, offset: int) -> bytes:
        data = shelf.read(digest, file, offset)
        return data[:-1] + b"?" if file.endswith(".onnx") and data else data

    with pytest.raises(BundleError, match="was altered"):
        find_or_fetch(elsewhere(shared), read, tmp_path)
    assert not list(tmp_path.rglob(f"{shared.name}/bundle.json"))
    assert find_or_fetch(elsewhere(shared), shelf.read, tmp_path).is_dir()  # and it can be tried again


def test_a_bundle_that_is_exported_again_during_the_copy_is_rejected(
    copy_bundle, sd15_bundle: Path, tmp_path: Path
) -> None:
    """Replicas that start later must not generate with another checkpoint than earlier ones."""
    old = share(copy_bundle(sd15_bundle, "served").root)
    new = BundleShelf([dataclasses.replace(old, folder=copy_bundle(sd15_bundle, "newer", eta=0.5).root)])
    with pytest.raises(BundleError, match="exported again"):
        find_or_fetch(elsewhere(old), new.read, tmp_path / "cache")


@pytest.mark.parametrize("file", ["../secret", "/etc/passwd", "secret.txt"])
def test_only_files_of_the_bundle_can_be_read(file: str, copy_bundle, sd15_bundle: Path) -> None:
    """A sender of messages in the cluster can read bundles, and nothing else."""
    bundle = copy_bundle(sd15_bundle)
    (bundle.root / "secret.txt").write_text("secret")
    (bundle.root.parent / "secret").write_text("secret")
    shared = share(bundle.root)
    with pytest.raises(BundleError, match="has no file"):
        BundleShelf([shared]).read(shared.digest, file, 0)


def test_a_full_disk_is_reported_in_one_line(sd15_bundle: Path, mount_disk) -> None:
    """The cache may be on a small disk: the message says where, and how to move it."""
    shared = share(sd15_bundle)
    with pytest.raises(UserError, match=r"the disk of .* is full: .*XDG_CACHE_HOME"):
        find_or_fetch(elsewhere(shared), BundleShelf([shared]).read, mount_disk("64k"))
