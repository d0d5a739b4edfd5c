"""A bundle on disk: a damaged, altered or hostile one is rejected in one line before anything of it runs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
from onnx.external_data_helper import set_external_data

from hypersd import Pipeline
from hypersd.engines import Bundle
from hypersd.engines.files import sha256_file
from hypersd.errors import BundleError

MANIFEST = "bundle.json"
ONNX = "text_encoder/model.onnx"
DATA = "text_encoder/model.onnx_data"


@pytest.fixture
def bundle(sd15_bundle: Path, tmp_path: Path) -> Path:
    """A bundle of this test's own, to damage."""
    return Path(shutil.copytree(sd15_bundle, tmp_path / "inside" / "bundle"))


def refusal(load: Callable[[], Any]) -> str:
    """The one line with which a bundle is rejected."""
    with pytest.raises(BundleError) as caught:
        load()
    message = str(caught.value)
    assert "\n" not in message
    assert "\r" not in message
    return message


def edit(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the manifest."""
    manifest = json.loads((bundle / MANIFEST).read_text())
    change(manifest)
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def record(bundle: Path, name: str) -> None:
    """Make the manifest agree with a file as it is now, as an attacker would."""
    content = (bundle / name).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    edit(bundle, lambda manifest: manifest["files"].update({name: {"size": len(content), "sha256": digest}}))


def test_a_whole_bundle_loads_with_its_hashes(sd15_bundle: Path, sdxl_bundle: Path) -> None:
    """The digests that the writer recorded are those of the files, so that what follows proves something."""
    for root in (sd15_bundle, sdxl_bundle):
        bundle = Bundle.load(root, hashes=True)
        listed = {root / name for name in bundle.manifest.files}
        assert {path for path in root.rglob("*") if path.is_file()} == listed | {root / MANIFEST}


@pytest.mark.parametrize("size", [0, 1, (1 << 22) - 1, 1 << 22, (1 << 22) + 1])
def test_digests_are_sha256(size: int, tmp_path: Path) -> None:
    """Reading in chunks loses nothing at the chunks' borders."""
    content = os.urandom(size)
    (tmp_path / "file").write_bytes(content)
    assert sha256_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("name", [ONNX, DATA, "unet/model.onnx_data", "tokenizer/tokenizer.json"])
def test_missing_files_are_named(bundle: Path, name: str) -> None:
    """Every listed file must be there, whichever part it belongs to."""
    (bundle / name).unlink()
    message = refusal(lambda: Pipeline.load(bundle))
    assert name in message
    assert "missing" in message


def test_a_folder_in_place_of_a_file_is_rejected(bundle: Path) -> None:
    """A folder of the right name is not the file."""
    (bundle / DATA).unlink()
    (bundle / DATA).mkdir()
    assert DATA in refusal(lambda: Bundle.load(bundle))


@pytest.mark.parametrize("change", [-1, 1], ids=["shorter", "longer"])
def test_files_of_another_size_are_rejected_with_both_sizes(bundle: Path, change: int) -> None:
    """A download that broke off shows without reading a byte of it."""
    path = bundle / "unet/model.onnx_data"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size + change)
    message = refusal(lambda: Bundle.load(bundle))
    assert "unet/model.onnx_data" in message
    assert str(size) in message
    assert str(size + change) in message


def test_altered_files_are_rejected_when_hashes_are_asked_for(bundle: Path) -> None:
    """One flipped bit in the middle of the weights is found, and the digests are shown."""
    path = bundle / "unet/model.onnx_data"
    content = bytearray(path.read_bytes())
    before = hashlib.sha256(content).hexdigest()
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    Bundle.load(bundle)  # the size is right: without hashes nothing is read
    message = refusal(lambda: Bundle.load(bundle, hashes=True))
    assert "unet/model.onnx_data" in message
    assert before[:12] in message
    assert hashlib.sha256(content).hexdigest()[:12] in message


def test_links_that_leave_the_folder_are_rejected(bundle: Path) -> None:
    """A link to the same bytes outside is rejected: an unpacked archive could point anywhere with it."""
    outside = bundle.parent / "weights"
    shutil.move(bundle / DATA, outside)
    (bundle / DATA).symlink_to(outside)
    message = refusal(lambda: Bundle.load(bundle))
    assert DATA in message
    assert "leads out" in message


