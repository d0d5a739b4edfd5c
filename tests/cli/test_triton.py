"""`hypersd export --triton`."""

from __future__ import annotations

from pathlib import Path

from hypersd.cli import main


def test_export_of_a_finished_bundle(
    export_arguments: list[str], sd15_bundle: Path, copy_bundle, tmp_path: Path, capsys
) -> None:
    """The command adds the bundle to a model repository and says what to run; a bad place is told at once."""
    bundle = copy_bundle(sd15_bundle).root
    words = [*export_arguments, "--precision", "fp32", "--backend", "none", "--out", str(bundle)]
    assert main([*words, "--triton", str(tmp_path / "models")]) == 0
    assert f"tritonserver --model-repository {tmp_path / 'models'}" in capsys.readouterr().out
    assert 'key: "bundle", value: { string_value: "../../copy" }' in (tmp_path / "models/copy/config.pbtxt").read_text()
    assert main([*words, "--triton", str(bundle / "models")]) == 2
    assert "is inside the bundle" in capsys.readouterr().err
