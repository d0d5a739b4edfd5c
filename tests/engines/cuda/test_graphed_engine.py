"""An engine that is replayed: the engine's own results, one graph for each stream and set of shapes.

Recording is a stand-in here (tests/capture_stand_in.py); tests/gpu has the real one.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from capture_stand_in import Capturable, StandInCapture
from counting import load_engines
from torch import Tensor

from hypersd.engines import Bundle
from hypersd.engines.cuda.graphs import WARM_UPS, GraphedEngine
from hypersd.engines.engine import TORCH_DTYPES, NullEngine
from hypersd.engines.specs import Component, Range, TensorSpec, dim_range
from hypersd.errors import EngineError

pytestmark = pytest.mark.filterwarnings("error::hypersd.engines.cuda.graphs.GraphWarning")
RUNS = WARM_UPS + 3


def feeds_for(specs: Mapping[str, TensorSpec], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    feeds = {}
    for name, spec in specs.items():
        shape = [dim_range(dim).opt for dim in spec.shape]
        if spec.dtype == "int64":
            feeds[name] = torch.randint(256, shape, generator=generator)
        else:
            feeds[name] = torch.randn(shape, generator=generator).to(TORCH_DTYPES[spec.dtype])
    return feeds


def ranged_null_engine() -> NullEngine:
    rows = Range(name="rows", min=1, opt=2, max=4)
    spec = TensorSpec(dtype="float32", shape=(rows, 3))
    return NullEngine("net", Component(inputs={"x": spec}, outputs={"y": spec}, files=("net.onnx",), key="0" * 64))


def test_every_network_gives_what_its_engine_gives(sd15_bundle: Path) -> None:
    """Before, at and after the recording, on fresh inputs at other addresses each time."""
    capture = StandInCapture()
    engines = load_engines(Bundle.load(sd15_bundle), "onnxruntime", "cpu")
    for engine in engines.values():
        graphed = GraphedEngine(Capturable(engine), capture)
        assert graphed.capturable
        assert (graphed.inputs, graphed.outputs, graphed.device) == (engine.inputs, engine.outputs, engine.device)
        for seed in range(RUNS):
            feeds = feeds_for(engine.inputs, seed)
            actual = {name: tensor.clone() for name, tensor in graphed.run(feeds).items()}
            expected = engine.run(feeds)
            assert set(actual) == set(expected)
            for name, tensor in actual.items():
                torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
    assert (capture.captures, capture.replays) == (len(engines), 3 * len(engines))


def test_each_set_of_shapes_has_its_own_graph() -> None:
    """In whatever order they come."""
    capture, engine = StandInCapture(), ranged_null_engine()
    graphed = GraphedEngine(engine, capture)
    for _ in range(RUNS):
        for rows in (1, 4, 2):
            assert graphed.run({"x": torch.ones(rows, 3)})["y"].shape == (rows, 3)
    assert (capture.captures, capture.replays) == (3, 3 * 3)


def test_threads_that_take_turns_share_graphs() -> None:
    """A graph is the stream's: a thread for every run gets to a recording too, and to no second one."""
    capture = StandInCapture()
    graphed = GraphedEngine(ranged_null_engine(), capture)
    for _ in range(RUNS):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(graphed.run, {"x": torch.ones(2, 3)}).result(60)
    assert (capture.captures, capture.replays) == (1, 3)


def test_whether_it_can_be_recorded_is_the_engines_word_of_now() -> None:
    """Some engines know only when they have run."""
    engine = ranged_null_engine()
    graphed = GraphedEngine(engine)
    for engine.capturable in (False, True, False):
        assert graphed.capturable is engine.capturable


class Stream:
    """As much of a CUDA stream as is asked of one."""

    def __init__(self, address: int) -> None:
        self.cuda_stream = address


def test_streams_have_graphs_of_their_own_and_the_default_stream_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine has a context for each stream, and recording on the default stream would have to begin another's.

    Neither is a graph begun inside one that is being recorded. The CUDA device is a fake.
    """
    default, one, two = Stream(0), Stream(100), Stream(200)
    now = SimpleNamespace()
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: default)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now.stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now.is_capturing)
    engine, capture = ranged_null_engine(), StandInCapture()
    graphed = GraphedEngine(engine, capture)
    engine.device = torch.device("cuda", 0)
    engine.run = lambda feeds: {"y": feeds["x"] + 1}
    captures = []
    for now.stream, now.is_capturing in ((default, False), (one, True), (one, False), (two, False), (one, False)):
        for _ in range(RUNS):
            assert graphed.run({"x": torch.ones(2, 3)})["y"].eq(2).all()
        captures.append(capture.captures)
    assert captures == [0, 0, 1, 2, 2]


def test_bad_inputs_are_rejected_as_the_engine_rejects_them() -> None:
    """Also where a graph exists: it is not replayed on inputs that it was not recorded for."""
    graphed = GraphedEngine(ranged_null_engine(), StandInCapture())
    for _ in range(RUNS):
        graphed.run({"x": torch.ones(2, 3)})
    for bad in ({"x": torch.ones(5, 3)}, {"x": torch.ones(2, 3).half()}, {}, {"z": torch.ones(2, 3)}):
        with pytest.raises(EngineError, match=r"^net: "):
            graphed.run(bad)
    assert graphed.run({"x": torch.ones(2, 3)})["y"].shape == (2, 3)