def cached(bundle: Path, root: Path, below: str = "") -> Path:
    """The bundle in a cache of the Hub: contents under their hashes in ``blobs``, links to them in a snapshot."""
    repository = root / "models--owner--bundle"
    snapshot = repository / "snapshots" / ("c0ffee" + "0" * 34) / below
    (repository / "blobs").mkdir(parents=True)
    for path in [path for path in bundle.rglob("*") if path.is_file()]:
        blob, link = repository / "blobs" / sha256_file(path), snapshot / path.relative_to(bundle)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@pytest.mark.parametrize("below", ["", "sd15/fp32"])
def test_a_bundle_in_the_hubs_cache_loads(below: str, sd15_bundle: Path, tmp_path: Path) -> None:
    """Its files are links into the same repository's contents; a folder of a repository counts too."""
    snapshot = cached(sd15_bundle, tmp_path, below)
    Bundle.load(snapshot, hashes=True)
    image = Pipeline.load(snapshot)("a cat", seed=1, output_type="np").images
    assert (image == Pipeline.load(sd15_bundle)("a cat", seed=1, output_type="np").images).all()


@pytest.mark.parametrize("target", ["models--other--bundle/blobs", "models--owner--bundle/refs", "elsewhere"])
def test_other_links_of_the_hubs_cache_are_rejected(target: str, sd15_bundle: Path, tmp_path: Path) -> None:
    """Contents of another repository, and everything else, stay out of reach; so does a blob that is a link itself."""
    snapshot = cached(sd15_bundle, tmp_path)
    blob = (snapshot / DATA).resolve()
    outside = tmp_path / target / "x"
    outside.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(blob, outside)
    blob.symlink_to(outside)
    assert "leads out" in refusal(lambda: Bundle.load(snapshot))
    blob.unlink()
    (snapshot / DATA).unlink()
    (snapshot / DATA).symlink_to(outside)
    assert "leads out" in refusal(lambda: Bundle.load(snapshot))


def test_a_folder_named_snapshots_is_no_cache(sd15_bundle: Path, tmp_path: Path) -> None:
    """Without the repository's name above it, links into a folder named blobs lead out."""
    snapshot = cached(sd15_bundle, tmp_path)
    moved = Path(shutil.move(snapshot.parents[1], tmp_path / "bundle"))
    assert "leads out" in refusal(lambda: Bundle.load(moved / "snapshots" / snapshot.name))


def test_linked_folders_that_leave_are_rejected(bundle: Path) -> None:
    """The same for a folder on the way to the file."""
    outside = bundle.parent / "text_encoder"
    shutil.move(bundle / "text_encoder", outside)
    (bundle / "text_encoder").symlink_to(outside, target_is_directory=True)
    assert "leads out" in refusal(lambda: Bundle.load(bundle))


def test_links_inside_the_folder_and_to_it_are_fine(bundle: Path) -> None:
    """Only leaving is rejected: a bundle may share files within, and may be reached through a link."""
    shutil.move(bundle / DATA, bundle / "shared.bin")
    (bundle / DATA).symlink_to("../shared.bin")
    alias = bundle.parent / "alias"
    alias.symlink_to(bundle, target_is_directory=True)
    Bundle.load(alias, hashes=True)


def test_links_in_a_circle_are_rejected(bundle: Path) -> None:
    """A link to itself is a damaged bundle, not a crash."""
    (bundle / DATA).unlink()
    (bundle / DATA).symlink_to("model.onnx_data")
    assert DATA in refusal(lambda: Bundle.load(bundle))


def test_names_too_long_for_the_system_are_rejected(bundle: Path) -> None:
    """A manifest may list what no disk can hold: that file is missing."""
    edit(bundle, lambda manifest: manifest["files"].update({"x" * 5000: {"size": 1, "sha256": "0" * 64}}))
    refusal(lambda: Bundle.load(bundle))


def test_names_with_line_breaks_do_not_break_the_line(bundle: Path) -> None:
    """The message quotes the file's name: that must not make two lines of it."""
    edit(bundle, lambda manifest: manifest["files"].update({"x\ny": {"size": 1, "sha256": "0" * 64}}))
    refusal(lambda: Bundle.load(bundle))


