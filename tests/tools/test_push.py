"""Bundles on a loopback Hub: pushed, found by name, fetched, and what goes wrong on the way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import preloaded
import pytest
from loopback_hub import LoopbackHub
from PIL import Image

from hypersd.engines import Bundle
from hypersd.engines.bundle import write_manifest
from hypersd.engines.hub_bundles import bundle_name, split_place
from hypersd.engines.manifest import FileRecord, Manifest
from hypersd.engines.specs import EngineTarget, Plan
from hypersd.tools.bundle_card import write_card
from hypersd.tools.verify_figures import ImageFigures, read_figures, write_figures

REPO = "acme/tiny-hyper"
BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    """An empty Hub; its token may write."""
    (tmp_path / "hub").mkdir()
    with LoopbackHub(tmp_path / "hub") as server:
        yield server


@pytest.fixture
def run(hub: LoopbackHub, tmp_path: Path):
    """``run(*words)``: the command line in a process of its own, logged in to the Hub."""

    def start(
        *words: object, token: str | None = None, fresh: bool = False, **env: str
    ) -> subprocess.CompletedProcess[str]:
        merged = {**os.environ, **hub.environment(tmp_path / "cache"), "HF_TOKEN": hub.token, **env}
        if token is not None:
            merged["HF_TOKEN"] = token
        if not fresh:
            return preloaded.run("-m", "hypersd.cli", *words, cwd=tmp_path, env=merged, timeout=300)
        command = [sys.executable, "-m", "hypersd.cli", *map(str, words)]
        return subprocess.run(command, cwd=tmp_path, env=merged, capture_output=True, text=True, timeout=300)

    return start


def one_line(done: subprocess.CompletedProcess[str], code: int) -> str:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


def test_a_bundle_is_pushed_and_generates_from_its_name(sd15_bundle: Path, hub: LoopbackHub, run) -> None:
    """Push, fetch, generate; then the same without the network, and the same image as the folder's."""
    pushed = run("push", sd15_bundle, REPO, "--private", fresh=True)
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.startswith(f"{hub.url}/{REPO}/commit/")
    assert hub.uploads.private == {REPO}
    sent = hub.uploads.received
    assert run("push", sd15_bundle, REPO).returncode == 0
    assert hub.uploads.received == sent, "objects that the Hub has are not sent again"

    for offline, name in ("0", "hub.png"), ("1", "offline.png"):
        words = ["--seed", 3, "-o", name]
        done = run("generate", REPO, "a photo of a cat", *words, HF_HUB_OFFLINE=offline)
        assert done.returncode == 0, done.stderr
    assert run("generate", sd15_bundle, "a photo of a cat", "--seed", 3, "-o", "folder.png").returncode == 0
    pixels = [Image.open(hub.root.parent / name).tobytes() for name in ("hub.png", "offline.png", "folder.png")]
    assert pixels[0] == pixels[1] == pixels[2]
    commit = hub.commit(REPO)
    shown = run("info", f"{REPO}@{commit}", "--hashes")
    assert shown.returncode == 0, shown.stderr
    assert "sizes and SHA-256 of all files match" in shown.stdout


def test_an_interrupted_push_continues(sd15_bundle: Path, hub: LoopbackHub, run) -> None:
    """Objects that arrived stay; without a commit there is no half bundle."""
    hub.uploads.fail_after = 2
    assert "the same command continues" in one_line(run("push", sd15_bundle, REPO), 1)
    assert not hub.files(REPO)
    hub.uploads.fail_after = None
    first = hub.uploads.received
    assert run("push", sd15_bundle, REPO).returncode == 0
    assert hub.uploads.received > first
    assert hub.uploads.received == sum(map(len, hub.uploads.objects.values()))


def test_refusals_in_one_line(sd15_bundle: Path, hub: LoopbackHub, run) -> None:
    assert "log in with `hf auth login`" in one_line(run("push", sd15_bundle, REPO, token="hf_wrong"), 2)
    assert "expected OWNER/NAME" in one_line(run("push", sd15_bundle, "tiny-hyper"), 2)
    assert "HF_HUB_OFFLINE is set" in one_line(run("push", sd15_bundle, REPO, HF_HUB_OFFLINE="1"), 1)
    missing = one_line(run("info", "acme/other"), 2)
    assert "there is no folder acme/other, and" in missing
    assert "acme/other (404)" in missing
    offline = one_line(run("info", "acme/other", HF_HUB_OFFLINE="1"), 1)
    assert "there is no folder acme/other, and HF_HUB_OFFLINE is set" in offline


def test_a_file_that_is_not_the_manifests_is_found_out(sd15_bundle: Path, hub: LoopbackHub, run) -> None:
    """Somebody replaced one file of the repository."""
    shutil.copytree(sd15_bundle, hub.root / REPO)
    file = hub.root / REPO / "tokenizer/tokenizer.json"
    text = file.read_bytes()
    file.write_bytes(text[:-1] + b" ")
    message = one_line(run("info", REPO), 2)
    assert f"tokenizer/tokenizer.json of {REPO} is not the file that its bundle.json names" in message


