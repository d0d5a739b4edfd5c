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
BELOW_RUNTIME = {"samplers", "weights", "families", "engines", "errors"}
MAY_IMPORT = {  # DESIGN's directions: a room and the rooms below it that it may import; every file's own room besides
    "cli": {"tools", "serve", "cluster", "triton_backend", "video", "export", "runtime", *BELOW_RUNTIME},
    "tools": {"export", "runtime", *BELOW_RUNTIME},
    "cluster": {"serve", "runtime", *BELOW_RUNTIME},
    "triton_backend": {"serve", "runtime", *BELOW_RUNTIME},
    "serve": {"runtime", *BELOW_RUNTIME},
    "video": {"runtime", *BELOW_RUNTIME},
    "export": BELOW_RUNTIME,
    "runtime": BELOW_RUNTIME,
    "samplers": {"errors"},
    "weights": {"families", "errors"},
    "families": {"errors"},
    "engines": {"errors"},
    "errors": set[str](),
}
ROOMS = [room for room in MAY_IMPORT if room != "errors"]
WITHOUT_EXPORT = (
    "serve",
    "cluster",
    "triton_backend",
    "video",
    "runtime",
    "samplers",
    "weights",
    "families",
    "engines",
)
WRAPPED = {  # a library and the only modules that import it; the bench also times rivals that stand on them
    "onnxruntime": {"engines/onnx_runtime.py", "tools/bench/optimum_contender.py"},
    "openvino": {
        "engines/openvino/library.py",
        "engines/openvino/openvino_engine.py",
        "engines/openvino/compiled_graph.py",
        "engines/openvino/model_passes.py",
        "tools/bench/openvino_models.py",
        "tools/bench/openvino_genai_contender.py",
    },
    "cv2": {"runtime/control_images.py"},
    "av": {"video/source.py", "video/segments.py"},
    "tensorrt": set[str](),  # by name, in engines/tensorrt/api.py
    "tensorrt_rtx": set[str](),
}
ELSEWHERE = {  # modules of the bench that run in an environment of their own, and a library that they need there
    "hypersd.tools.bench.optimum_contender": "optimum.onnxruntime",
    "hypersd.tools.bench.optimum_intel_contender": "optimum.intel",
    "hypersd.tools.bench.openvino_genai_contender": "openvino_genai",
}
EXPORT_ONLY = (
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "huggingface_hub",
    "onnx",
    "onnxscript",
)


def files(*rooms: str) -> list[Path]:
    """All modules of some rooms, or of the whole package."""
    return sorted(path for room in rooms or ROOMS for path in (ROOT / room).rglob("*.py")) + (
        [] if rooms else sorted(ROOT.glob("*.py"))
    )


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


def top_names(path: Path) -> set[str]:
    """The first part of the name of each module that a file imports."""
    return {name.partition(".")[0] for name in imported(path)}


def python(program: str) -> str:
    """The output of a program in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


EVERY_MODULE = [module_name(path) for path in files() if path.name != "__main__.py"]
BARE = [module_name(path) for path in files("engines", "runtime")] + ["hypersd", "hypersd.errors"]


def test_every_room_is_known() -> None:
    """The tests below walk the files of the rooms: a new room needs its line in ``MAY_IMPORT``."""
    assert {"hypersd", "hypersd.errors", "hypersd.runtime.pipeline", "hypersd.engines.cuda.graphs"} <= {*EVERY_MODULE}
    assert {path.parent.name for path in ROOT.glob("[!.]*/__init__.py")} == {*ROOMS}


@pytest.mark.parametrize("name", EVERY_MODULE)
def test_every_module_imports(name: str) -> None:
    """No module is broken by itself, also those that only a rare command loads."""
    if name in ELSEWHERE:
        pytest.importorskip(ELSEWHERE[name])
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
    """Every module of runtime/ and engines/ imports, and an image is generated, without the libraries of the export.

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


@pytest.mark.parametrize("library", WRAPPED)
def test_a_wrapped_library_is_imported_by_its_module_alone(library: str) -> None:
    """Also inside functions: a machine without the library runs everything else."""
    places = {path.relative_to(ROOT).as_posix() for path in files() if library in top_names(path)}
    assert places == WRAPPED[library]


@pytest.mark.parametrize("path", files(*WITHOUT_EXPORT), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_runtime_names_no_library_of_the_export(path: Path) -> None:
    """Also inside functions, where the subprocess above would not see it."""
    allowed = {
        "weights/safetensors_file.py": {"safetensors"},
        "engines/tensorrt/placeholders.py": {"onnx"},
        "engines/lowering.py": {"onnx"},
        "engines/hub.py": {"huggingface_hub"},
    }
    assert top_names(path) & {*EXPORT_ONLY} <= allowed.get(path.relative_to(ROOT).as_posix(), set())


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_go_down(room: str) -> None:
    """Arrows of DESIGN.md: the command line, tools, services, export and runtime, what both stand on, errors."""
    arrows = {
        (name.split(".")[1], path.relative_to(ROOT).as_posix())
        for path in ([ROOT / "errors.py"] if room == "errors" else files(room))
        for name in imported(path)
        if name.startswith("hypersd.") and name != "hypersd.__version__"
    }
    wrong = sorted(f"{place} imports {other}" for other, place in arrows if other not in MAY_IMPORT[room] | {room})
    assert wrong == []
    assert arrows or room == "errors", "no import of the package's own was seen: the walk is broken"


def test_graphs_know_nothing_of_tensorrt() -> None:
    """The one arrow between the rooms inside engines/: tensorrt/ may import cuda/."""
    names = {name for path in files("engines/cuda") for name in imported(path)}
    assert "hypersd.engines.engine" in names
    assert not any(name.startswith("hypersd.engines.tensorrt") for name in names)
