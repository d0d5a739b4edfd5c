"""The recorded versions of TensorRT and their stand-ins, and how an installed backend is found and imported."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import record_tensorrt_api

from hypersd.engines.tensorrt import api as api_module
from hypersd.engines.tensorrt.api import OLDEST, installed_version, load_api
from hypersd.errors import DeviceError, RequestError

from .surface import PLAIN, RTX, VERSIONS, StandIn

ROOT = Path(api_module.__file__).parent


# the recordings


def test_recordings_reach_from_the_oldest_version_to_11() -> None:
    """Both ends of what is supported, and both sides of 10.14, which is the first with attention."""
    releases = {api_module._release(name.partition("-")[2]) for name in PLAIN}
    assert min(releases) == OLDEST["tensorrt"]
    assert {(10, 13), (10, 14), (11, 0)} <= releases
    assert min(api_module._release(name.partition("-")[2]) for name in RTX) >= OLDEST["tensorrt-rtx"]


def test_the_installed_version_is_what_was_recorded() -> None:
    """The recorder, run on the backend that is installed whole, says what its file says."""
    import tensorrt_rtx

    recording = VERSIONS.get(f"tensorrt_rtx-{tensorrt_rtx.__version__}")
    if recording is None:
        pytest.skip(f"no recording of tensorrt_rtx {tensorrt_rtx.__version__}")
    expected = {"package": "tensorrt_rtx", **record_tensorrt_api.record(tensorrt_rtx)}
    assert json.loads(recording.read_text()) == expected


def test_the_recorder_knows_every_name_that_the_package_uses() -> None:
    """A class that the package begins to use must be recorded, else no test would see where it is missing."""
    used = set()
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[-1] == "trt":
                used.add(node.attr)
    assert {"Builder", "Runtime", "BuilderFlag"} <= used
    assert used - {"__version__"} <= {*record_tensorrt_api.CLASSES, *record_tensorrt_api.ENUMS}


def test_the_stand_in_rejects_what_its_version_lacks() -> None:
    """The stand-in itself: no other attribute, no other arguments, no other enum member, and no new attribute."""
    stand_in = StandIn(VERSIONS["tensorrt-10.8.0.43"])
    builder = stand_in.module.Builder(stand_in.module.ILogger())
    with pytest.raises(AttributeError):
        builder.build_serialized_network_to_stream  # noqa: B018
    with pytest.raises(AttributeError):
        stand_in.module.IStreamWriter  # noqa: B018
    with pytest.raises(AttributeError):
        builder.no_such_setting = 1
    with pytest.raises(TypeError, match=r"flags: int"):
        builder.create_network("strongly typed")
    with pytest.raises(TypeError):
        builder.create_network(0, 0)
    with pytest.raises(TypeError):
        stand_in.make("ICudaEngine").create_execution_context(stand_in.module.ProfilingVerbosity.DETAILED)
    with pytest.raises(AttributeError):
        stand_in.make("ICudaEngine").num_io_tensors = 3
    with pytest.raises(NotImplementedError):
        stand_in.make("ICudaEngine").num_io_tensors  # noqa: B018


# finding and importing a backend


@pytest.fixture
def nothing_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A folder to install a backend in; no backend has been imported, and none is when the test is over."""
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)  # so that monkeypatch puts back what was there
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    load_api.cache_clear()
    yield tmp_path
    load_api.cache_clear()


def install(folder: Path, module: str, code: str) -> None:
    (folder / module).mkdir()
    (folder / module / "__init__.py").write_text(code)


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_a_backend_that_is_not_installed(backend: str, nothing_loaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line with the way to install it."""
    monkeypatch.setitem(sys.modules, backend.replace("-", "_"), None)
    title = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}[backend]
    assert installed_version(backend) is None
    with pytest.raises(DeviceError, match=rf"^{title} is not installed: pip install -e '\.\[{backend}\]'$"):
        load_api(backend)


@pytest.mark.parametrize(
    ("backend", "version", "oldest"),
    [("tensorrt", "10.2.0.post1", "10.3"), ("tensorrt", "8.6.1", "10.3"), ("tensorrt-rtx", "1.6.0.42", "1.7")],
)
def test_a_backend_that_is_too_old(backend: str, version: str, oldest: str, nothing_loaded: Path) -> None:
    """Numbers are compared as numbers: 8 is older than 10."""
    install(nothing_loaded, backend.replace("-", "_"), f"__version__ = {version!r}")
    message = rf"^TensorRT(-RTX)? {version} is too old, expected {oldest}: pip install -e '\.\[{backend}\]' -U$"
    with pytest.raises(DeviceError, match=message):
        load_api(backend)


@pytest.mark.parametrize(
    ("backend", "version"), [("tensorrt", "10.3.0"), ("tensorrt", "11.0"), ("tensorrt-rtx", "2.0")]
)
def test_a_backend_that_is_new_enough(backend: str, version: str, nothing_loaded: Path) -> None:
    """The oldest itself, and a next major version. Installed without pip, its version is its own word."""
    install(nothing_loaded, backend.replace("-", "_"), f"__version__ = {version!r}")
    api = load_api(backend)
    assert (api.backend, api.version) == (backend, version)
    if backend == "tensorrt":
        assert installed_version(backend) == version


def test_a_folder_of_that_name_is_no_backend(nothing_loaded: Path) -> None:
    """An empty folder ``tensorrt`` where Python looks is importable, and yet nothing is installed."""
    (nothing_loaded / "tensorrt").mkdir()
    assert installed_version("tensorrt") is None
    with pytest.raises(DeviceError, match=r"^TensorRT without a version is too old"):
        load_api("tensorrt")


def test_libraries_that_are_missing(nothing_loaded: Path) -> None:
    """The wheel of the bindings is there, what it loads is not: one line with the loader's words and what to do."""
    code = "raise ImportError('libnvinfer.so.10: cannot open shared object file:\\nNo such file or directory')"
    install(nothing_loaded, "tensorrt", code)
    message = (
        r"^TensorRT cannot be loaded: libnvinfer\.so\.10: cannot open shared object file: No such file or directory; "
        r"install it anew: pip install -e '\.\[tensorrt\]'$"
    )
    with pytest.raises(DeviceError, match=message):
        load_api("tensorrt")
    assert installed_version("tensorrt") is None


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt_rtx", ""])
def test_a_backend_that_is_none(backend: str) -> None:
    """Not even a module's name will do: it never comes to an import."""
    with pytest.raises(RequestError, match=r"is not TensorRT: expected tensorrt or tensorrt-rtx$"):
        load_api(backend)


def test_the_real_backend_loads() -> None:
    """tensorrt_rtx as it is installed."""
    api = load_api("tensorrt-rtx")
    assert api.is_rtx
    assert str(api) == f"TensorRT-RTX {importlib.metadata.version('tensorrt-rtx')}"
    assert "8.9" in api.compute_capabilities


def test_looking_for_a_version_imports_nothing() -> None:
    """``hypersd info`` asks for versions: that must cost no seconds of loading libraries, nor their memory."""
    program = """if True:
        import sys
        import sys
        from hypersd.engines.tensorrt.api import installed_version
        print(installed_version("tensorrt-rtx"), "tensorrt_rtx" in sys.modules)
        print([name for name in sys.modules if name.startswith("tensorrt")])
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == [f"{importlib.metadata.version('tensorrt-rtx')} False", "[]"]