def test_only_plans_that_can_run_here_are_fetched(copy_bundle, sd15_bundle: Path, hub: LoopbackHub, run) -> None:
    """A plan for another machine stays on the Hub, and the bundle is whole without it."""
    bundle = copy_bundle(sd15_bundle)
    plan = "engines/other/unet.engine"
    (bundle.root / plan).parent.mkdir(parents=True)
    (bundle.root / plan).write_bytes(b"x" * 5000)
    manifest = with_target(bundle.manifest, plan, 5000)
    write_manifest(bundle.root, manifest)
    shutil.copytree(bundle.root, hub.root / REPO)
    shown = run("info", REPO)
    assert shown.returncode == 0, shown.stderr
    assert "does not run here" in shown.stdout
    assert hub.bytes_sent(plan) == 0
    assert hub.bytes_sent("unet/model.onnx") > 0


def with_target(manifest: Manifest, file: str, size: int) -> Manifest:
    """The manifest with a target of one plan, for a GPU that no machine has."""
    record = FileRecord(size=size, sha256="0" * 64)
    target = EngineTarget(
        backend="tensorrt-rtx", version="0.0.0.0", platform="none", precision="fp32", shapes=manifest.shapes,
        compute_capabilities=("9.9",),
        plans={"unet": Plan(file=file, onnx="0" * 64, key="0" * 64, seconds=1.0, host_memory=1)},
    )  # fmt: skip
    return msgspec.structs.replace(manifest, engines={"other": target}, files={**manifest.files, file: record})


@pytest.mark.parametrize(
    ("place", "found"),
    [
        ("acme/model", ("acme/model", None)),
        ("acme/model@main", ("acme/model", "main")),
        ("acme/model@refs/pr/1", ("acme/model", "refs/pr/1")),
        ("model", None),
        ("./acme/model", None),
        ("/acme/model", None),
        ("acme/model/unet", None),
        ("here/model", None),
    ],
)
def test_places(place: str, found: tuple[str, str | None] | None, tmp_path: Path, monkeypatch) -> None:
    """A folder ``here`` makes ``here/model`` a folder's name: a misspelt folder is not looked for on the Hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert split_place(place) == found
    assert bundle_name(place) == ("model" if found else None)


def test_the_card_says_what_it_is(sd15_bundle: Path, tmp_path: Path) -> None:
    """Use, settings, sources, licence, and the figures of this very bundle."""
    bundle = Bundle.load(sd15_bundle)
    images = [ImageFigures(prompt="a | cat", seed=0, psnr=101.25, largest=1e-5)]
    write_figures(tmp_path / "figures.json", bundle, "onnxruntime", images)
    card = write_card(REPO, bundle.manifest, "openrail", read_figures(tmp_path / "figures.json", bundle))
    front, _, body = card.removeprefix("---\n").partition("\n---\n")
    fields = {line.partition(": ")[0]: json.loads(line.partition(": ")[2]) for line in front.splitlines()}
    assert fields["license"] == "openrail"
    assert fields["pipeline_tag"] == "text-to-image"
    assert "base_model" not in fields, "the base is a folder here, which is nobody else's affair"
    assert str(Path(bundle.manifest.origin.base).parent) not in card
    assert f'Pipeline.load("{REPO}")' in body
    assert "| a \\| cat | none | noise | 0 | 101.2 | 1.0e-05 |" in body
    other = msgspec.structs.replace(bundle.manifest, checkpoint="Hyper-SD15-2steps-lora")
    assert "Verification" not in write_card(REPO, other)


def test_figures_of_another_bundle_are_left_out(sd15_bundle: Path, copy_bundle, tmp_path: Path) -> None:
    other = copy_bundle(sd15_bundle, eta=0.5)
    write_figures(tmp_path / "figures.json", other, "onnxruntime", [])
    assert read_figures(tmp_path / "figures.json", Bundle.load(sd15_bundle)) is None
    assert read_figures(tmp_path / "missing.json", other) is None


@pytest.mark.parametrize("kind", ["plain", "inpainting", "controlled"])
def test_the_cards_python_runs(
    kind: str,
    export_tiny: Callable[[str], Path],
    export_inpainting: Callable[[str], Path],
    export_controlled: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the images that the bundle takes, in files of the names that it gives them."""
    export = {"plain": export_tiny, "inpainting": export_inpainting, "controlled": export_controlled}[kind]
    root = export("Hyper-SD15-1step-lora")
    card = write_card(str(root), Bundle.load(root).manifest)
    code = card.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    for name in ("photo.png", "mask.png"):
        Image.linear_gradient("L").save(name)
    made: dict[str, Any] = {}
    exec(code, made)
    assert made["image"].size == (64, 64)
    assert ("mask_image" in code, "control_image" in code) == (kind == "inpainting", kind == "controlled")
