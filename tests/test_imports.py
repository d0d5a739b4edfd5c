"""Directions of imports: a service that embeds the runtime needs none of the exporter's libraries."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hypersd

ROOT = Path(hypersd.__file__).parent
PACKAGES = (
    "",
    "cli",
    "cluster",
    "engines",
    "engines/cuda",
    "engines/tensorrt",
    "export",
    "families",
    "runtime",
    "samplers",
    "serve",
    "tools",
    "tools/bench",
    "triton_backend",
    "weights",
)
SERVICES = ("cluster", "serve", "triton_backend")
EXPORT_ONLY = (
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "huggingface_hub",
    "safetensors",
    "onnx",
    "onnxscript",
)


def files(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (ROOT / package).glob("*.py"))


def module_name(path: Path) -> str:
    parts = ("hypersd", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(part for part in parts if part != "__init__")


def imported(path: Path) -> Iterator[str]:
    """The full names of all modules that a file imports, also inside its functions and in ``TYPE_CHECKING``."""
    package = module_name(path).split(".") if path.name == "__init__.py" else module_name(path).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)  # `from . import export` imports it as well


def python(program: str) -> str:
    """The output of a program in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


EVERY_MODULE = [module_name(path) for path in files(*PACKAGES) if path.name != "__main__.py"]
BARE = [module_name(path) for path in files("engines", "runtime")] + ["hypersd", "hypersd.errors"]


def test_the_list_of_modules_is_not_empty() -> None:
    """The tests below walk the files: they must be those of the package, and every folder must be known here."""
    assert {"hypersd", "hypersd.errors", "hypersd.runtime.pipeline", "hypersd.engines.onnx_runtime"} <= {*EVERY_MODULE}
    with_init = {path.parent.name for path in ROOT.glob("[!.]*/__init__.py")}
    assert with_init == {name for name in PACKAGES if name and "/" not in name}


@pytest.mark.parametrize("name", EVERY_MODULE)
def test_every_module_imports(name: str) -> None:
    """No module is broken by itself, also those that only a rare command loads."""
    if name == "hypersd.tools.bench.optimum_contender":
        pytest.importorskip("optimum.onnxruntime")  # which lives in an environment of its own
    assert importlib.import_module(name).__name__ == name


def test_every_module_imports_first() -> None:
    """No module of the runtime depends on another having been imported before it: no hidden circle."""
    program = f"""if True:
        import importlib, sys
        for name in {BARE!r}:
            for loaded in [loaded for loaded in sys.modules if loaded.partition(".")[0] == "hypersd"]:
                del sys.modules[loaded]
            importlib.import_module(name)
        print("done")
    """
    assert python(program) == "done"


def test_the_package_itself_loads_nothing_heavy() -> None:
    """``import hypersd`` costs nothing: the command line's --help and --version wait for no torch."""
    heavy = ["torch", "numpy", "onnxruntime", "PIL", "tokenizers", "msgspec", *EXPORT_ONLY]
    program = f"import hypersd, sys; print(hypersd.__version__, [name for name in {heavy!r} if name in sys.modules])"
    assert python(program) == f"{hypersd.__version__} []"


def test_public_names_resolve_and_others_do_not() -> None:
    """The lazy names are there, are what they say, and a misspelt one is an AttributeError as usual."""
    for name in hypersd.__all__:
        assert getattr(hypersd, name)
    assert hypersd.Pipeline.__module__ == "hypersd.runtime.pipeline"
    assert hypersd.HyperSDError is importlib.import_module("hypersd.errors").HyperSDError
    with pytest.raises(AttributeError, match="Pipelin"):
        hypersd.Pipelin  # noqa: B018


def test_the_runtime_works_without_what_only_an_export_needs(sd15_bundle: Path) -> None:
    """Every module of runtime/ and engines/ imports, and an image is drawn, with the export's libraries not there.

    The block is shown to work first.
    """
    program = f"""if True:
        import importlib, sys
        class Block:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in {EXPORT_ONLY!r}:
                    raise ImportError(name + " is blocked")
        sys.meta_path.insert(0, Block())
        for name in {EXPORT_ONLY!r}:
            try:
                importlib.import_module(name)
            except ImportError:
                continue
            raise SystemExit(name + " was imported all the same")
        for name in {BARE!r}:
            importlib.import_module(name)
        from hypersd import Pipeline
        image = Pipeline.load({str(sd15_bundle)!r})("a photo of a cat", seed=0).images[0]
        print(image.size, [name for name in {EXPORT_ONLY!r} if name in sys.modules])
    """
    assert python(program) == "(64, 64) []"


def test_onnxruntime_is_loaded_by_its_own_module_alone() -> None:
    """A machine that runs TensorRT engines needs no onnxruntime: nothing imports it before an engine asks for it."""
    others = [name for name in BARE if name != "hypersd.engines.onnx_runtime"]
    program = f"""if True:
        import importlib, sys
        for name in {others!r}:
            importlib.import_module(name)
        before = "onnxruntime" in sys.modules
        importlib.import_module("hypersd.engines.onnx_runtime")
        print(before, "onnxruntime" in sys.modules)
    """
    assert python(program) == "False True"


@pytest.mark.parametrize("library", ["onnxruntime", "openvino", "tensorrt", "tensorrt_rtx"])
def test_engine_libraries_are_imported_only_where_they_are_wrapped(library: str) -> None:
    """DESIGN.md: an engine library is named in one module of engines/, also in imports inside a function."""
    places = [
        path.relative_to(ROOT).as_posix()
        for path in files("", "cli", "engines", "runtime")
        if library in {name.partition(".")[0] for name in imported(path)}
    ]
    if library in ("onnxruntime", "openvino"):
        assert places == [{"onnxruntime": "engines/onnx_runtime.py", "openvino": "engines/openvino.py"}[library]]
    assert len(places) <= 1
    assert all(place.startswith("engines/") for place in places)


WITHOUT_EXPORT = files("engines", "runtime", *SERVICES)


@pytest.mark.parametrize("path", WITHOUT_EXPORT, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_runtime_names_no_library_of_the_exports(path: Path) -> None:
    """Also inside functions, where the subprocess above would not see it."""
    assert {name.partition(".")[0] for name in imported(path)} & {*EXPORT_ONLY} == set()


FORBIDDEN = {
    "errors.py": ("cli", "engines", "export", "runtime", *SERVICES),
    "engines": ("cli", "export", "runtime", *SERVICES),
    "export": ("cli", "runtime", *SERVICES),
    "runtime": ("cli", "export", *SERVICES),
    "serve": ("cli", "export", "cluster", "triton_backend"),
    "triton_backend": ("cli", "export", "cluster"),
    "cluster": ("cli", "export", "triton_backend"),
}


@pytest.mark.parametrize("place", FORBIDDEN)
def test_imports_go_in_the_directions_of_the_design(place: str) -> None:
    """runtime/ and export/ never import each other, engines/ imports neither, and nothing imports the command line.

    What serves stands on the runtime, and needs nothing of an export.
    """
    checked = 0
    for path in [ROOT / place] if place.endswith(".py") else files(place):
        for name in imported(path):
            assert name.split(".")[:2] not in [["hypersd", other] for other in FORBIDDEN[place]], f"{path}: {name}"
            checked += name.startswith("hypersd.")
    assert checked or place == "errors.py", "no import of the package's own was seen: the walk is broken"
