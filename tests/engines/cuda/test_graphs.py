"""The bookkeeping of CUDA graphs: when work is recorded, which memory a graph keeps, when it is dropped.

Recording itself is a stand-in here (tests/capture_stand_in.py); tests/gpu/test_graphs.py has the real one.
"""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from capture_stand_in import StandInCapture
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hypersd.engines.cuda import capture as cuda_capture
from hypersd.engines.cuda.capture import GraphMemory, capture_cuda_graph, retain
from hypersd.engines.cuda.device import one_capture
from hypersd.engines.cuda.graphs import WARM_UPS, GraphedFunction, GraphWarning
from hypersd.errors import EngineError

pytestmark = pytest.mark.filterwarnings("error::hypersd.engines.cuda.graphs.GraphWarning")


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
    """A graph's inputs and outputs never move, wherever the caller's tensors lie, which are left alone."""
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
    """Any calls in any order, recorded, evicted and recorded again, give the plain results."""
    graphed = GraphedFunction(Scale(), StandInCapture(), kept=kept)
    for key, size, value in calls:
        assert torch.equal(graphed(key, feeds(value, size))["out"], expected(key, value, size))


# Memory


class Owner:
    """Something that owns memory which a graph writes to."""


def test_a_graph_keeps_its_memory_and_takes_it_along() -> None:
    """Objects retained during the recording live exactly as long as the graph, and so do its inputs and outputs."""
    made: list[weakref.ref] = []
    inputs_seen: list[weakref.ref] = []

    def work(key: int, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        owner = Owner()
        made.append(weakref.ref(owner))
        inputs_seen.append(weakref.ref(inputs["x"]))
        retain(owner)
        return {"out": inputs["x"] + key}

    def capture(do: Any, memory: Any) -> Any:
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


class OnCuda(Tensor):
    """A tensor of the CPU that says that it is on a CUDA device."""

    is_cuda = True  # type: ignore[assignment]


def test_a_graph_is_dropped_when_its_stream_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait for the whole device would spoil a capture of another thread. The CUDA device is a fake."""
    waited: list[int] = []
    stream = SimpleNamespace(synchronize=lambda: waited.append(1))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    graphed = GraphedFunction(lambda key, inputs: {"out": inputs["x"] * key}, StandInCapture(), kept=2)
    for key in (1, 2, 1, 2):
        graphed(key, {"x": torch.ones(2).as_subclass(OnCuda)})
    assert waited == []
    graphed(3, {"x": torch.ones(2).as_subclass(OnCuda)})
    assert len(waited) == 1


def test_a_graph_is_freed_during_no_capture() -> None:
    """Its memory, and an engine's context that it kept alone, are the device's: the lock of captures is held."""
    held: list[bool] = []

    def work(key: int, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        owner = Owner()
        weakref.finalize(owner, lambda: held.append(one_capture.locked()))
        retain(owner)
        return {"out": inputs["x"] * key}

    graphed = GraphedFunction(work, StandInCapture(), kept=1)
    for _ in range(WARM_UPS + 1):
        graphed(1, {"x": torch.ones(2)})
    held.clear()  # those of runs that no recording keeps
    graphed(2, {"x": torch.ones(2)})
    assert held[0]


# Failures


class FailsFor(StandInCapture):
    """Refuses to record while ``fails``."""

    fails = True

    def __call__(self, work: Any, memory: Any) -> Any:
        if self.fails:
            raise EngineError("CUDA graph: recording failed\n(no), expected work that only enqueues")
        return super().__call__(work, memory)


def test_a_failed_recording_is_a_warning_and_the_work_runs_as_it_is() -> None:
    """No call fails and none is wrong; that kind of call is not tried again, and others are recorded all the same."""
    capture, work = FailsFor(), Scale()
    graphed = GraphedFunction(work, capture)
    for i in range(WARM_UPS):
        assert torch.equal(graphed(2, feeds(i))["out"], expected(2, i))
    with pytest.warns(GraphWarning) as caught:
        assert torch.equal(graphed(2, feeds(9))["out"], expected(2, 9))
    (warning,) = caught
    message = str(warning.message)
    assert "\n" not in message
    for part in ("recording failed (no)", "without a graph", "slower", "Pipeline.load(..., cuda_graphs=False)"):
        assert part in message
    capture.fails = False
    runs = len(work.runs)
    for i in range(WARM_UPS + 3):
        assert torch.equal(graphed(2, feeds(i))["out"], expected(2, i))
    assert len(work.runs) == runs + WARM_UPS + 3, "once a call"
    assert capture.captures == 0
    for i in range(WARM_UPS + 3):
        assert torch.equal(graphed(1, feeds(i))["out"], expected(1, i))
        assert torch.equal(graphed(2, feeds(i))["out"], expected(2, i))
    assert (capture.captures, capture.replays) == (1, 3)


def test_a_function_warns_once_whatever_else_cannot_be_recorded() -> None:
    """A service that generates all kinds of images gets one warning."""
    graphed = GraphedFunction(Scale(), FailsFor())

    def call(key: int) -> None:
        for i in range(WARM_UPS + 3):
            assert torch.equal(graphed(key, feeds(i))["out"], expected(key, i))

    with pytest.warns(GraphWarning) as caught:
        call(1)
    assert len(caught) == 1
    call(2)
    call(3)


def test_a_warning_that_is_an_error_does_no_more_harm() -> None:
    """``python -W error``: the call fails, the next ones are served."""
    graphed = GraphedFunction(Scale(), FailsFor())
    for i in range(WARM_UPS):
        graphed(2, feeds(i))
    with pytest.raises(GraphWarning):
        graphed(2, feeds(9))
    for i in range(WARM_UPS + 3):
        assert torch.equal(graphed(2, feeds(i))["out"], expected(2, i))


def test_a_failed_recording_keeps_nothing() -> None:
    """Objects retained until it failed are released."""
    references: list[weakref.ref] = []

    def work(key: int, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        owner = Owner()
        references.append(weakref.ref(owner))
        retain(owner)
        return {"out": inputs["x"] + key}

    def capture(do: Any, memory: Any) -> Any:
        do()
        raise EngineError("CUDA graph: recording failed")

    graphed = GraphedFunction(work, capture)
    for _ in range(WARM_UPS):
        graphed(1, {"x": torch.ones(3)})
    with pytest.warns(GraphWarning):
        graphed(1, {"x": torch.ones(3)})
    gc.collect()
    assert len(references) == WARM_UPS + 3, "run, recorded, and run again as it is"
    assert [reference for reference in references if reference() is not None] == []


@pytest.mark.parametrize("stays_broken", [True, False])
def test_an_error_of_the_work_while_it_is_recorded_may_be_the_recordings(stays_broken: bool) -> None:
    """So the work runs once more without: what goes wrong then is its own error, and comes out."""
    now = SimpleNamespace(is_recording=False, is_broken=False)

    def work(key: int, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if now.is_recording or now.is_broken:
            now.is_broken = stays_broken
            raise ValueError("mine")
        return {"out": inputs["x"] * key}

    def capture(do: Any, memory: Any) -> Any:
        now.is_recording = True
        try:
            return (lambda: None), do()
        finally:
            now.is_recording = False

    graphed, x = GraphedFunction(work, capture), {"x": torch.ones(2)}
    for _ in range(WARM_UPS):
        graphed(2, x)
    outcome = pytest.raises(ValueError, match="mine") if stays_broken else nullcontext()
    with pytest.warns(GraphWarning, match="mine"), outcome:
        graphed(2, x)
    now.is_broken = False
    assert torch.equal(graphed(2, x)["out"], torch.full((2,), 2.0))


def test_a_run_that_failed_is_no_warm_up() -> None:
    """It may have failed before it found or allocated anything."""
    fail, capture = [True], StandInCapture()

    def work(key: int, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if fail[0]:
            raise ValueError("mine")
        return {"out": inputs["x"] * key}

    graphed = GraphedFunction(work, capture)
    for _ in range(4):
        with pytest.raises(ValueError, match="mine"):
            graphed(2, {"x": torch.ones(2)})
    fail[0] = False
    for i in range(WARM_UPS + 1):
        assert capture.captures == 0, f"call {i}"
        graphed(2, {"x": torch.ones(2)})
    assert capture.captures == 1


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
        assert str(cuda_capture._first_cause(error)).startswith("unet: ONNX Runtime failed: cudaMalloc")
    assert str(cuda_capture._first_cause(RuntimeError("alone"))) == "alone"


class FakeGraph:
    def replay(self) -> None: ...


class FakeGraphs:
    """Stand-ins for torch's capture on a machine without CUDA: ``fails`` invalidates it, as an illegal call does.

    Its allocator then still records, as that of torch before 2.13, until it is told to end.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: bool = False) -> None:
        self.fails = fails
        handles = itertools.count()
        self.pools: list[Any] = []
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, next(handles)))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
        monkeypatch.setattr(torch.cuda, "graph", self.capture)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
        monkeypatch.setattr(torch.cuda, "stream", nullcontext)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end, raising=False)

    @contextmanager
    def capture(self, graph: Any, pool: Any, **_: Any) -> Iterator[None]:
        self.pools.append(pool)
        try:
            yield
        finally:
            if self.fails:
                raise RuntimeError("capture was invalidated")

    def end(self, device: int, pool: Any) -> None:
        """Torch's ``_cuda_endAllocateToPool``."""
        if not self.fails:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")


