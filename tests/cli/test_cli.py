"""The command line as a user sees it: results, one-line errors, exit codes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from hypersd import Pipeline
from hypersd.cli import COMMANDS, main
from hypersd.export.checkpoints import CHECKPOINTS, DEMO_CHECKPOINTS

REPO = Path(__file__).parents[2]


def test_list_names_every_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    """Every row is one line with base, steps and sampler; the clone's own stand apart, below, under their heading."""
    assert main(["list"]) == 0
    published, heading, demo = capsys.readouterr().out.partition("Demonstration checkpoints")
    assert heading
    for checkpoints, text in (CHECKPOINTS, published), (DEMO_CHECKPOINTS, demo):
        for checkpoint in checkpoints:
            (row,) = [line.split() for line in text.splitlines() if checkpoint.name in line.split()]
            assert checkpoint.base in row
            assert checkpoint.sampler in row
    assert "Hyper-Demo" not in published
    assert "Hyper-SD" not in demo


def test_info_shows_the_contents_of_a_bundle(sdxl_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Settings, components with their tensors, sizes; --hashes reads every file."""
    assert main(["info", str(sdxl_bundle), "--hashes"]) == 0
    text = capsys.readouterr().out
    for expected in ("Hyper-SDXL-1step-lora", "tcd", "64 x 64", "text_encoder_2", "time_ids float32[1, 6]", "SHA-256"):
        assert expected in text


def test_generate_writes_an_image_with_its_settings(
    sd15_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file is a PNG of the right size; its metadata are enough to generate it again, in any script."""
    prompt = 'a "cat" 猫 😀\nin two lines'
    output = tmp_path / "new" / "cat.png"
    assert (
        main(["generate", str(sd15_bundle), prompt, "--steps", "4", "--eta", "0.3", "--seed", "9", "-o", str(output)])
        == 0
    )
    with Image.open(output) as image:
        assert image.format == "PNG"
        assert image.size == (64, 64)
        settings = json.loads(image.info["hypersd"])
    expected = {"prompt": prompt, "seed": 9, "num_inference_steps": 4, "eta": 0.3, "guidance_scale": 0.0, "width": 64}
    assert expected.items() <= settings.items()
    out = capsys.readouterr().out
    for stage in ("tokenize", "encode", "denoise", "decode", "convert", "total"):
        assert stage in out
    assert [path.name for path in output.parent.iterdir()] == ["cat.png"], "no temporary file stays"


def test_generate_reads_the_manifest_once(sd15_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checking a bundle takes a look at every file of it: once is enough."""
    reads, read_bytes = [], Path.read_bytes

    def counted(path: Path) -> bytes:
        reads.append(path.name)
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", counted)
    assert main(["generate", str(sd15_bundle), "a cat", "--count", "2", "-o", str(tmp_path / "cat.png")]) == 0
    assert reads.count("bundle.json") == 1


def test_count_makes_a_contact_sheet_of_single_images(
    sd15_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Image i of --count is the image of seed SEED+i alone; the sheet shows all."""
    several, alone = tmp_path / "several.png", tmp_path / "alone.png"
    assert main(["generate", str(sd15_bundle), "a cat", "--seed", "3", "--count", "3", "-o", str(several)]) == 0
    assert re.search(r"the first \d+\.\d{3}; later ones \d+\.\d{3}\n", capsys.readouterr().err)
    assert main(["generate", str(sd15_bundle), "a cat", "--seed", "5", "-o", str(alone)]) == 0
    assert "the first" not in capsys.readouterr().err
    names = sorted(path.name for path in tmp_path.glob("several*"))
    assert names == ["several-0.png", "several-1.png", "several-2.png", "several-sheet.png"]
    last = Image.open(tmp_path / "several-2.png")
    assert last.tobytes() == Image.open(alone).tobytes()
    sheet = Image.open(tmp_path / "several-sheet.png")
    assert sheet.width > 2 * 64
    assert sheet.crop((4, 4, 68, 68)).tobytes() == Image.open(tmp_path / "several-0.png").tobytes()


@pytest.fixture
def hypersd(monkeypatch: pytest.MonkeyPatch) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``hypersd(*argv, stdout=...)``: the command in a process of its own, whose output is buffered as usual."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)

    def run(*argv: object, **streams: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "hypersd.cli", *map(str, argv)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
        return subprocess.run(command, text=True, timeout=60, **pipes)

    return run


@pytest.fixture
def no_reader() -> Iterator[int]:
    """The end of a pipe to write to, whose other end is closed."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@pytest.mark.parametrize("words", [["list"], ["info"], ["--help"]])
def test_a_reader_that_closes_the_pipe(words: list[str], sd15_bundle: Path, hypersd, no_reader: int) -> None:
    """``hypersd info b | head -1`` is no failure."""
    done = hypersd(*words, *([sd15_bundle] if words == ["info"] else []), stdout=no_reader)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("words", [["list"], ["info"], ["--help"]])
def test_output_that_cannot_be_written(words: list[str], sd15_bundle: Path, hypersd) -> None:
    """One line on stderr that does not call it a bug."""
    with open("/dev/full", "w") as full:
        done = hypersd(*words, *([sd15_bundle] if words == ["info"] else []), stdout=full.fileno())
    assert done.returncode == 1
    assert done.stderr == "hypersd: error: the output cannot be written: No space left on device\n"


def test_progress_that_nobody_reads(sd15_bundle: Path, tmp_path: Path, hypersd, no_reader: int) -> None:
    """The image is generated although stderr has no reader."""
    done = hypersd("generate", sd15_bundle, "a cat", "-o", tmp_path / "cat.png", stderr=no_reader)
    assert done.returncode == 0
    assert "cat.png" in done.stdout


def test_narrow_terminals_cut_no_names(
    sdxl_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long names are broken, not cut; checkpoint names, which users copy, break only at the end of a line."""
    monkeypatch.setattr("hypersd.cli.console.PIPE_WIDTH", 60)
    assert main(["info", str(sdxl_bundle)]) == 0
    assert "…" not in capsys.readouterr().out
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert "…" not in out
    assert {checkpoint.name for checkpoint in (*CHECKPOINTS, *DEMO_CHECKPOINTS)} <= set(out.split())


@pytest.mark.parametrize("command", ["build", "info", "generate", "verify"])
def test_an_empty_bundle_name(command: str, fails: Callable[..., str]) -> None:
    """An empty name would mean the current folder."""
    assert "the name is empty" in fails(command, "", *(["a cat"] if command == "generate" else []))


def test_a_missing_extra(monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]) -> None:
    """The line installs it from the clone: there is no hypersd on PyPI."""

    def run(_: object) -> None:
        raise ModuleNotFoundError("No module named 'diffusers'", name="diffusers")

    monkeypatch.setattr("hypersd.cli.verify.run", run)
    line = fails("verify", "somewhere")
    assert line.endswith("diffusers is not installed; in the clone: pip install -e '.[export]'")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--steps", "9"], "1 to 8"),
        (["--steps", "0"], "1 to 1000"),
        (["--steps", "x"], "invalid int"),
        (["--eta", "1.5"], "0 to 1"),
        (["--eta", "nan"], "0 to 1"),
        (["--guidance-scale", "-1"], "0 to 50"),
        (["--guidance-scale", "inf"], "0 to 50"),
        (["--seed", "-1"], "0 to"),
        (["--seed", str(2**64)], "0 to"),
        (["--count", "0"], "1 to 1000"),
        (["--size", "64x60"], "multiple of 8"),
        (["--size", "128x64"], "--size"),
        (["--size", "big"], "WIDTHxHEIGHT"),
        (["--timesteps", "5", "10"], "descending"),
        (["--device", "tpu"], "cpu"),
        (["--device", "cuda:99"], "cpu"),
        (["--seed", str(2**63 - 1), "--count", "2"], "--seed"),
        (["-o", "image.bmp"], ".png"),
        (["--nonsense"], "--help"),
    ],
)
def test_bad_arguments_of_generate(
    arguments: list[str], expected: str, sd15_bundle: Path, tmp_path: Path, fails: Callable[..., str], monkeypatch
) -> None:
    """Each ends with one line that names what was expected; no image is written."""
    monkeypatch.chdir(tmp_path)
    assert expected in fails("generate", sd15_bundle, "a cat", *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [["--timesteps", "999", "500"], ["--steps", "4", "--eta", "0.2"], ["--steps", "9", "--force"], []],
)
def test_metadata_generate_the_image_again(arguments: list[str], sd15_bundle: Path, tmp_path: Path) -> None:
    """The metadata as arguments of a pipeline give the same pixels."""
    output = tmp_path / "a.png"
    assert main(["generate", str(sd15_bundle), "a cat", *arguments, "--seed", "4", "-o", str(output)]) == 0
    with Image.open(output) as image:
        settings = json.loads(image.info["hypersd"])
        pixels = image.tobytes()
    for name in ("checkpoint", "base", "vae", "lora_scale", "precision", "sampler"):
        settings.pop(name, None)
    assert Pipeline.load(sd15_bundle)(**settings, force=True).images[0].tobytes() == pixels


