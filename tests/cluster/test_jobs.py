"""Files of prompts: their jobs, and the detection of finished images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from PIL import Image

from hypersd.cluster.jobs import KEY_NAME, PromptJob, read_jobs
from hypersd.engines import Bundle, Manifest
from hypersd.errors import RequestError
from hypersd.runtime.metadata import png_info


@pytest.fixture
def manifest(sd15_bundle: Path) -> Manifest:
    return Bundle.load(sd15_bundle).manifest


def write(path: Path, *lines: dict[str, Any] | str) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), "utf-8")
    return path


def write_image(job: PromptJob, folder: Path) -> None:
    Image.new("RGB", (8, 8)).save(folder / job.file, pnginfo=png_info({KEY_NAME: job.key}))


def test_a_text_file_has_one_prompt_per_line(tmp_path: Path, manifest: Manifest) -> None:
    """Lines count as editors count them, empty ones too, so that names and seeds are those of the line."""
    jobs = read_jobs(write(tmp_path / "p.txt", "a cat", "", '  {"a": 1} '), manifest, 5, {"steps": 1})
    assert [(job.file, job.body.prompt) for job in jobs] == [("000001-5.png", "a cat"), ("000003-7.png", '{"a": 1}')]
    assert [job.body.steps for job in jobs] == [1, 1]


def test_a_line_of_json_overrides_options(tmp_path: Path, manifest: Manifest) -> None:
    """Options of the command apply to lines without their own; n images are n jobs."""
    lines = {"prompt": "a cat", "seed": 40, "n": 2, "eta": 0.5}, {"prompt": "a dog"}
    jobs = read_jobs(write(tmp_path / "p.jsonl", *lines), manifest, 0, {"eta": 0.25})
    assert [(job.line, job.seed, job.body.eta, job.body.n) for job in jobs] == [
        (1, 40, 0.5, 1),
        (1, 41, 0.5, 1),
        (2, 1, 0.25, 1),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not a request"),
        ("[1]", "line 2 is not a request"),
        ("{}", "line 2: prompt"),
        ('{"prompt": "a", "sed": 1}', "line 2: 'sed'"),
        ('{"prompt": "a", "seed": 1.5}', "line 2: seed"),
        ('{"prompt": "a", "eta": NaN}', "line 2: eta"),
        ('{"prompt": "a", "output_format": "webp"}', "output_format webp"),
        ('{"prompt": "a", "seed": 9223372036854775807, "n": 2}', "the last seed"),
    ],
)
def test_a_line_that_is_no_request_is_named(line: str, message: str, tmp_path: Path, manifest: Manifest) -> None:
    """The error comes before hours of generation."""
    with pytest.raises(RequestError, match=message):
        read_jobs(write(tmp_path / "p.jsonl", {"prompt": "a cat"}, line), manifest, 0, {})


@pytest.mark.parametrize("defaults", [{"steps": 0}, {"eta": 2.0}, {"size": "big"}, {"n": 0}])
def test_an_option_that_is_wrong_is_not_blamed_on_a_line(
    defaults: dict[str, Any], tmp_path: Path, manifest: Manifest
) -> None:
    """The file may be fine."""
    with pytest.raises(RequestError, match=f"the options: {next(iter(defaults))}"):
        read_jobs(write(tmp_path / "p.txt", "a cat"), manifest, 0, defaults)


def test_an_image_is_known_by_its_prompt_settings_and_bundle(tmp_path: Path, manifest: Manifest) -> None:
    """A prompt, a setting or a bundle that changed makes another image of the same name; new engines do not."""
    line = {"prompt": "a cat", "seed": 3, "steps": 1}

    def job(changes: dict[str, Any] | None = None, bundle: Manifest = manifest) -> PromptJob:
        return read_jobs(write(tmp_path / "p.jsonl", {**line, **(changes or {})}), bundle, 0, {})[0]

    assert not job().is_generated(tmp_path)
    write_image(job(), tmp_path)
    assert job().is_generated(tmp_path)
    assert job({"user": "somebody"}).is_generated(tmp_path)
    sampler = msgspec.structs.replace(manifest.sampler, eta=0.125)
    others = [job({"prompt": "a dog"}), job({"steps": 4}), job({"eta": 0.5})]
    others.append(job(bundle=msgspec.structs.replace(manifest, sampler=sampler)))
    assert [other.file for other in others] == ["000001-3.png"] * 4
    assert not any(other.is_generated(tmp_path) for other in others)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n"])
def test_a_file_that_is_no_image_is_generated_again(content: bytes, tmp_path: Path, manifest: Manifest) -> None:
    """Another program's file of that name, or the remains of a crash."""
    job = read_jobs(write(tmp_path / "p.txt", "a cat"), manifest, 0, {})[0]
    (tmp_path / job.file).write_bytes(content)
    assert not job.is_generated(tmp_path)
