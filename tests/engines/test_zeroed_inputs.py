"""A UNet that takes residuals, without any: zeros of the right shapes, made once, shared and never written."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from capture_stand_in import Capturable, StandInCapture
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper
from torch import Tensor

from hypersd.engines.by_shapes import KEPT
from hypersd.engines.cuda.graphs import WARM_UPS, GraphedFunction
from hypersd.engines.engine import check_feeds
from hypersd.engines.specs import Range, TensorSpec
from hypersd.engines.zeroed_inputs import ZeroedInputs
from hypersd.errors import EngineError

from .test_onnx_runtime import write_model

ROWS = Range(name="batch", min=1, opt=2, max=64)
HEIGHT = Range(name="latent_height", min=8, opt=8, max=32)
INPUTS = {
    "sample": TensorSpec(dtype="float32", shape=(ROWS, 1, HEIGHT, 8)),
    "down": TensorSpec(dtype="float16", shape=(ROWS, 2, HEIGHT.halved(1), 4)),
    "mid": TensorSpec(dtype="float32", shape=(ROWS, 2, HEIGHT.halved(2), 2)),
    "timestep": TensorSpec(dtype="float32", shape=(1,)),
}
ZEROED = ("down", "mid")
OUTPUTS = {"out": INPUTS["sample"]}


class Recording:
    """Checks its inputs as a real engine does, keeps them, and gives twice the sample plus all that is no zero."""

    def __init__(self) -> None:
        self.inputs, self.outputs = INPUTS, OUTPUTS
        self.device = torch.device("cpu")
        self.capturable = True
        self.seen: list[Mapping[str, Tensor]] = []

    def run(self, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        check_feeds("net", self.inputs, feeds, self.device)
        self.seen.append(feeds)
        return {"out": 2 * feeds["sample"] + sum(feeds[name].float().sum() for name in ZEROED)}


def feeds_at(rows: int, height: int, value: float = 1.0) -> dict[str, Tensor]:
    return {"sample": torch.full((rows, 1, height, 8), value), "timestep": torch.ones(1)}


def zeros_of(feeds: Mapping[str, Tensor]) -> list[Tensor]:
    return [feeds[name] for name in ZEROED]


@pytest.fixture
def engine() -> Recording:
    return Recording()


@pytest.fixture
def zeroed(engine: Recording) -> ZeroedInputs:
    return ZeroedInputs(engine, ZEROED)


@given(rows=st.integers(1, 8), height=st.integers(8, 32))
def test_the_engine_gets_zeros(rows: int, height: int) -> None:
    """In each input's own dtype and the shape that follows from the sample's, odd ones rounded up."""
    engine = Recording()
    out = ZeroedInputs(engine, ZEROED).run(feeds_at(rows, height))["out"]
    (feeds,) = engine.seen
    assert {name: (feeds[name].dtype, tuple(feeds[name].shape)) for name in ZEROED} == {
        "down": (torch.float16, (rows, 2, (height + 1) // 2, 4)),
        "mid": (torch.float32, (rows, 2, (height + 3) // 4, 2)),
    }
    assert not any(tensor.any() for tensor in zeros_of(feeds))
    assert torch.equal(out, feeds_at(rows, height, 2.0)["sample"])


def test_it_is_an_engine_without_those_inputs(engine: Recording, zeroed: ZeroedInputs) -> None:
    """All else is the engine's own, and its refusals too."""
    assert zeroed.inputs == {name: INPUTS[name] for name in ("sample", "timestep")}
    assert (zeroed.outputs, zeroed.device, zeroed.capturable) == (OUTPUTS, engine.device, True)
    with pytest.raises(EngineError, match=r"expected the inputs"):
        zeroed.run({"sample": torch.zeros(1, 1, 8, 8)})
    with pytest.raises(EngineError, match=r"input 'sample' expected"):
        zeroed.run(feeds_at(1, 33))


def test_the_callers_tensors_go_through(engine: Recording, zeroed: ZeroedInputs) -> None:
    """No copies, and the caller's feeds stay as they are."""
    feeds = feeds_at(1, 8)
    before = dict(feeds)
    zeroed.run(feeds)
    assert feeds == before
    assert all(engine.seen[0][name] is tensor for name, tensor in before.items())


def test_zeros_are_made_once(engine: Recording, zeroed: ZeroedInputs) -> None:
    """The same tensors at the same shape, whatever ran in between: a step must not cost an allocation."""
    for rows, height in [(1, 8), (2, 8), (1, 8), (1, 9), (2, 8), (1, 8)]:
        zeroed.run(feeds_at(rows, height))
    first, second, *later = [zeros_of(feeds) for feeds in engine.seen]
    assert not {id(tensor) for tensor in first} & {id(tensor) for tensor in second}
    for again, expected in [(later[0], first), (later[2], second), (later[3], first)]:
        assert all(tensor is earlier for tensor, earlier in zip(again, expected, strict=True))


