"""The contact sheet: its columns, its size, its words."""

from __future__ import annotations

import re
from pathlib import Path

import contact_sheet
import pytest
from contact_sheet import GAP, PROMPTS, SIDE, Column, arrange, generate, wrap
from PIL import Image
from train_demo.scenes import words


@pytest.fixture(scope="module")
def columns(sd15_bundle: Path) -> list[Column]:
    return generate(sd15_bundle, ["a cat", "a dog"], seed=0)


def test_a_column_for_every_number_of_steps(columns: list[Column]) -> None:
    assert [column.heading[0] for column in columns] == ["1 step", "2 steps", "4 steps", "8 steps"]
    assert {column.heading[1:] for column in columns} == {("Hyper-SD15-1step-lora", "TCD, eta 1")}
    assert all(len(column.images) == 2 for column in columns)


def test_a_bundle_for_other_steps_has_a_column(export_tiny) -> None:
    (column,) = generate(export_tiny("Hyper-SDXL-1step-Unet"), ["a cat"], seed=0)
    assert column.heading == ("1 step", "Hyper-SDXL-1step-Unet", "LCM, timestep 800")


def test_images_stand_in_rows_and_columns() -> None:
    colours = [[(200, 0, 0), (0, 200, 0)], [(0, 0, 200), (200, 200, 0)], [(0, 200, 200), (200, 0, 200)]]
    columns = [
        Column(("1 step", "NAME", "TCD"), tuple(Image.new("RGB", (96, 96), c) for c in some)) for some in colours
    ]
    sheet = arrange(columns, ["one", "two"])
    assert sheet.width == 3 * SIDE + 4 * GAP
    seen = sheet.getcolors(1 << 20)
    assert seen is not None
    areas = {colour: count for count, colour in seen}
    assert all(areas[colour] == SIDE**2 for some in colours for colour in some)
    last = (sheet.width - GAP - SIDE // 2, sheet.height - GAP - SIDE // 2)
    assert sheet.getpixel(last) == colours[2][1]


def test_texts_are_wrapped_between_words() -> None:
    text = "a small red star left of a large blue ring"
    lines = wrap(text, SIDE, 15)
    assert len(lines) > 1
    assert " ".join(lines) == text
    assert wrap("Donaudampfschifffahrtsgesellschaft", 10, 15) == ["Donaudampfschifffahrtsgesellschaft"]


def test_prompts_are_of_the_world_that_was_learnt() -> None:
    assert {word for prompt in PROMPTS for word in re.findall(r"\w+", prompt)} <= set(words())


def test_command(sd15_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    out = tmp_path / "new/sheet.png"
    monkeypatch.setattr("sys.argv", ["contact_sheet.py", str(out), str(sd15_bundle), "--prompts", "a cat"])
    contact_sheet.main()
    assert Image.open(out).width == 4 * SIDE + 5 * GAP
    assert capsys.readouterr().out == f"{out}  1 prompts, seed 0; 4 columns\n"


def test_a_folder_without_a_bundle_is_rejected_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr("sys.argv", ["contact_sheet.py", str(tmp_path / "sheet.png"), str(tmp_path)])
    with pytest.raises(SystemExit) as refusal:
        contact_sheet.main()
    assert refusal.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} is not a bundle")