@pytest.mark.parametrize("content", [None, b"", b"\x80\x04\x95pickle", b"\x00" * 100, b"{}"], ids=repr)
def test_folders_without_a_manifest_are_rejected(bundle: Path, content: bytes | None) -> None:
    """No bundle.json, an empty one or binary garbage: the message names the file that is at fault."""
    (bundle / MANIFEST).unlink()
    if content is not None:
        (bundle / MANIFEST).write_bytes(content)
    assert str(bundle) in refusal(lambda: Bundle.load(bundle))


def test_a_manifest_that_is_a_folder_is_rejected(bundle: Path) -> None:
    """Reading it fails with an OSError that must not get through."""
    (bundle / MANIFEST).unlink()
    (bundle / MANIFEST).mkdir()
    assert MANIFEST in refusal(lambda: Bundle.load(bundle))


@pytest.mark.parametrize("kind", ["absent", "file", "empty folder", "nul"])
def test_what_is_no_folder_is_rejected_with_what_to_do(tmp_path: Path, kind: str) -> None:
    """A wrong path on the command line ends with the command that makes a bundle."""
    path = tmp_path / "bundle"
    if kind == "file":
        path.write_bytes(b"PK\x03\x04")
    elif kind == "empty folder":
        path.mkdir()
    message = refusal(lambda: Bundle.load("bun\0dle" if kind == "nul" else path))
    assert "is not a bundle" in message
    assert "hypersd export" in message


def test_paths_that_leave_are_rejected_by_path(sd15_bundle: Path) -> None:
    """``Bundle.path`` holds for any name, not only for those that the manifest was checked for."""
    bundle = Bundle.load(sd15_bundle)
    assert bundle.path(ONNX) == sd15_bundle / ONNX
    for name in ("../secret", "/etc/passwd", "unet/../../secret"):
        assert "leads out" in refusal(lambda name=name: bundle.path(name))


def test_unknown_components_are_named_with_those_there_are(sd15_bundle: Path) -> None:
    """A network that is not in the bundle: the message lists those that are."""
    message = refusal(lambda: Bundle.load(sd15_bundle).component("controlnet"))
    assert "'controlnet'" in message
    assert "text_encoder, unet, vae_decoder, vae_encoder" in message


@pytest.mark.parametrize("name", ["text_encoder", "unet", "vae_decoder"])
def test_bundles_without_a_needed_network_are_rejected(bundle: Path, name: str) -> None:
    """A manifest that lists too little is found on load, not at the first image."""
    edit(bundle, lambda manifest: manifest["components"].pop(name))
    assert name in refusal(lambda: Pipeline.load(bundle, backend="onnxruntime"))


def test_bundles_without_a_tokenizer_are_rejected(bundle: Path) -> None:
    """The same for the tokenizer, which no component lists."""
    edit(bundle, lambda manifest: manifest["files"].pop("tokenizer/tokenizer.json"))
    assert "tokenizer/tokenizer.json" in refusal(lambda: Pipeline.load(bundle, backend="onnxruntime"))


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"not json", b"\xff\xfe", b'{"version": "1.0",\n"model": 3}'], ids=repr
)
def test_tokenizers_that_are_none_are_rejected(bundle: Path, content: bytes) -> None:
    """The `tokenizers` library raises plain Exception: it must come out as a BundleError."""
    (bundle / "tokenizer/tokenizer.json").write_bytes(content)
    record(bundle, "tokenizer/tokenizer.json")
    assert "tokenizer.json" in refusal(lambda: Pipeline.load(bundle, backend="onnxruntime"))


# Hostile and mismatched graphs


@pytest.mark.parametrize(
    "content", [b"", b"\x08", b"not a protobuf at all" * 10, b"\x00" * 4096], ids=lambda c: str(len(c))
)
def test_corrupt_graphs_are_rejected(bundle: Path, content: bytes) -> None:
    """A graph that ONNX Runtime cannot read is a damaged bundle, said in one line."""
    (bundle / ONNX).write_bytes(content)
    record(bundle, ONNX)
    assert ONNX in refusal(lambda: Pipeline.load(bundle))