def test_few_shapes_are_kept(engine: Recording, zeroed: ZeroedInputs) -> None:
    """Memory is bounded; what goes is what was used the longest ago."""
    made: dict[int, weakref.ref] = {}

    def run(rows: int) -> None:
        zeroed.run(feeds_at(rows, 8))
        made.setdefault(rows, weakref.ref(engine.seen.pop()["down"]))

    for rows in range(1, KEPT + 4):
        run(rows)
        run(1)
    gc.collect()
    last = range(KEPT + 3, 4, -1)
    assert [rows for rows, zeros in made.items() if zeros() is not None] == [1, *sorted(last)]
    assert len([*last, 1]) == KEPT


def test_nothing_varies() -> None:
    """A bundle of one fixed shape has one set of zeros."""
    engine = Recording()
    engine.inputs = {
        "sample": TensorSpec(dtype="float32", shape=(1, 1, 8, 8)),
        "down": TensorSpec(dtype="float16", shape=(1, 2, 4, 4)),
        "mid": TensorSpec(dtype="float32", shape=(1, 2, 2, 2)),
    }
    zeroed = ZeroedInputs(engine, ZEROED)
    for _ in range(2):
        zeroed.run({"sample": torch.ones(1, 1, 8, 8)})
    first, second = map(zeros_of, engine.seen)
    assert [tuple(tensor.shape) for tensor in first] == [(1, 2, 4, 4), (1, 2, 2, 2)]
    assert all(one is other for one, other in zip(first, second, strict=True))


def test_a_graph_takes_its_zeros_along(engine: Recording) -> None:
    """A recorded graph reads their addresses at every replay: they live as long as it does, whatever else runs."""
    zeroed = ZeroedInputs(engine, ZEROED)

    def capture(work: Any, memory: Any) -> Any:
        outputs = work()
        return lambda: None, outputs

    graphed = GraphedFunction(lambda _, feeds: zeroed.run(feeds), capture, kept=1)
    for _ in range(WARM_UPS + 1):
        graphed(None, feeds_at(1, 8))
    recorded = weakref.ref(engine.seen[-1]["down"])
    for rows in range(2, KEPT + 4):
        zeroed.run(feeds_at(rows, 8))
    engine.seen.clear()
    gc.collect()
    assert recorded() is not None
    graphed(None, feeds_at(2, 8))  # takes the graph's place
    engine.seen.clear()
    gc.collect()
    assert recorded() is None


@pytest.fixture
def eager_switches() -> Iterator[None]:
    """Threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("eager_switches")
def test_several_threads(engine: Recording, zeroed: ZeroedInputs) -> None:
    """At more shapes than are kept each gets what belongs to its own, and no more are kept than may be."""

    def draw(thread: int) -> None:
        for i in range(150):
            rows, height = 1 + (7 * i + thread) % (KEPT + 3), 8 + i % 2
            out = zeroed.run(feeds_at(rows, height, float(thread)))["out"]
            assert torch.equal(out, feeds_at(rows, height, 2.0 * thread)["sample"])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(draw, range(4)))
    assert len(engine.seen) == 600
    kept = [weakref.ref(feeds["mid"]) for feeds in engine.seen]
    engine.seen.clear()
    gc.collect()
    assert len({id(zeros()) for zeros in kept if zeros() is not None}) <= KEPT


@pytest.fixture
def adding(tmp_path: Path) -> SimpleNamespace:
    """A real engine whose output is the sum of its inputs: it may reuse the memory of what it adds."""
    shape = (ROWS, 1, HEIGHT, 8)
    nodes = [
        helper.make_node("Add", ["sample", "down"], ["both"]),
        helper.make_node("Add", ["both", "mid"], ["out"]),
    ]
    inputs = {"sample": shape, "down": shape, "mid": shape}
    engine = write_model(tmp_path / "net.onnx", nodes, inputs, {"out": shape})
    made: list[Tensor] = []

    def run(feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        made.extend(zeros_of(feeds))
        return engine.run(feeds)

    spied = SimpleNamespace(
        inputs=engine.inputs, outputs=engine.outputs, device=engine.device, capturable=False, run=run
    )
    return SimpleNamespace(zeroed=ZeroedInputs(spied, ZEROED), made=made)


def test_zeros_stay_zeros(adding: SimpleNamespace) -> None:
    """ONNX Runtime reads them for thousands of steps, in several threads, and its own buffers are others."""

    def draw(thread: int) -> None:
        for i in range(100):
            sample = torch.full((1 + i % 3, 1, 8, 8), thread + i / 128)
            out = adding.zeroed.run({"sample": sample})["out"]
            assert torch.equal(out, sample)
            out.fill_(99.0)  # the buffer is the caller's until the next run

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(draw, range(4)))
    assert len(adding.made) == 800
    assert not any(tensor.any() for tensor in adding.made)


def test_it_can_be_recorded(engine: Recording) -> None:
    """Recording finds the zeros of the warm-ups, and replays give the engine's own results on new inputs."""
    zeroed = ZeroedInputs(Capturable(engine), ZEROED)
    capture = StandInCapture()
    graphed = GraphedFunction(lambda _, feeds: zeroed.run(feeds), capture)
    for i in range(WARM_UPS + 3):
        out = graphed(None, feeds_at(2, 9, float(i)))["out"]
        assert torch.equal(out, feeds_at(2, 9, 2.0 * i)["sample"])
    assert capture.captures == 1
    assert len({id(feeds["down"]) for feeds in engine.seen}) == 1
