"""Code blocks of the documentation run, and every command line in it is one that the parsers accept.

A block that cannot run here has a line ``<!-- not run: REASON -->`` before it. A demonstration bundle stands in for the
bundles of published checkpoints.
"""

from __future__ import annotations

import argparse
import functools
import re
import shlex
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest
from PIL import Image
from stand_in_service import LONG, RunningServer
from tiny_videos import write_video

from hypersd.cli import main, make_parser
from hypersd.engines import Bundle
from hypersd.serve.service import LocalService
from hypersd.serve.settings import ServeSettings

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OTHER_PAGES = [ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]  # their blocks take minutes or a GPU
FENCE = re.compile(
    r"^(?:<!-- not run: (?P<reason>.+?) -->\n)?(?P<fence>```)(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S
)
SERVICE = "127.0.0.1:8000"  # the address that the documentation uses
BUNDLES = ("Hyper-SDXL-1step-lora", "Hyper-SD15-1step-lora", "Hyper-Demo15-1step-lora", "xl-canny")
OTHER_OPTIONS = {
    "--gpus",
    "--http-host",
    "--inplace",
    "--serve",
    "--strict",
    "--time",
}  # docker, ray, rsync ...


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    code: str
    reason: str | None

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@functools.cache
def parser() -> argparse.ArgumentParser:
    return make_parser()


def find_blocks(page: Path) -> Iterator[Block]:
    text = page.read_text("utf-8")
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("fence")) + 1
        yield Block(page, line, match["language"], match["code"], match["reason"])


def commands_of(block: Block) -> Iterator[list[str]]:
    """The words of each command of a shell block, without comments."""
    for line in block.code.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


BLOCKS = [block for page in PAGES for block in find_blocks(page)]
RUN = [block for block in BLOCKS if block.language in ("bash", "python") and block.reason is None]
SHELL = [block for page in [*PAGES, *OTHER_PAGES] for block in find_blocks(page) if block.language == "bash"]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory, demo_canny_bundle: Path) -> Path:
    """A folder with the files that the documentation names, to run its blocks in."""
    root = tmp_path_factory.mktemp("clone")
    (root / "bundles").mkdir()
    for name in BUNDLES:
        (root / "bundles" / name).symlink_to(demo_canny_bundle, target_is_directory=True)
    pixels = np.full((80, 120, 3), 250, np.uint8)
    pixels[20:60, 40:80] = (200, 30, 30)
    Image.fromarray(pixels).save(root / "photo.jpg")
    Image.fromarray(255 - pixels).convert("L").save(root / "mask.png")
    write_video(root / "in.mp4", (0, 100, 200))
    return root


@pytest.fixture(scope="module")
def service_address(demo_canny_bundle: Path) -> Iterator[str]:
    with RunningServer(LocalService([demo_canny_bundle], devices=["cpu"]), ServeSettings()) as server:
        server.service.wait_ready()
        yield server.url.removeprefix("http://")


def run_export(words: list[str]) -> None:
    """A bundle stands in for the export, if it is one that the blocks use."""
    args = parser().parse_args(words)
    assert (args.out or Path("bundles") / args.ckpt).is_dir(), f"no stand-in for {shlex.join(words)}"


def run_pip(words: list[str]) -> None:
    """Check that the extras of ``pip install -e ".[a,b]"`` exist."""
    assert words[:2] == ["install", "-e"]
    project = (ROOT / "pyproject.toml").read_text("utf-8").partition("[project.optional-dependencies]")[2]
    for extra in re.findall(r"[\w-]+", words[2]):
        assert re.search(rf"(?m)^{extra} = ", project), f"pyproject.toml has no extra {extra}"


