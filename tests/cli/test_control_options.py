"""`hypersd export --controlnet` and `hypersd generate --control-image` as a person meets them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hypersd import Pipeline
from hypersd.cli import main

UNIFIED = "Hyper-SD15-1step-lora"


@pytest.fixture
def bundle(export_controlled: Callable[[str], Path]) -> Path:
    """A bundle with the ControlNets `canny` and `scribble`, whose names are not known ones."""
    return export_controlled(UNIFIED)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path / "photo.jpg"
    Image.fromarray(rng.integers(0, 255, (48, 80, 3), dtype=np.uint8)).save(path)
    return path


def generate(bundle: Path, output: Path, *words: object) -> Image.Image:
    assert main([str(word) for word in ("generate", bundle, "a cat", "--seed", "1", "-o", output, *words)]) == 0
    return Image.open(output)


def test_what_was_done_is_said_and_kept(
    bundle: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line tells what the ControlNet follows; the PNG keeps the settings; --save-control shows what it saw."""
    words = ["--control-image", f"canny={photo}", "--preprocess", "canny", "--control-scale", "0.5"]
    words += [
        "--canny-low",
        "50",
        "--canny-high",
        "120",
        "--save-control",
        "--control-end",
        "canny=0.9",
        "--steps",
        "8",
    ]
    image = generate(bundle, tmp_path / "out.png", *words)
    settings = json.loads(image.info["hypersd"])
    assert settings["controlnet_conditioning_scale"] == {"canny": 0.5}
    assert settings["control_guidance_end"] == {"canny": 0.9}
    assert settings["control_image"] == {"canny": "photo.jpg"}, "the name alone: folders are nobody's business"
    assert settings["preprocess"] == {"canny": "canny 50 120"}
    seen = Image.open(tmp_path / "out-control-canny.png")
    assert seen.size == (64, 64)
    assert set(np.unique(np.asarray(seen))) == {0, 255}
    assert "canny follows" in capsys.readouterr().err


def test_images_in_the_bundles_order_or_by_name(bundle: Path, photo: Path, tmp_path: Path) -> None:
    """A value for each ControlNet, in order or with NAME=, in any order, is the same image."""
    other = tmp_path / "a=b.png"
    Image.new("RGB", (64, 64), "white").save(other)
    ordered = ["--control-image", photo, "--control-image", other, "--control-scale", "1", "--control-scale", "0.5"]
    named = ["--control-image", f"scribble={other}", "--control-image", f"canny={photo}"]
    named += ["--control-scale", "scribble=0.5", "--control-scale", "canny=1"]
    images = [generate(bundle, tmp_path / f"{i}.png", *words) for i, words in enumerate((ordered, named))]
    assert images[0].tobytes() == images[1].tobytes()
    swapped = ["--control-image", other, "--control-image", photo]
    assert generate(bundle, tmp_path / "2.png", *swapped).tobytes() != images[0].tobytes()