def test_force_generates_with_other_steps(sd15_bundle: Path, tmp_path: Path) -> None:
    """--force allows steps that the checkpoint was not distilled for."""
    assert main(["generate", str(sd15_bundle), "a cat", "--steps", "9", "--force", "-o", str(tmp_path / "a.png")]) == 0


def test_empty_and_long_prompts(sd15_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An empty prompt is valid; a long one is cut off with a one-line warning that names the lost words."""
    assert main(["generate", str(sd15_bundle), "", "-o", str(tmp_path / "empty.png")]) == 0
    assert "warning" not in capsys.readouterr().err
    assert main(["generate", str(sd15_bundle), "cat " * 80 + "猫", "-o", str(tmp_path / "long.png")]) == 0
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert "猫" in warning


def test_a_folder_that_is_not_a_bundle(tmp_path: Path, fails: Callable[..., str]) -> None:
    """A missing folder, an empty one and a file are answered with what makes a bundle."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name in ("missing", "empty", "file"):
        for command in (["info"], ["generate"], ["verify"]):
            words = [*command, tmp_path / name, *(["a cat"] if command == ["generate"] else [])]
            assert "hypersd export" in fails(*words)


def test_a_damaged_bundle(sd15_bundle: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    """A missing, shortened or altered file and a newer manifest are reported before anything is generated."""
    bundle = tmp_path / "bundle"
    data = bundle / "unet/model.onnx_data"

    def fresh() -> None:
        shutil.rmtree(bundle, ignore_errors=True)
        shutil.copytree(sd15_bundle, bundle)

    fresh()
    data.unlink()
    assert "missing" in fails("generate", bundle, "a cat")
    fresh()
    data.write_bytes(data.read_bytes()[:-1])
    assert "bytes" in fails("generate", bundle, "a cat")
    fresh()
    content = bytearray(data.read_bytes())
    content[100] ^= 1
    data.write_bytes(content)
    assert "altered" in fails("info", bundle, "--hashes")
    fresh()
    manifest = bundle / "bundle.json"
    manifest.write_text(manifest.read_text().replace('"schema_version": 5', '"schema_version": 6'))
    assert "upgrade hypersd" in fails("generate", bundle, "a cat")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--ckpt", "Hyper-SDLX-1step-lora"], "Hyper-SDXL-1step-lora"),
        (["--ckpt", "sd-turbo"], "hypersd list"),
        (["--ckpt", "Hyper-FLUX.1-dev-8steps-lora"], "FLUX"),
        (["--revision", "main"], "--revision"),
        (["--size", "128x128", "--dynamic", "height=64:64:256"], "one of the two"),
        (["--size", "64x100"], "multiple of 8"),
        (["--size", "8x64"], "64 to 4096"),
        (["--batch", "0"], "1 to 64"),
        (["--dynamic", "depth=1:2:3"], "MIN:OPT:MAX"),
        (["--dynamic", "height=128:64:256"], "MIN <= OPT <= MAX"),
        (["--precision", "int4"], "fp16"),
        (["--lora-scale", "nan"], "lora_scale"),
        (["--base", "no/such/folder"], "--base"),
        (["--lora", "missing.safetensors"], "--lora"),
    ],
)
def test_bad_arguments_of_export(
    arguments: list[str], expected: str, export_arguments: list[str], tmp_path: Path, fails: Callable[..., str]
) -> None:
    """Each ends with one line before anything is written."""
    out = tmp_path / "bundles" / "one"
    assert expected in fails(*export_arguments, "--out", out, *arguments)
    assert not out.exists()
    assert not list(tmp_path.rglob("*.onnx"))


