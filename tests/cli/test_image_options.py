"""`hypersd generate --image` as a person meets it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hypersd import Pipeline
from hypersd.cli import main
from hypersd.engines import Bundle

PROMPT = "a large red star on a blue background"


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A painted circle; its right half is transparent."""
    pixels = np.full((120, 160, 4), (200, 220, 250, 255), np.uint8)
    y, x = np.mgrid[:120, :160]
    pixels[(x - 80) ** 2 + (y - 60) ** 2 < 900, :3] = (220, 30, 40)
    pixels[:, 80:, 3] = 0
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


def generate(bundle: Path, output: Path, *words: object) -> Image.Image:
    assert main([str(word) for word in ("generate", bundle, PROMPT, "--seed", "1", "-o", output, *words)]) == 0
    return Image.open(output)


def test_the_start_is_said_and_kept(
    demo_bundle: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line tells what runs, the PNG keeps the settings, and the image is the pipeline's."""
    words = ["--image", photo, "--mask", "alpha", "--steps", "8", "--strength", "0.5", "--mask-blur", "2"]
    image = generate(demo_bundle, tmp_path / "out.png", *words, "--resize-mode", "stretch")
    settings = json.loads(image.info["hypersd"])
    assert (settings["image"], settings["mask_image"]) == ("photo.png", "photo.png's alpha")
    assert (settings["strength"], settings["mask_blur"], settings["resize_mode"]) == (0.5, 2, "stretch")
    assert "starts from photo.png (160x120) where photo.png's alpha is white, strength 0.5: 4 of 8 steps" in (
        capsys.readouterr().err
    )
    opened = Image.open(photo)
    mask = Image.new("L", opened.size)
    mask.paste(255, (80, 0, 160, 120))
    expected = Pipeline.load(demo_bundle)(
        PROMPT,
        image=opened,
        mask_image=mask,
        mask_blur=2,
        strength=0.5,
        num_inference_steps=8,
        resize_mode="stretch",
        seed=1,
    ).images[0]
    assert image.tobytes() == expected.tobytes()


def test_keep_steps_and_a_crop(demo_bundle: Path, photo: Path, tmp_path: Path) -> None:
    """A crop around the mask leaves the size of the init image."""
    mask = tmp_path / "mask.png"
    Image.new("L", (160, 120), 255).save(mask)
    words = ["--image", photo, "--strength", "0.3", "--keep-steps", "--steps", "4"]
    kept = generate(demo_bundle, tmp_path / "kept.png", *words)
    assert json.loads(kept.info["hypersd"])["keep_steps"] is True
    cropped = generate(demo_bundle, tmp_path / "crop.png", "--image", photo, "--mask", mask, "--padding-mask-crop", "8")
    assert (kept.size, cropped.size) == ((96, 96), (160, 120))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mask", "mask.png"], "--mask has no effect without --image"),
        (["--strength", "0.5"], "--strength has no effect without --image"),
        (["--keep-steps"], "--keep-steps has no effect without --image"),
        (["--image", "PHOTO", "--padding-mask-crop", "4"], "--padding-mask-crop has no effect without --mask"),
        (["--image", "missing.png"], "image 'missing.png' is not there: expected a file such as photo.jpg"),
        (["--resize-mode", "fill"], "--resize-mode fits images to the output: expected --image or --control-image"),
        (["--image", "PHOTO", "--one-graph"], "a one-graph has no --image"),
        (["--image", "PHOTO", "--strength", "2"], "strength 2.0 is out of range"),
        (["--image", "PHOTO"], "of 1 step leaves none: expected at least 1, or keep_steps=True (--keep-steps)"),
        (["--image", "OPAQUE", "--mask", "alpha"], "has no transparent pixel: give a mask's file"),
        (["--image", "TEXT"], "is not an image that can be read: expected PNG, JPEG, WebP or the like"),
    ],
)
def test_bad_options_are_one_line(
    words: list[str], message: str, demo_bundle: Path, photo: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    opaque, text = tmp_path / "opaque.png", tmp_path / "text.png"
    Image.new("RGB", (32, 32)).save(opaque)
    text.write_text("no image")
    named = {"PHOTO": photo, "OPAQUE": opaque, "TEXT": text}
    line = fails("generate", demo_bundle, PROMPT, "-o", tmp_path / "out.png", *(named.get(w, w) for w in words))
    assert message in line
    assert not (tmp_path / "out.png").exists()


def test_a_bundle_without_an_encoder_says_so(
    demo_bundle: Path, photo: Path, tmp_path: Path, copy_bundle: Callable[..., Bundle], fails: Callable[..., str]
) -> None:
    """The way out is the export without ``--text-only``."""
    components = {k: c for k, c in Bundle.load(demo_bundle).manifest.components.items() if k != "vae_encoder"}
    bundle = copy_bundle(demo_bundle, components=components).root
    line = fails("generate", bundle, PROMPT, "-o", tmp_path / "out.png", "--image", photo)
    assert "was exported without a VAE encoder: export it again without --text-only" in line
