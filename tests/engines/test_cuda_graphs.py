"""What is recorded when, what belongs together, and what is dropped: the bookkeeping of CUDA graphs.

Recording itself is a stand-in here (tests/capture_stand_in.py); tests/gpu/test_graphs.py has the real one.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from capture_stand_in import StandInCapture
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hypersd.engines import cuda_graphs
from hypersd.engines.cuda_graphs import WARM_UPS, GraphedFunction, retain
from hypersd.errors import EngineError


class Scale:
    """out = key * x + y, in a buffer that every run overwrites; counts its runs and keeps their inputs' addresses."""

    def __init__(self) -> None:
        self.runs: list[Any] = []
        self.addresses: list[int] = []
        self.buffer = torch.empty(64)

    def __call__(self, key: float, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.runs.append(key)
        self.addresses.append(inputs["x"].data_ptr())
        size = inputs["x"].numel()
        self.buffer[:size].copy_((key * inputs["x"] + inputs["y"]).flatten())
        return {"out": self.buffer[:size]}


def feeds(value: float, size: int = 3) -> dict[str, Tensor]:
    return {"x": torch.arange(float(size)) + value, "y": torch.full((size,), value)}


def expected(key: float, value: float, size: int = 3) -> Tensor:
    return key * (torch.arange(float(size)) + value) + value


def test_two_warm_ups_one_recording_then_replays() -> None:
    """The order that libraries need: run, run, record (right after a run at these shapes), replay from then on."""
    work, capture = Scale(), StandInCapture()
    graphed = GraphedFunction(work, capture)
    counts = []
    for i in range(6):
        assert torch.equal(graphed(2, feeds(i))["out"], expected(2, i))
        counts.append((capture.captures, capture.replays))
    assert counts == [(0, 0)] * WARM_UPS + [(1, 1), (1, 2), (1, 3), (1, 4)]
    assert len(work.runs) == WARM_UPS + 2 + 4, "the stand-in computes a replay by running the work"


def test_inputs_and_outputs_have_one_place_for_ever() -> None:
    """What a graph reads and writes never moves, wherever the caller's tensors lie; those are left alone."""
    work, capture = Scale(), StandInCapture()
    graphed = GraphedFunction(work, capture)
    places = set()
    for i in range(6):
        mine = feeds(i)
        outputs = graphed(2, mine)
        mine["x"].zero_()
        if i >= WARM_UPS:
            places.add(outputs["out"].data_ptr())
            assert torch.equal(outputs["out"], expected(2, i)), "the graph reads a copy"
    assert len(set(work.addresses)) == len(places) == 1


def test_strided_inputs_are_laid_out_plainly() -> None:
    """Engines take contiguous tensors only."""
    seen = []

    def work(key: int, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        seen.append(inputs["x"].is_contiguous())
        return {"out": inputs["x"] + 1}

    x = torch.arange(6.0).reshape(2, 3).T
    for _ in range(5):
        assert torch.equal(GraphedFunction(work, StandInCapture())(0, {"x": x})["out"], x + 1)
    assert all(seen)


@pytest.mark.parametrize(
    "other",
    [
        (2, {"x": torch.ones(2, 2), "y": torch.ones(2, 2)}),
        (2, {"x": torch.ones(4).double(), "y": torch.ones(4)}),
        (3, {"x": torch.ones(4), "y": torch.ones(4)}),
        (2, {"x": torch.ones(4), "y": torch.ones(4), "z": torch.ones(4)}),
    ],
    ids=["shape", "dtype", "key", "names"],
)
def test_another_kind_of_call_is_another_graph(other: tuple[int, dict[str, Tensor]]) -> None:
    """Key, names, dtypes and shapes: where one differs, nothing is shared."""
    capture = StandInCapture()
    graphed = GraphedFunction(Scale(), capture)
    first = (2, {"x": torch.ones(4), "y": torch.ones(4)})
    results = [[graphed(*call)["out"].clone() for call in (first, other)] for _ in range(5)]
    assert capture.captures == 2
    for one, two in results:
        assert torch.equal(one, torch.full((4,), 3.0))
        assert torch.equal(two, torch.full((4,), other[0] + 1.0))
    again = {name: first[1][name] for name in ("y", "x")}
    graphed(2, again)
    assert capture.captures == 2, "the order of the inputs is no difference"


@settings(max_examples=60, deadline=None)
@given(
    calls=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(-5, 5)), max_size=40),
    kept=st.integers(1, 4),
)
def test_any_sequence_of_calls_gives_what_the_work_gives(calls: list[tuple[int, int, int]], kept: int) -> None:
    """Whatever comes in whatever order, recorded, evicted, recorded again: the results are the plain ones."""
    graphed = GraphedFunction(Scale(), StandInCapture(), kept=kept)
    for key, size, value in calls:
        assert torch.equal(graphed(key, feeds(value, size))["out"], expected(key, value, size))


# Memory


class Owner:
    """Something that owns memory which a graph writes to."""


