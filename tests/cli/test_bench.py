"""`hypersd bench` end to end, and its rejections."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hypersd.cli import main
from hypersd.tools.bench.report import decode


def test_hypersd_beside_diffusers(sd15_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both generate the same image in processes of their own; the table and the JSON say so."""
    outputs = ["--json", str(tmp_path / "bench.json")]
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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--contenders", "difusers"], "contender 'difusers' is not known: expected one of hypersd, "),
        (["--python", "optimum=/no/such/python"], "--python optimum=/no/such/python cannot be run"),
        (["--python", "optimum"], "expected e.g. optimum=/path/to/python"),
        (["--python", "nobody=/bin/true"], "contender 'nobody' is not known"),
        (["--steps", "99"], "was not distilled for 99 steps"),
        (["--rounds", "0"], "expected a whole number, 1 or more"),
        (["--size", "64x63"], "is not a multiple of 8"),
        (["--json", "no/such/folder/file.json"], "expected a file name in an existing folder"),
        (["--json", "."], "expected a file name in an existing folder"),
    ],
)
def test_bad_arguments_are_rejected(
    words: list[str], message: str, sd15_bundle: Path, fails: Callable[..., str]
) -> None:
    """Each in one line that names what was expected, before any process is started."""
    assert message in fails("bench", sd15_bundle, *words)
