"""Blocks of a batch, without Ray's processes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from hypersd.cli import main
from hypersd.cluster import batch_run as batch
from hypersd.cluster.batch_run import ATTEMPTS, BatchReplica, Desk
from hypersd.cluster.bundles import share


def test_a_block_that_kills_its_actors_is_given_up(sd15_bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray starts an actor again, and its task, as often as they die: one prompt would keep a batch for ever."""
    desk, deaths = Desk(share(sd15_bundle)), []
    handle: Any = SimpleNamespace(begin=SimpleNamespace(remote=desk.begin))
    monkeypatch.setattr(batch.ray, "get", lambda reference: reference)

    class Fragile(BatchReplica):
        def __init__(self) -> None:
            self._desk = handle

        async def _generate_all(self, rows: Any) -> Any:
            deaths.append(rows)
            raise SystemExit  # as far as the desk can tell

    block = pa.Table.from_pylist([{"file": name, "key": "", "body": "{}"} for name in ("1.png", "2.png")])
    for _ in range(ATTEMPTS):
        with pytest.raises(SystemExit):
            Fragile()(block)
    results = Fragile()(block).to_pylist()
    assert len(deaths) == ATTEMPTS
    assert [(result["file"], result["png"]) for result in results] == [("1.png", None), ("2.png", None)]
    assert all("died 3 times" in result["error"] for result in results)
    assert desk.begin("3.png") == 0  # the others' attempts are their own


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--lora-folder", "/nowhere"], "the LoRA folder /nowhere is not there"),
        (["--lora-folder", "/tmp"], "this bundle has no LoRA slot"),
        (["--strict"], "give --lora-folder FOLDER with it"),
    ],
)
def test_loras_that_cannot_be_used(
    options: list[str], words: str, sd15_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said before anything is started."""
    (tmp_path / "p.txt").write_text("a cat")
    assert main(["batch", str(sd15_bundle), str(tmp_path / "p.txt"), "-o", str(tmp_path / "images"), *options]) == 2
    assert words in capsys.readouterr().err