@pytest.mark.parametrize("damage", ["truncated", "random", "empty", "pickle"])
def test_damaged_lora(damage: str, export_arguments: list[str], tmp_path: Path, fails: Callable[..., str]) -> None:
    """A weight file that is not a whole safetensors file is named, whatever it is instead."""
    lora = Path(export_arguments[-1])
    content = {
        "truncated": lora.read_bytes()[:-100],
        "random": bytes(range(256)) * 40,
        "empty": b"",
        "pickle": b"\x80\x02}q\x00.",
    }[damage]
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(content)
    assert str(bad) in fails(*export_arguments[:-1], bad, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_lora_of_the_other_family(
    export_arguments: list[str], tiny_repos: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    """The LoRA's family is recognised before minutes are spent."""
    lora = tiny_repos / "ByteDance/Hyper-SD/Hyper-SDXL-1step-lora.safetensors"
    line = fails(*export_arguments[:-1], lora, "--out", tmp_path / "out")
    assert "LoRA for SDXL" in line
    assert not list(tmp_path.rglob("*.onnx"))


def test_debug_shows_the_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--debug adds where an error came from."""
    assert main(["info", str(tmp_path), "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_debug_before_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--debug works on either side of the command."""
    assert main(["--debug", "info", str(tmp_path)]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_wrong_output_is_reported_before_any_download(tmp_path: Path, fails: Callable[..., str]) -> None:
    """Gigabytes are not fetched for a bundle that has no place: with no network this would be another error."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/todo.txt").write_text("keep")
    assert "not a bundle" in fails("export", "--ckpt", "Hyper-SD15-1step-lora", "--out", tmp_path / "notes")
    assert "--base" in fails("export", "--ckpt", "Hyper-SD15-1step-lora", "--base", "/nope", "--out", tmp_path / "new")


def test_a_bug_ends_with_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Other errors have another exit code, also in one line."""
    from hypersd.engines.bundle import Bundle

    def broken(*_: object, **__: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(Bundle, "load", broken)
    assert main(["info", "somewhere"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    """Every command explains itself."""
    for words in (
        ["--help"],
        ["--version"],
        *([name, "--help"] for name in COMMANDS),
    ):
        assert main(words) == 0
        assert len(capsys.readouterr().out) > 10


def test_an_image_that_cannot_be_written(sd15_bundle: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    """A file in place of a folder is reported, and nothing is left behind."""
    (tmp_path / "file").write_text("")
    assert "cannot be written" in fails("generate", sd15_bundle, "a cat", "-o", tmp_path / "file" / "cat.png")


def test_the_script_is_the_command(tmp_path: Path) -> None:
    """``python scripts/export.py`` is ``hypersd export``, from any folder."""
    command = [sys.executable, str(REPO / "scripts/export.py"), "--ckpt", "nothing"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "hypersd list" in done.stderr


def test_verify_passes_and_fails(
    sd15_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fails: Callable[..., str]
) -> None:
    """The bundle's images are diffusers' own; with another schedule in the manifest they are not, and it says so."""
    arguments = ["--prompt", "a cat", "--steps", "4", "--out", str(tmp_path / "pairs")]
    assert main(["verify", str(sd15_bundle), *arguments]) == 0
    out = capsys.readouterr().out
    for stage in ("text", "step 1", "step 4", "decode", "image"):
        assert stage in out
    assert Image.open(tmp_path / "pairs/pair-0.png").size == (3 * 64, 64)

    altered = tmp_path / "altered"
    shutil.copytree(sd15_bundle, altered)
    manifest = json.loads((altered / "bundle.json").read_text())
    manifest["scheduler"]["beta_end"] = 0.02
    (altered / "bundle.json").write_text(json.dumps(manifest))
    assert main(["verify", str(altered), *arguments]) == 1
    assert "not diffusers' images" in capsys.readouterr().err


def test_a_demonstration_checkpoint_from_export_to_verify(
    shared_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No options but the name; and the bundle is the same from a clone at another place, which verifies it, too."""
    bundle = shared_folder / "demo" / "command-line"  # beside those of test_demo.py, whose components it takes
    export = ["export", "--ckpt", "Hyper-Demo15-2steps-lora", "--vae", "tiny", "--precision", "fp32"]
    export += ["--backend", "none", "--out", str(bundle)]
    assert main(export) == 0
    text = (bundle / "bundle.json").read_text()
    assert str(REPO) not in text
    origin = json.loads(text)["origin"]
    assert (origin["base"], origin["vae"]) == ("Demo15", "taesd-Demo")

    for folder in ("Demo15", "Hyper-Demo", "taesd-Demo"):
        shutil.copytree(REPO / "tests/assets/demo" / folder, tmp_path / "demo" / folder)
    monkeypatch.setattr("hypersd.export.repositories.DEMO_ROOT", tmp_path / "demo")
    capsys.readouterr()
    assert main(export) == 0
    assert "done already" in capsys.readouterr().err
    assert main(["verify", str(bundle), "--prompt", "a red circle", "--out", str(tmp_path / "pairs")]) == 0


def test_added_loras_from_export_to_verify(
    export_arguments: list[str], bundles_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two style LoRAs, one for the text encoder too, and a VAE in one file: recorded, shown and verified."""
    from diffusers import DiffusionPipeline
    from lora_writers import kohya, layer_shapes, pairs, random_lora
    from safetensors.torch import save_file

    shapes = layer_shapes(DiffusionPipeline.from_pretrained(export_arguments[4]))
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    save_file(kohya(random_lora(shapes, 1.0)), one)
    save_file(pairs(random_lora({"unet": shapes["unet"]}), ".lora_A.weight", ".lora_B.weight"), two)
    bundle = bundles_folder / "command-line-styles"  # beside those whose graphs it takes
    vae = Path(export_arguments[4]) / "vae/diffusion_pytorch_model.safetensors"
    more = [
        "--vae",
        str(vae),
        "--add-lora",
        f"{one}:0.5",
        "--add-lora",
        f"{two}:-0.25",
        "--precision",
        "fp32",
        "--backend",
        "none",
    ]
    assert main([*export_arguments, *more, "--out", str(bundle)]) == 0
    err = " ".join(capsys.readouterr().err.split())
    assert "fuses one.safetensors: 83 layers of unet, 18 layers of text_encoder, at scale 0.5" in err
    origin = json.loads((bundle / "bundle.json").read_text())["origin"]
    assert origin["added_lora_scales"] == [0.5, -0.25]
    assert origin["weights"]["added_lora/1"][0]["sha256"] == hashlib.sha256(one.read_bytes()).hexdigest()
    assert main(["info", str(bundle)]) == 0
    assert "one.safetensors:0.5, two.safetensors:-0.25" in " ".join(capsys.readouterr().out.split())
    verify = ["verify", str(bundle), "--prompt", "a cat", "--out", str(tmp_path / "pairs")]
    assert main(verify) == 0
    save_file(kohya(random_lora(shapes, 2.0)), one)
    assert main(verify) == 2
    assert "one.safetensors changed since the bundle was exported" in capsys.readouterr().err