def run_curl(words: list[str]) -> None:
    """Send the request that curl would send."""
    given = list(pairwise(words))
    request: dict[str, Any] = {"headers": dict(value.split(": ") for option, value in given if option == "-H")}
    if form := [value.split("=", 1) for option, value in given if option == "-F"]:
        request["data"] = {name: value for name, value in form if value[0] != "@"}
        request["files"] = {name: (value[1:], Path(value[1:]).read_bytes()) for name, value in form if value[0] == "@"}
    else:
        request["content"] = dict(given)["-d"].encode()
    answer = httpx.post(f"http://{words[0]}", timeout=LONG, **request).raise_for_status()
    Path(dict(given)["-o"]).write_bytes(answer.content)


def run_hypersd(words: list[str]) -> None:
    if words[0] == "export":
        run_export(words)
    else:
        assert main(words) == 0


RUNNERS: dict[str, Callable[[list[str]], None]] = {"hypersd": run_hypersd, "pip": run_pip, "curl": run_curl}


def run_bash(code: Block) -> None:
    for program, *words in commands_of(code):
        if [program, *words] == ["source", ".venv/bin/activate"]:
            continue
        assert program in RUNNERS, f"the test cannot run {program}: mark the block <!-- not run: REASON -->"
        RUNNERS[program](words)


@pytest.mark.parametrize("block", RUN, ids=lambda block: block.name)
def test_block_runs(block: Block, clone: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.chdir(clone)
    if SERVICE in block.code or "localhost:8000" in block.code:
        address = request.getfixturevalue("service_address")
        code = block.code.replace(SERVICE, address).replace("localhost:8000", address)
        block = block._replace(code=code)
    (controlnet,) = Bundle.load(clone / "bundles" / "xl-canny").manifest.controlnets  # the stand-in's own name
    for words in ('"{}":', '"{}"', "--control {}"):
        block = block._replace(code=block.code.replace(words.format("canny"), words.format(controlnet)))
    if block.language == "bash":
        run_bash(block)
    else:
        names: dict[str, Any] = {"__name__": "documentation"}
        exec(compile("\n" * block.line + block.code, block.page, "exec"), names)
    for image in clone.glob("*.png"):
        Image.open(image).verify()


def test_every_fence_is_a_block_with_a_language() -> None:
    """A fence that the pattern misses would not be tested."""
    for page in PAGES:
        fences = page.read_text("utf-8").count("\n```")
        blocks = list(find_blocks(page))
        assert fences == 2 * len(blocks), page
        assert all(block.language in ("bash", "python", "text") for block in blocks), page


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.name)
def test_command_lines_are_accepted_by_the_parsers(block: Block) -> None:
    for program, *words in commands_of(block):
        if program == "hypersd":
            parser().parse_args(words)
        elif program == "scripts/export.py":
            parser().parse_args(["export", *words])
        for word in [program, *words]:
            if re.fullmatch(r"(scripts|deploy|benchmarks|tests)/[\w./-]+", word) and not word.endswith(".json"):
                assert (ROOT / word).exists(), f"{word} is gone"


@functools.cache
def options_of_all_commands() -> set[str]:
    commands = next(action.choices for action in parser()._actions if action.dest == "command")
    assert commands is not None
    return {word for command in dict(commands).values() for word in command._option_string_actions}


@pytest.mark.parametrize("page", [*PAGES, *OTHER_PAGES], ids=lambda page: page.name)
def test_options_in_the_text_exist(page: Path) -> None:
    text = FENCE.sub("", page.read_text("utf-8"))
    code = re.findall(r"`([^`\n]+)`", text)
    options = {word for words in code for word in re.findall(r"(?<![\w-])--[a-z][\w-]*", words)}
    assert options - options_of_all_commands() - OTHER_OPTIONS == set()


@pytest.mark.parametrize("page", [*PAGES, *OTHER_PAGES], ids=lambda page: page.name)
def test_linked_files_exist(page: Path) -> None:
    made = {"commands.md", "checkpoints.md", "python.md", "http.md", "manifest.md", "benchmarks.md", "contributing.md"}
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text("utf-8")):
        assert (page.parent / target).exists() or Path(target).name in made, target
