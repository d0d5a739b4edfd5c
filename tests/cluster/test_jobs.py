"""Files of prompts: their jobs, and the detection of finished images."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from PIL import Image

from hypersd.cluster.job_images import PATH, with_files
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


def write_photo(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (16, 16), colour).save(path)
    return path


def test_images_are_paths_relative_to_the_file(tmp_path: Path, manifest: Manifest) -> None:
    """Wherever the command runs; or base64, as over HTTP. An image is read when its line is generated."""
    photo = write_photo(tmp_path / "photos/a.png")
    text = base64.b64encode(photo.read_bytes()).decode()
    lines = (
        {"prompt": "", "image": "photos/a.png", "mask": "alpha"},
        {"prompt": "", "image": str(photo), "mask": "photos/a.png"},
        {"prompt": "", "image": text, "mask": f"data:image/png;base64,{text}"},
        {"prompt": "", "control_image": {"canny": "photos/a.png"}},
    )
    bodies = [job.body for job in read_jobs(write(tmp_path / "p.jsonl", *lines), manifest, 0, {})]
    assert [body.image for body in bodies] == [f"{PATH}{photo}", f"{PATH}{photo}", text, None]
    assert [body.mask for body in bodies] == ["alpha", f"{PATH}{photo}", f"data:image/png;base64,{text}", None]
    assert with_files(bodies[3], lambda path: Path(path).read_bytes()).control_image == {"canny": photo.read_bytes()}
    assert with_files(bodies[2], lambda path: b"").image == text


def test_an_image_is_generated_again_if_a_file_it_starts_from_changes(tmp_path: Path, manifest: Manifest) -> None:
    """By its contents, not by its name or time."""
    path = write(tmp_path / "p.jsonl", {"prompt": "", "image": "photos/a.png", "seed": 3})
    write_photo(tmp_path / "photos/a.png")
    (job,) = read_jobs(path, manifest, 0, {})
    write_image(job, tmp_path)
    write_photo(tmp_path / "photos/a.png")
    assert read_jobs(path, manifest, 0, {})[0].is_generated(tmp_path)
    write_photo(tmp_path / "photos/a.png", "blue")
    assert not read_jobs(path, manifest, 0, {})[0].is_generated(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image": "photos/none.png"}, "line 1: image 'photos/none.png' is not there: expected the path of an image"),
        ({"image": ""}, "line 1: image '' is not there"),
        ({"image": "a" * 300}, "is not there"),
        ({"image": "nul\0"}, "is not there"),
        ({"image": "photos"}, "line 1: image 'photos' is not there"),
        ({"image": "p.jsonl"}, "line 1: image 'p.jsonl' is not an image that can be read"),
        ({"mask": "photos/none.png"}, "line 1: mask 'photos/none.png' is not there"),
        ({"control_image": {"canny": "none.png"}}, "line 1: control_image 'none.png' is not there"),
    ],
)
def test_an_image_that_is_not_there_is_named_early(
    fields: dict[str, Any], message: str, tmp_path: Path, manifest: Manifest
) -> None:
    write_photo(tmp_path / "photos/a.png")
    with pytest.raises(RequestError, match=message):
        read_jobs(write(tmp_path / "p.jsonl", {"prompt": "", **fields}), manifest, 0, {})


def write_loras(folder: Path, **contents: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / f"{name}.safetensors").write_bytes(content)
    return folder


def test_an_image_is_generated_again_if_its_lora_changes(tmp_path: Path, manifest: Manifest) -> None:
    """By strength and by the file's contents; other LoRAs in the folder do not matter."""
    line = {"prompt": "", "seed": 3, "adapters": {"style": 0.5}}
    loras = write_loras(tmp_path / "loras", style=b"1", other=b"1")

    def job(**changes: Any) -> PromptJob:
        return read_jobs(write(tmp_path / "p.jsonl", {**line, **changes}), manifest, 0, {}, loras)[0]

    write_image(job(), tmp_path)
    write_loras(loras, style=b"1", other=b"2", third=b"3")
    assert job().is_generated(tmp_path)
    others = [job(adapters={"style": 0.6}), job(adapters={"other": 0.5}), job(adapters=None)]
    assert not any(other.is_generated(tmp_path) for other in others)
    write_loras(loras, style=b"4")
    assert not job().is_generated(tmp_path)


def test_a_lora_that_is_not_there_is_named_early(tmp_path: Path, manifest: Manifest) -> None:
    lines = write(tmp_path / "p.jsonl", {"prompt": "", "adapters": {"style": 1, "other": 1}})
    with pytest.raises(RequestError, match="line 1: adapter 'other' is not in --lora-folder: expected some of: style"):
        read_jobs(lines, manifest, 0, {}, write_loras(tmp_path / "loras", style=b""))
    with pytest.raises(RequestError, match="expected some of: none"):
        read_jobs(lines, manifest, 0, {})
