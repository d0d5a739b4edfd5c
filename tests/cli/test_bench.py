"""`hypersd bench` end to end, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from hypersd.cli import main
from hypersd.tools.bench.report import decode


def test_hypersd_beside_diffusers(sd15_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both draw in processes of their own, the same image; the table, the JSON and the plot say so."""
    outputs = ["--json", str(tmp_path / "bench.json"), "--plot", str(tmp_path / "bench.png")]
    words = ["bench", str(sd15_bundle), "--contenders", "hypersd", "diffusers", "--rounds", "2", *outputs]
    assert main(words) == 0
    captured = capsys.readouterr()
    assert "start diffusers" in captured.err
    row = next(line for line in captured.out.splitlines() if line.split()[:1] == ["diffusers"])
    assert "same" in row
    report = decode((tmp_path / "bench.json").read_bytes())
    assert [len(row.samples) for row in report.comparisons[0].rows] == [2, 2]
    assert report.command.startswith(f"hypersd bench {sd15_bundle} --contenders hypersd diffusers --rounds 2")
    start = report.entry("diffusers").start
    assert start is not None
    assert min(start.process, start.imports, start.load, start.first_image) > 0
    assert report.rates["fp32"].flops_per_second > 1e8
    summary = report.comparisons[0].rows[0].summary
    assert summary is not None
    assert summary.floors["total"] > 1
    with Image.open(tmp_path / "bench.png") as image:
        image.load()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--contenders", "difusers"], "contender 'difusers' is not known: expected one of hypersd, "),
        (["--python", "optimum=/no/such/python"], "--python optimum=/no/such/python cannot be run"),
        (["--python", "optimum"], "expected such as optimum=/path/to/python"),
        (["--python", "nobody=/bin/true"], "contender 'nobody' is not known"),
        (["--steps", "99"], "was not distilled for 99 steps"),
        (["--rounds", "0"], "expected a whole number, 1 or more"),
        (["--size", "64x63"], "is not a multiple of 8"),
        (["--json", "no/such/folder/file.json"], "expected a file name in a folder that is there"),
        (["--plot", "."], "expected a file name in a folder that is there"),
    ],
)
def test_what_is_refused(words: list[str], message: str, sd15_bundle: Path, fails: Callable[..., str]) -> None:
    """Each in one line that names what was expected, before any process is started."""
    assert message in fails("bench", sd15_bundle, *words)


def test_a_plot_without_matplotlib(
    sd15_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]
) -> None:
    """What is missing is said before minutes of measuring, with what to install."""
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    assert "pip install -e '.[bench]'" in fails("bench", sd15_bundle, "--plot", tmp_path / "plot.png")