def test_the_whole_count_follows_one_image(bundle: Path, photo: Path, tmp_path: Path) -> None:
    """--count generates each seed under the same control, as the pipeline does."""
    control = ["--control-image", f"canny={photo}", "--resize-mode", "stretch"]
    assert (
        main(
            [
                str(w)
                for w in ("generate", bundle, "a cat", "--seed", 1, "--count", 2, "-o", tmp_path / "n.png", *control)
            ]
        )
        == 0
    )
    image = {"canny": Image.open(photo)}
    expected = Pipeline.load(bundle)("a cat", seed=2, control_image=image, resize_mode="stretch").images[0]
    assert Image.open(tmp_path / "n-1.png").tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--control-image", "nowhere.png"], "1 for 2 ControlNets"),
        (["--control-image", "canny=nowhere.png"], "nowhere.png"),
        (["--control-image", "depth=PHOTO"], "canny, scribble"),
        (["--control-image", "canny=PHOTO", "--control-image", "canny=PHOTO"], "two values"),
        (["--control-image", "canny=PHOTO", "--control-image", "PHOTO"], "NAME="),
        (
            ["--control-image", "canny=PHOTO", "--control-scale", "1", "--control-scale", "1", "--control-scale", "1"],
            "3 for 2",
        ),
        (["--control-image", "canny=PHOTO", "--control-scale", "-1"], "-1"),
        (["--control-image", "canny=PHOTO", "--control-scale", "nan"], "nan"),
        (["--control-image", "canny=PHOTO", "--control-start", "0.6", "--control-end", "0.5"], "before the end"),
        (["--control-image", "canny=PHOTO", "--preprocess", "canny", "--canny-low", "300"], "300 and 200"),
        (["--control-image", "canny=TEXT"], "not an image"),
        (["--control-scale", "0.5"], "--control-image"),
        (["--save-control"], "--control-image"),
        (["--canny-low", "5"], "--canny-low"),
        (["--resize-mode", "crop"], "--resize-mode"),
        (["--control-image", "canny=PHOTO", "--control-scale", "scribble=1"], "scribble=FILE"),
        (["--control-image", "canny=" + "x" * 300], "is not there"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be(
    words: list[str], said: str, bundle: Path, photo: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    """Each ends with one line that names the option, the file or the number."""
    text = tmp_path / "text.png"
    text.write_text("no image")
    words = [word.replace("PHOTO", str(photo)).replace("TEXT", str(text)) for word in words]
    line = fails("generate", bundle, "a cat", "-o", tmp_path / "out.png", *words)
    assert said in line
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("size", ["104x96", "9000x9000"])
def test_a_size_that_cannot_be_is_not_the_images_fault(
    size: str, bundle: Path, photo: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    """The size is rejected as without an image, before anything is fitted or written."""
    words = ["--size", size, "--control-image", f"canny={photo}", "--save-control", "-o", tmp_path / "out.png"]
    assert "outside this bundle's 64" in fails("generate", bundle, "a cat", *words)
    assert not list(tmp_path.glob("out*"))


def test_what_is_saved_takes_no_place_of_what_is_read(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A user saves edges, edits them and generates again; the edited file is not overwritten."""
    edited = tmp_path / "out-control-canny.png"
    Image.new("RGB", (64, 64)).save(edited)
    before = edited.read_bytes()
    words = ["--control-image", f"canny={edited}", "--preprocess", "none", "--save-control", "-o", tmp_path / "out.png"]
    assert main([str(word) for word in ("generate", bundle, "a cat", *words)]) == 2
    assert "would overwrite" in capsys.readouterr().err
    assert edited.read_bytes() == before


@pytest.mark.parametrize("words", [["--control-end", "0.5"], ["--control-start", "0.1"]])
def test_a_controlnet_that_never_acts_is_told(
    words: list[str], bundle: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one step no half can be left out: the window would be without effect, and nobody would know."""
    one_step = ["--steps", "1", "--control-image", f"canny={photo}", *words]
    image = generate(bundle, tmp_path / "out.png", *one_step)
    assert "canny has no effect" in capsys.readouterr().err
    assert image.tobytes() == generate(bundle, tmp_path / "plain.png", "--steps", "1").tobytes()
    generate(bundle, tmp_path / "out.png", *one_step[:-2])
    assert "no effect" not in capsys.readouterr().err


def test_without_opencv_it_is_said_before_engines_are_loaded(
    bundle: Path, photo: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]
) -> None:
    """Loading takes minutes at full size."""
    monkeypatch.setitem(sys.modules, "cv2", None)
    monkeypatch.setattr(Pipeline, "load", lambda *_, **__: pytest.fail("loaded first"))
    line = fails("generate", bundle, "a cat", "--control-image", f"canny={photo}", "--preprocess", "canny")
    assert "pip install -e '.[control]'" in line


def test_a_bundle_without_controlnet(sd15_bundle: Path, photo: Path, fails: Callable[..., str]) -> None:
    """Asked for one it says which option of the export would have brought it."""
    assert "--controlnet" in fails("generate", sd15_bundle, "a cat", "--control-image", photo)


@pytest.mark.parametrize("value", ["lines", "canny=lines"])
def test_a_preprocess_that_is_none(value: str, bundle: Path, fails: Callable[..., str]) -> None:
    """The three that there are are named."""
    assert "canny, scribble, none" in fails("generate", bundle, "a cat", "--preprocess", value)


def test_info_tells_of_controlnets(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each ControlNet's origin, settings and components; residuals take one line."""
    assert main(["info", str(bundle)]) == 0
    text = capsys.readouterr().out
    for expected in ("sd-controlnet-scribble", "scale 1", "controlnet/canny", "controlnet_cond_embedding/scribble"):
        assert expected in text
    assert text.count("down_block_additional_residual") == 1


def test_list_tells_of_known_controlnets(capsys: pytest.CaptureFixture[str]) -> None:
    """The recommended strength of SDXL's canny is half of the others'."""
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    (row,) = [line.split() for line in text.splitlines() if "diffusers/controlnet-canny-sdxl-1.0" in line.split()]
    assert row[1:] == ["SDXL", "0.5", "canny"]


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("diffusers/controlnet-canny-sdxl-1.0", "SDXL"),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5/unet", "UNet2DConditionModel"),
        ("nowhere", "config.json"),
    ],
)
def test_export_with_what_is_no_controlnet_of_its_family(
    where: str, said: str, tiny_repos: Path, export_arguments: list[str], tmp_path: Path, fails: Callable[..., str]
) -> None:
    """The folder is named, and what it holds; nothing is written."""
    (tmp_path / "nowhere").mkdir()
    place = tmp_path / "nowhere" if where == "nowhere" else tiny_repos / where
    line = fails(*export_arguments, "--controlnet", place, "--out", tmp_path / "bundle", "--backend", "none")
    assert said in line
    assert str(place) in line
    assert not (tmp_path / "bundle").exists()


def test_export_with_two_of_one_name(
    tiny_repos: Path, export_arguments: list[str], tmp_path: Path, fails: Callable[..., str]
) -> None:
    """It says how to tell them apart."""
    place = tiny_repos / "lllyasviel/sd-controlnet-scribble"
    assert "NAME=WHERE" in fails(*export_arguments, "--controlnet", place, "--controlnet", place, "--backend", "none")
