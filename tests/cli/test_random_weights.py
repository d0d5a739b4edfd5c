"""`hypersd export --random-weights`, and what the other commands make of such a bundle."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import small_architectures
from PIL import Image

from hypersd.cli import main

NAME = "Hyper-SD15-1step-lora"
EXPORT = ("export", "--ckpt", NAME, "--random-weights", "--backend", "none")


@pytest.fixture
def small_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of caches, in which random weights are small ones."""
    monkeypatch.setattr("hypersd.export.random_weights.PUBLISHED", small_architectures.SMALL)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def random_bundle(bundles_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A bundle that the command exported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hypersd.export.random_weights.PUBLISHED", small_architectures.SMALL)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        out = bundles_folder / f"{NAME}-random-cli"
        assert main([*EXPORT, "--precision", "fp32", "--out", str(out)]) == 0
        yield out


def test_export_says_what_it_writes_and_what_comes_next(
    random_bundle: Path, small_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Gigabytes appear in a folder that the user did not name: their place and size are printed."""
    assert main([*EXPORT, "--precision", "fp32", "--out", str(random_bundle), "--replace"]) == 0
    captured = capsys.readouterr()
    assert f"random weights for SD1.5 are written to {small_weights / 'hypersd/random-weights'}" in captured.err
    assert "random weights: unet" in captured.err
    assert f"measure with: hypersd bench {random_bundle}" in captured.out
    assert "hypersd generate" not in captured.out


def test_info_says_it_first(random_bundle: Path, sd15_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The user of a bundle learns at once that its images are noise; real bundles have no such line."""
    assert main(["info", str(random_bundle)]) == 0
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert NAME in first
    assert "random weights" in second
    assert "images are noise" in second
    assert main(["info", str(sd15_bundle)]) == 0
    assert "random weights" not in capsys.readouterr().out


def test_generate_rejects_it_unless_it_is_allowed(
    random_bundle: Path, sd15_bundle: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    """Nobody waits for noise by accident, and an image of noise says what it is."""
    words = ["generate", random_bundle, "a cat", "--seed", "1", "-o", tmp_path / "cat.png"]
    line = fails(*words)
    assert "has random weights, its images are noise" in line
    assert "--allow-random-weights" in line
    assert list(tmp_path.iterdir()) == []
    assert main([*map(str, words), "--allow-random-weights"]) == 0
    assert json.loads(Image.open(tmp_path / "cat.png").info["hypersd"])["random_weights"] is True
    assert main(["generate", str(sd15_bundle), "a cat", "--seed", "1", "-o", str(tmp_path / "real.png")]) == 0
    assert "random_weights" not in json.loads(Image.open(tmp_path / "real.png").info["hypersd"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--base", "a/b"], "cannot be combined with --base"),
        (["--revision", "main"], "cannot be combined with --revision"),
        (["--variant", "fp16"], "cannot be combined with --variant"),
        (["--lora", "x.safetensors"], "cannot be combined with --lora '"),
        (["--lora-scale", "0.5"], "cannot be combined with --lora-scale"),
        (["--vae", "a/b"], "--random-weights takes no --vae but tiny"),
        (["--ckpt", "Hyper-Demo15-1step-lora"], "has weights, small ones in the clone"),
    ],
)
def test_clashes_are_one_line_and_write_nothing(
    arguments: list[str], expected: str, small_weights: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    """An option without effect is a mistake that would show after gigabytes only."""
    assert expected in fails(*EXPORT, "--out", tmp_path / "bundle", *arguments)
    assert list(tmp_path.iterdir()) == []