def test_cut_graphs_are_rejected(bundle: Path) -> None:
    """The same for half a graph, which protobuf may read a long way into."""
    content = (bundle / ONNX).read_bytes()
    (bundle / ONNX).write_bytes(content[: len(content) // 2])
    record(bundle, ONNX)
    assert ONNX in refusal(lambda: Pipeline.load(bundle))


def test_short_weights_with_a_matching_manifest_are_rejected(bundle: Path) -> None:
    """Weights cut short by someone who also mended the manifest: ONNX Runtime must not read past their end."""
    content = (bundle / DATA).read_bytes()
    (bundle / DATA).write_bytes(content[: len(content) // 2])
    record(bundle, DATA)
    refusal(lambda: Pipeline.load(bundle))


def relocate(bundle: Path, location: str) -> None:
    """Let the graph's weights lie at ``location``, and make the manifest agree with the graph."""
    model = onnx.load(bundle / ONNX, load_external_data=False)
    moved = 0
    for tensor in model.graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries:
            set_external_data_of(tensor, location, entries)
            moved += 1
    assert moved, "the graph has no external data: the test would prove nothing"
    (bundle / ONNX).write_bytes(model.SerializeToString())
    record(bundle, ONNX)


def set_external_data_of(tensor: onnx.TensorProto, location: str, entries: dict[str, str]) -> None:
    tensor.raw_data = b""  # set_external_data wants the field to be there
    set_external_data(tensor, location, offset=int(entries.get("offset", 0)), length=int(entries["length"]))
    tensor.ClearField("raw_data")


def test_relocated_weights_inside_the_folder_load(bundle: Path) -> None:
    """The control of the tests below: the way they edit a graph is sound, only the place is at fault there."""
    shutil.copy(bundle / DATA, bundle / "text_encoder/secret")
    relocate(bundle, "secret")
    record(bundle, "text_encoder/secret")
    edit(bundle, lambda manifest: manifest["components"]["text_encoder"]["files"].append("text_encoder/secret"))
    Pipeline.load(bundle)


@pytest.mark.parametrize("kind", ["parent", "outside", "absolute", "link", "linked folder"])
def test_graphs_that_read_outside_the_bundle_are_rejected(bundle: Path, kind: str) -> None:
    """Protects the files of whoever loads a stranger's bundle: weights come from the bundle or not at all.

    The file outside is there and would serve, so that it is the place that is rejected.
    """
    secret = bundle.parent / "secret"
    shutil.copy(bundle / DATA, secret)
    if kind == "link":
        (bundle / "text_encoder/link").symlink_to(secret)
    elif kind == "linked folder":
        (bundle / "text_encoder/link").symlink_to(secret.parent, target_is_directory=True)
    locations = {
        "parent": "../secret",
        "outside": "../../secret",
        "absolute": str(secret),
        "link": "link",
        "linked folder": "link/secret",
    }
    if kind == "parent":
        shutil.copy(secret, bundle / "secret")
    relocate(bundle, locations[kind])
    refusal(lambda: Pipeline.load(bundle))


def test_an_onnx_runtime_that_follows_any_place_is_not_given_such_graphs(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime 1.23, the last for Python 3.10, would read the file outside; 1.24 and newer reject it themselves."""
    monkeypatch.setattr(onnxruntime, "__version__", "1.23.2")
    Pipeline.load(bundle, "onnxruntime")
    shutil.copy(bundle / DATA, bundle / "secret")
    relocate(bundle, "../secret")
    assert "expected a file of its own component" in refusal(lambda: Pipeline.load(bundle, "onnxruntime"))


@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_graphs_with_other_names_than_the_manifest_are_rejected(bundle: Path, side: str) -> None:
    """A bundle put together from two is found on load, with both lists of names."""

    def rename(manifest: dict[str, Any]) -> None:
        tensors = manifest["components"]["unet"][side]
        tensors["other"] = tensors.popitem()[1]

    edit(bundle, rename)
    message = refusal(lambda: Pipeline.load(bundle))
    assert "unet/model.onnx" in message
    assert "'other'" in message


def test_another_networks_graph_is_rejected(bundle: Path) -> None:
    """The VAE's graph in the text encoder's place, with a manifest that agrees on its size."""
    for suffix in ("", "_data"):
        shutil.copy(bundle / f"vae_decoder/model.onnx{suffix}", bundle / f"text_encoder/model.onnx{suffix}")
        record(bundle, f"text_encoder/model.onnx{suffix}")
    message = refusal(lambda: Pipeline.load(bundle))
    assert "latent_sample" in message
    assert "input_ids" in message
