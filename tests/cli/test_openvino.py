"""`hypersd generate` and `hypersd verify` with OpenVINO."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hypersd.cli import main
from hypersd.engines.openvino import library
from hypersd.engines.openvino.library import openvino_version, resolve_precision

HINT = "--backend openvino is faster here"


def generate(bundle: Path, output: Path, *options: str) -> np.ndarray:
    assert main(["generate", str(bundle), "a cat", "--seed", "1", "-o", str(output), *options]) == 0
    return np.asarray(Image.open(output), np.int16)


def test_generate_names_the_backend_and_precision(
    sd15_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line of the load names the version and the precision; the image is ONNX Runtime's but for the rounding."""
    expected = generate(sd15_bundle, tmp_path / "a.png", "--backend", "onnxruntime")
    capsys.readouterr()
    for options, precision, most in (((), resolve_precision(None), 16), (("--precision", "fp32"), "fp32", 1)):
        image = generate(sd15_bundle, tmp_path / "b.png", "--backend", "openvino", *options)
        assert f"on cpu with OpenVINO {openvino_version()} in {precision}, loaded in" in capsys.readouterr().err
        assert abs(image - expected).max() <= most


def test_generate_says_once_that_openvino_is_faster(
    sd15_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To those who left the backend open, on a processor that multiplies in bfloat16, with OpenVINO installed."""

    def told(*options: str, installed: bool = True, native: bool = True) -> int:
        monkeypatch.setattr(library, "is_installed", lambda: installed)
        monkeypatch.setattr(library, "has_native_bf16", lambda: native)
        generate(sd15_bundle, tmp_path / "a.png", "--device", "cpu", *options)
        return capsys.readouterr().err.count(HINT)

    assert told() == 1
    assert told(installed=False) == told(native=False) == told("--backend", "onnxruntime") == 0


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--precision", "bf16"], "only OpenVINO takes one"),
        (["--backend", "openvino", "--device", "cuda"], "expected auto or cpu"),
        (["--backend", "openvino", "--target", "sm89"], "--backend openvino has none"),
    ],
)
def test_what_does_not_go_together_is_one_line(
    options: list[str], part: str, sd15_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, and nothing is generated."""
    assert main(["generate", str(sd15_bundle), "a cat", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert part in line


@pytest.mark.parametrize(("precision", "decibels"), [("fp32", 60), (None, 30)])
def test_verify_judges_openvino_by_its_precision(
    precision: str | None, decibels: int, sd15_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """float32 is held to float32's bound; bfloat16 to half precision's, which float32's would reject."""
    options = ["--precision", precision] if precision else []
    command = ["verify", str(sd15_bundle), "--backend", "openvino", *options, "--out", str(tmp_path / "pairs")]
    assert main([*command, "--prompt", "a cat"]) == 0
    expected = 60 if resolve_precision(precision) == "fp32" else decibels
    assert f"at least {expected} dB" in capsys.readouterr().out
