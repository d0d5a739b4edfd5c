"""Engines that are loaded late and released: one stage at a time, once for all threads, and the memory really back."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from small_graphs import component
from torch import Tensor

from hypersd.engines.cuda.device import one_capture
from hypersd.engines.engine import NullEngine
from hypersd.engines.late_engine import LateEngine
from hypersd.engines.staged_engines import StagedEngines
from hypersd.errors import EngineError

STAGES = {
    "text_encoder": "text",
    "text_encoder_2": "text",
    "controlnet_cond_embedding/canny": "embedding",
    "vae_encoder": "encoder",
    "unet": "unet",
    "controlnet/canny": "unet",
    "controlnet/scribble": "unet",
    "vae_decoder": "decoder",
}
COMPONENT = component({"x": (2,)}, {"y": (2,)})
FEEDS = {"x": torch.zeros(2)}
WIDTH, LAYERS = 2048, 6
MB = WIDTH * WIDTH * LAYERS * 4 / 1e6  # of the weights


class Shelf:
    """Loaders of engines that compute nothing; knows which of them were loaded, and which still exist."""

    def __init__(self) -> None:
        self.loads: list[str] = []
        self.alive: weakref.WeakValueDictionary[str, NullEngine] = weakref.WeakValueDictionary()

    def load(self, name: str) -> NullEngine:
        assert name not in self.alive, f"{name} is loaded twice"
        self.loads.append(name)
        self.alive[name] = engine = NullEngine(name, COMPONENT)
        return engine

    def staged(self) -> StagedEngines:
        return StagedEngines({name: LateEngine(COMPONENT, lambda name=name: self.load(name)) for name in STAGES})


RUNS = st.lists(st.sampled_from([*STAGES, None]), max_size=30)


@given(runs=RUNS)
def test_the_engines_that_exist_are_of_the_stage_that_ran_last(runs: list[str | None]) -> None:
    """Each was loaded since the stage began, once, and only if it ran; None releases all."""
    shelf = Shelf()
    engines = shelf.staged()
    assert set(engines) == set(STAGES)
    expected: set[str] = set()
    loads = 0
    for name in runs:
        if name is None:
            engines.release()
            expected = set()
        else:
            expected = {each for each in expected if STAGES[each] == STAGES[name]}
            loads += name not in expected
            expected.add(name)
            assert engines[name].run(FEEDS)["y"].shape == (2,)
        assert set(shelf.alive) == expected
        assert len(shelf.loads) == loads


@settings(max_examples=40)  # each starts threads
@given(lists=st.lists(RUNS, min_size=2, max_size=4))
def test_threads_never_see_two_stages(lists: list[list[str | None]]) -> None:
    """Whatever they run beside each other; a load asserts that the engine does not exist already."""
    shelf = Shelf()
    engines = shelf.staged()

    def run(names: list[str | None]) -> None:
        for name in names:
            if name is None:
                engines.release()
            else:
                engines[name].run(FEEDS)

    with ThreadPoolExecutor(len(lists)) as pool:
        list(pool.map(run, lists))
    assert len({STAGES[name] for name in shelf.alive}) <= 1
    engines.release()
    assert not shelf.alive


def test_a_load_that_fails_leaves_nothing_and_is_tried_again() -> None:
    """The stage before it was released all the same: there was perhaps no memory for both."""
    shelf, attempts = Shelf(), []

    def load() -> NullEngine:
        attempts.append(set(shelf.alive))
        if len(attempts) == 1:
            raise EngineError("no memory")
        return shelf.load("unet")

    late = {
        "text_encoder": LateEngine(COMPONENT, lambda: shelf.load("text_encoder")),
        "unet": LateEngine(COMPONENT, load),
    }
    engines = StagedEngines(late)
    engines["text_encoder"].run(FEEDS)
    with pytest.raises(EngineError, match="no memory"):
        engines["unet"].run(FEEDS)
    engines["unet"].run(FEEDS)
    assert attempts == [set(), set()]


def test_on_a_gpu_a_release_waits_for_the_engines_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the streams that it ran on are waited for, once each; nothing is freed during a capture.

    Streams and allocator are stand-ins.
    """
    events: list[str] = []

    class Stream:
        """A stand-in for a CUDA stream."""

        def __init__(self, name: str) -> None:
            self.name = name

        def synchronize(self) -> None:
            events.append(f"waited for {self.name}")

    streams = [Stream("one"), Stream("two")]
    current = SimpleNamespace(stream=streams[0])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current.stream)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("cache emptied"))

    class Engine(NullEngine):
        def run(self, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            events.append("ran")
            return super().run(feeds)

    def load() -> NullEngine:
        engine = Engine("unet", COMPONENT)
        weakref.finalize(engine, lambda: events.append("freed" if one_capture.locked() else "freed in a capture"))
        return engine

    late = LateEngine(COMPONENT, load, torch.device("cuda", 0))
    assert not late.capturable, "a graph would keep it"
    late.release()
    assert events == [], "nothing to release"
    late.run(FEEDS)
    late.run(FEEDS)
    late.release()
    late.release()
    assert events == ["ran", "ran", "waited for one", "freed", "cache emptied"]
    events.clear()
    current.stream = streams[1]
    late.run(FEEDS)
    late.release()
    assert events == ["ran", "waited for two", "freed", "cache emptied"]


MEASURE = """if True:
    import json, re, sys
    from pathlib import Path
    import torch
    from hypersd.engines.late_engine import LateEngine
    from hypersd.engines.specs import Component, TensorSpec

    def memory():
        return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1e3

    path, backend, width = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    spec = TensorSpec(dtype="float32", shape=(64, width))
    component = Component(inputs={"x": spec}, outputs={"y": spec}, files=("net.onnx", "net.onnx_data"), key="0" * 64)
    if backend == "onnxruntime":
        from hypersd.engines.onnx_runtime import OnnxRuntimeEngine
        load = lambda: OnnxRuntimeEngine("net", path, component, torch.device("cpu"))
    else:
        from hypersd.engines.openvino.library import core
        from hypersd.engines.openvino.openvino_engine import OpenVinoEngine
        core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        load = lambda: OpenVinoEngine("net", path, component, "fp32")
    late, figures = LateEngine(component, load), []
    for _ in range(3):
        late.run({"x": torch.full((64, width), 0.5)})
        figures.append(memory())
        late.release()
        figures.append(memory())
    print(json.dumps({"figures": figures, "maps": str(path.parent) in Path("/proc/self/maps").read_text()}))
"""


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph of matrix products, whose weights of 100 MB lie beside it."""
    path = tmp_path_factory.mktemp("layers") / "net.onnx"
    weights = [
        numpy_helper.from_array(np.full((WIDTH, WIDTH), 1 / (WIDTH + i), np.float32), f"w{i}") for i in range(LAYERS)
    ]
    names = ["x", *(f"h{i}" for i in range(LAYERS - 1)), "y"]
    nodes = [helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]]) for i in range(LAYERS)]
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [64, WIDTH]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, path, save_as_external_data=True, location="net.onnx_data", size_threshold=1024)
    return path


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_release_gives_the_memory_back_at_once(backend: str, layers: Path) -> None:
    """Weights, their packed copies and the mapping of the file, also the second and third time."""
    pytest.importorskip(backend)
    program = [sys.executable, "-c", MEASURE, str(layers), backend, str(WIDTH)]
    done = subprocess.run(program, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    loaded, released = figures["figures"][::2], figures["figures"][1::2]
    for before, after in zip(loaded, released, strict=True):
        assert before - after > 0.8 * MB, figures
    assert max(released) - min(released) < 0.3 * MB, figures
    assert not figures["maps"], "no file of the bundle is mapped any more"