def test_a_torch_without_the_private_function_fails_with_the_first_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clean-up after a failed capture uses a private name of torch: its absence must not hide the reason."""
    FakeGraphs(monkeypatch, fails=True)
    monkeypatch.delattr(torch._C, "_cuda_endAllocateToPool", raising=False)
    with pytest.raises(EngineError, match=r"recording failed \(capture was invalidated\)"):
        capture_cuda_graph(lambda: None, GraphMemory())


def test_graphs_of_a_function_share_a_pool_and_others_have_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them runs at a time; two functions' may run at once, or the results of one be read after the other's."""
    fake = FakeGraphs(monkeypatch)
    one, two = (GraphedFunction(lambda key, inputs: {"out": inputs["x"] * key}) for _ in range(2))
    for function in (one, two):
        for key in (1, 2, 3):
            for _ in range(WARM_UPS + 1):
                function(key, {"x": torch.ones(2)})
    assert all(one.recorded + two.recorded)
    assert [len(set(fake.pools[:3])), len(set(fake.pools[3:])), len(set(fake.pools))] == [1, 1, 2]


def test_a_pool_whose_graphs_are_gone_is_not_recorded_into(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch knows its handle until its memory is freed, and an assertion of its own fails on that."""
    fake, memory = FakeGraphs(monkeypatch), GraphMemory()
    replays = [capture_cuda_graph(lambda: None, memory)[0] for _ in range(2)]
    replays.pop()
    replays.append(capture_cuda_graph(lambda: None, memory)[0])
    replays.clear()
    capture_cuda_graph(lambda: None, memory)
    first, second, third, fourth = fake.pools
    assert first == second == third != fourth


def test_after_a_failed_recording_another_pool_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch may believe that the old one is still being recorded into; graphs that were recorded there stay."""
    fake, memory = FakeGraphs(monkeypatch), GraphMemory()
    monkeypatch.delattr(torch._C, "_cuda_endAllocateToPool", raising=False)
    kept, _ = capture_cuda_graph(lambda: None, memory)
    fake.fails = True
    with pytest.raises(EngineError, match="recording failed"):
        capture_cuda_graph(lambda: None, memory)
    fake.fails = False
    again, _ = capture_cuda_graph(lambda: None, memory)
    capture_cuda_graph(lambda: None, memory)
    first, failed, *later = fake.pools
    assert first == failed
    assert len({first, *later}) == 2
    assert kept is not again


@pytest.mark.parametrize(("invalid", "has_end"), [(False, True), (True, True), (True, False)])
def test_only_a_graph_whose_capture_was_not_ended_is_kept(
    invalid: bool, has_end: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's allocator may point at it. Work that fails, as for want of memory, leaves no graph and no other pool."""
    fake, memory = FakeGraphs(monkeypatch), GraphMemory()
    monkeypatch.setattr(cuda_capture, "_broken", [])
    if not has_end:
        monkeypatch.delattr(torch._C, "_cuda_endAllocateToPool")
    made: list[weakref.ref[FakeGraph]] = []

    def make() -> FakeGraph:
        graph = FakeGraph()
        made.append(weakref.ref(graph))
        return graph

    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", make)
    kept, _ = capture_cuda_graph(lambda: None, memory)
    fake.fails = invalid
    with pytest.raises(EngineError, match=r"recording failed \(CUDA out of memory"):
        capture_cuda_graph(fail, memory)
    fake.fails = False
    again, _ = capture_cuda_graph(lambda: None, memory)
    gc.collect()
    assert [graph() is not None for graph in made] == [True, invalid, True]
    assert (fake.pools[0] != fake.pools[2]) == invalid
    assert kept is not again


@pytest.mark.parametrize("is_enabled", [True, False])
def test_nothing_is_garbage_collected_inside_a_capture(is_enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor in a cycle that is freed there would call CUDA; it is freed before, and the collector's state kept."""
    FakeGraphs(monkeypatch)
    cycle = Owner()
    cycle.itself = cycle  # type: ignore[attr-defined]
    garbage = weakref.ref(cycle)
    (gc.enable if is_enabled else gc.disable)()
    try:
        del cycle
        _, inside = capture_cuda_graph(lambda: (gc.isenabled(), garbage()), GraphMemory())
        assert inside == (False, None)
        assert gc.isenabled() is is_enabled
    finally:
        gc.enable()


# Threads


def test_a_thread_for_every_call_is_as_good_as_one_for_all() -> None:
    """As many services work: warm-ups count whoever does them, as buffers belong to the stream and not to a thread."""
    capture = StandInCapture()
    graphed = GraphedFunction(Scale(), capture)

    def call(i: int) -> None:
        assert torch.equal(graphed(2, feeds(i))["out"], expected(2, i))

    for i in range(WARM_UPS + 3):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(call, i).result(60)
    assert (capture.captures, capture.replays) == (1, 3)