def test_a_graph_keeps_its_memory_and_takes_it_along() -> None:
    """What was retained while recording lives exactly as long as the graph, and so do its inputs and outputs."""
    made: list[weakref.ref] = []
    inputs_seen: list[weakref.ref] = []

    def work(key: int, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        owner = Owner()
        made.append(weakref.ref(owner))
        inputs_seen.append(weakref.ref(inputs["x"]))
        retain(owner)
        return {"out": inputs["x"] + key}

    def capture(do: Any) -> Any:
        outputs = do()
        return lambda: None, outputs

    graphed = GraphedFunction(work, capture, kept=2)
    for _ in range(4):
        output = weakref.ref(graphed(1, {"x": torch.ones(3)})["out"])
    gc.collect()
    alive = [reference for reference in made if reference() is not None]
    assert len(made) == WARM_UPS + 2
    assert alive == made[-1:], "only the recording retains"
    for key in (2, 1, 3):  # the least recently used goes first, and that is 2
        graphed(key, {"x": torch.ones(3)})
    gc.collect()
    assert made[3]() is not None
    graphed(4, {"x": torch.ones(3)})
    graphed(5, {"x": torch.ones(3)})
    gc.collect()
    assert made[3]() is None
    assert output() is None
    assert inputs_seen[3]() is None


def test_retain_outside_a_recording_keeps_nothing() -> None:
    """Engines call it at every run."""
    owner = Owner()
    reference = weakref.ref(owner)
    retain(owner)
    del owner
    gc.collect()
    assert reference() is None


def test_the_graph_goes_before_the_next_one_is_made() -> None:
    """With room for one key the evicted entry's memory is free when the new key's buffers are allocated."""
    alive: list[int] = []
    references: list[weakref.ref] = []

    def work(key: int, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        references.append(weakref.ref(inputs["x"]))
        gc.collect()
        alive.append(len({id(one()) for one in references if one() is not None}))
        return {"out": inputs["x"] * key}

    graphed = GraphedFunction(work, StandInCapture(), kept=1)
    for key in (1, 1, 1, 1, 2, 2, 2, 3):
        graphed(key, {"x": torch.ones(2)})
    assert set(alive) == {1}


# Failures


def test_a_failed_recording_says_so_drops_the_graph_and_leaves_the_rest() -> None:
    """The key starts anew, so that the function stays usable; other keys keep their graphs."""

    class FailsTwice(StandInCapture):
        failures = 0

        def __call__(self, work: Any) -> Any:
            if self.captures == 1 and self.failures < 2:
                self.failures += 1
                raise EngineError("CUDA graph: recording failed")
            return super().__call__(work)

    capture = FailsTwice()
    graphed = GraphedFunction(Scale(), capture)
    for i in range(4):
        graphed(1, feeds(i))
    for _ in range(2):
        for i in range(WARM_UPS):
            assert torch.equal(graphed(2, feeds(i))["out"], expected(2, i))
        with pytest.raises(EngineError, match="recording failed"):
            graphed(2, feeds(9))
    assert torch.equal(graphed(1, feeds(5))["out"], expected(1, 5))
    for i in range(5):
        assert torch.equal(graphed(2, feeds(i))["out"], expected(2, i))
    assert capture.captures == 2


def test_an_error_of_the_work_is_its_own() -> None:
    """Before anything is recorded an error is that of the work, and the next call is served."""
    fail = [True]

    def work(key: int, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if fail[0]:
            raise ValueError("mine")
        return {"out": inputs["x"] * key}

    graphed = GraphedFunction(work, StandInCapture())
    for _ in range(4):
        with pytest.raises(ValueError, match="mine"):
            graphed(2, {"x": torch.ones(2)})
    fail[0] = False
    for _ in range(5):
        assert torch.equal(graphed(2, {"x": torch.ones(2)})["out"], torch.full((2,), 2.0))


def test_the_error_names_what_went_wrong_first() -> None:
    """Once a recording is invalid all that follows fails too: the end of the recording is not the cause."""
    try:
        try:
            try:
                raise RuntimeError("cudaMalloc: operation not permitted")
            except RuntimeError as error:
                raise EngineError("unet: ONNX Runtime failed: cudaMalloc: operation not permitted") from error
        finally:
            raise RuntimeError("capture was invalidated")
    except RuntimeError as error:
        assert str(cuda_graphs._first_cause(error)).startswith("unet: ONNX Runtime failed: cudaMalloc")
    assert str(cuda_graphs._first_cause(RuntimeError("alone"))) == "alone"


# Threads


def test_a_thread_warms_up_for_itself() -> None:
    """Engines have buffers by thread, made at a thread's first run: none may be made while a graph is recorded."""
    capture, recorded_in = StandInCapture(), []
    runs: dict[int, int] = {}

    def work(key: int, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        runs[threading.get_ident()] = runs.get(threading.get_ident(), 0) + 1
        return {"out": inputs["x"] * key}

    def record(do: Any) -> Any:
        recorded_in.append((threading.get_ident(), runs[threading.get_ident()]))
        return capture(do)

    graphed = GraphedFunction(work, record)

    def in_a_thread(calls: int) -> None:
        def run() -> None:
            for i in range(calls):
                assert torch.equal(graphed(2, {"x": torch.full((2,), float(i))})["out"], torch.full((2,), 2.0 * i))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join(60)

    for _ in range(3):
        in_a_thread(WARM_UPS)
    assert recorded_in == []
    in_a_thread(WARM_UPS + 1)
    assert len(recorded_in) == 1
    assert recorded_in[0][1] > WARM_UPS
    in_a_thread(1)
    assert (capture.captures, capture.replays) == (1, 2)
