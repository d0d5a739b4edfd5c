"""The ONNX Runtime engine: right numbers from buffers that are reused, in any number of threads."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from counting import load_engines
from small_graphs import component, random_feeds, write_add, write_graph
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hypersd.engines import Bundle
from hypersd.engines import onnx_runtime as module
from hypersd.engines.by_shapes import KEPT
from hypersd.engines.cuda.device import one_capture
from hypersd.engines.cuda.graphs import GraphedFunction
from hypersd.engines.load import choose
from hypersd.engines.onnx_runtime import OnnxRuntimeEngine, available_cores, resolve_device
from hypersd.errors import BundleError, DeviceError, EngineError, RequestError

CPU = torch.device("cpu")


def write_model(path: Path, nodes: list[Any], inputs: dict[str, Any], outputs: dict[str, Any]) -> OnnxRuntimeEngine:
    """An engine of a hand-made graph."""
    return OnnxRuntimeEngine("net", path, write_graph(path, nodes, inputs, outputs), CPU)


@pytest.fixture
def add(tmp_path: Path) -> OnnxRuntimeEngine:
    """out [rows, columns] = a [rows, columns] + the transpose of b [columns, rows], all sizes 1 to 8."""
    path = tmp_path / "add.onnx"
    return OnnxRuntimeEngine("net", path, write_add(path), CPU)


def plain_session(path: Path) -> ort.InferenceSession:
    """The same graph as anyone runs it."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = available_cores()
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sdxl_dynamic"])
def test_outputs_are_those_of_a_plain_session(family: str, request: pytest.FixtureRequest) -> None:
    """Binding changes where the numbers lie and not the numbers: every network, fp32, fp16 and int64 tensors.

    Run twice with different inputs, because the second run takes another way through the engine.
    """
    bundle = Bundle.load(request.getfixturevalue(f"{family}_bundle"))
    for name, engine in load_engines(bundle, "onnxruntime", "cpu").items():
        session = plain_session(bundle.path(bundle.component(name).onnx))
        names = list(engine.outputs)
        for seed in (0, 1, 2):
            feeds = random_feeds(engine.inputs, seed)
            ours = engine.run(feeds)
            theirs = session.run(names, {key: tensor.numpy() for key, tensor in feeds.items()})
            assert set(ours) == {output.name for output in session.get_outputs()}
            for key, value in zip(names, theirs, strict=True):
                assert np.isfinite(value).all()
                assert value.std() > 0, "a constant output would prove nothing"
                assert ours[key].numpy().dtype == value.dtype
                np.testing.assert_allclose(ours[key].numpy(), value, rtol=1e-6, atol=1e-6, err_msg=f"{name} {key}")


def test_outputs_do_not_depend_on_other_shapes(add: OnnxRuntimeEngine) -> None:
    """Runs at one shape leave no trace in those at another, in whatever order they come."""
    for rows, columns, seed in [(2, 3, 0), (3, 2, 1), (2, 3, 2), (8, 8, 3), (1, 1, 4), (3, 2, 5), (2, 3, 6)]:
        torch.manual_seed(seed)
        a, b = torch.randn(rows, columns), torch.randn(columns, rows)
        assert torch.equal(add.run({"a": a, "b": b})["out"], a + b.T)


def test_the_order_of_the_feeds_does_not_matter(add: OnnxRuntimeEngine) -> None:
    """Inputs go by name: the same list of shapes under exchanged names is not the same request."""
    a, b = torch.ones(2, 3), torch.ones(3, 2)
    assert add.run({"a": a, "b": b})["out"].shape == (2, 3)
    assert add.run({"b": a, "a": b})["out"].shape == (3, 2)


def test_buffers_are_reused_at_the_same_shapes(add: OnnxRuntimeEngine) -> None:
    """The contract of ``Engine.run``: the same buffer at the same shapes, another one at others, kept for later."""
    small, large = ({"a": torch.randn(n, n), "b": torch.randn(n, n)} for n in (2, 4))
    first = add.run(small)["out"].data_ptr()
    other = add.run(large)["out"].data_ptr()
    assert first != other
    for _ in range(3):
        fresh = {name: tensor.clone() for name, tensor in small.items()}  # at other addresses
        assert add.run(fresh)["out"].data_ptr() == first
        assert add.run(large)["out"].data_ptr() == other


def test_outputs_follow_inputs_changed_in_place_and_moved(add: OnnxRuntimeEngine) -> None:
    """An input's address may stay or change between calls, and its old memory may be gone: the values count."""
    a, b = torch.zeros(2, 2), torch.zeros(2, 2)
    for i in range(20):
        a.fill_(i)
        assert add.run({"a": a, "b": b})["out"].eq(i).all()
        assert add.run({"a": torch.full((2, 2), i + 0.5), "b": b})["out"].eq(i + 0.5).all()


class CountOps(TorchDispatchMode):
    """Counts the torch operations that run inside, allocations among them."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


def test_later_runs_allocate_and_copy_nothing(sd15_bundle: Path) -> None:
    """The hot path: no torch operation at all, and no growth of Python's heap over 200 runs."""
    engine = load_engines(Bundle.load(sd15_bundle), "onnxruntime", "cpu")["text_encoder"]
    feeds = [random_feeds(engine.inputs, seed) for seed in range(4)]  # alternating addresses
    with CountOps() as first:
        engine.run(feeds[0])
    assert first.ops, "the counter counts: the first run does allocate"
    for one in feeds:
        engine.run(one)
    with CountOps() as counter:
        for _ in range(3):
            engine.run(feeds[1])
    assert not counter.ops
    tracemalloc.start()
    try:
        growth = []
        for _ in range(3):
            gc.collect()
            before, _ = tracemalloc.get_traced_memory()
            for i in range(200):
                engine.run(feeds[i % 4])
            gc.collect()
            after, _ = tracemalloc.get_traced_memory()
            growth.append(after - before)
    finally:
        tracemalloc.stop()
    assert min(growth) < 200 * 8, "not even one pointer a run may be kept"


# Refusals


def good(engine: OnnxRuntimeEngine) -> dict[str, Tensor]:
    return {"a": torch.zeros(2, 3), "b": torch.zeros(3, 2)}


BAD_FEEDS = {
    "missing": (lambda feeds: feeds.pop("b"), ["['a', 'b']", "['a']"]),
    "unknown": (lambda feeds: feeds.update(c=feeds["a"]), ["['a', 'b']", "['a', 'b', 'c']"]),
    "none": (lambda feeds: feeds.clear(), ["['a', 'b']", "[]"]),
    "dtype": (lambda feeds: feeds.update(a=feeds["a"].half()), ["'a'", "float32[1..8, 1..8]", "float16[2, 3]"]),
    "integers": (lambda feeds: feeds.update(b=feeds["b"].long()), ["'b'", "float32[1..8, 1..8]", "int64[3, 2]"]),
    "rank": (lambda feeds: feeds.update(a=feeds["a"][0]), ["'a'", "float32[1..8, 1..8]", "float32[3]"]),
    "too large": (lambda feeds: feeds.update(a=torch.zeros(9, 3)), ["'a'", "1..8", "float32[9, 3]"]),
    "empty": (lambda feeds: feeds.update(a=torch.zeros(0, 3)), ["'a'", "1..8", "float32[0, 3]"]),
    "strided": (lambda feeds: feeds.update(a=torch.zeros(3, 2).T), ["'a'", "contiguous"]),
}


@pytest.mark.parametrize(("spoil", "parts"), BAD_FEEDS.values(), ids=BAD_FEEDS)
def test_bad_inputs_are_rejected_with_expected_and_received(
    add: OnnxRuntimeEngine, spoil: Any, parts: list[str]
) -> None:
    """ONNX Runtime is given raw addresses: a wrong tensor would be read as if it were right, so none gets that far.

    Checked on the first run and on a later one.
    """
    for _ in range(2):
        feeds = good(add)
        spoil(feeds)
        with pytest.raises(EngineError) as caught:
            add.run(feeds)
        message = str(caught.value)
        assert "\n" not in message
        assert message.startswith("net: ")
        assert [part for part in parts if part not in message] == []
        assert add.run(good(add))["out"].shape == (2, 3)


def test_what_fails_inside_onnx_runtime_is_one_line_and_leaves_the_engine_usable(add: OnnxRuntimeEngine) -> None:
    """Shapes that each lie in range but do not fit together: only ONNX Runtime finds out."""
    with pytest.raises(EngineError, match=r"^net: ONNX Runtime failed: ") as caught:
        add.run({"a": torch.ones(2, 3), "b": torch.ones(4, 5)})
    assert "\n" not in str(caught.value)
    a, b = torch.randn(2, 3), torch.randn(3, 2)
    assert torch.equal(add.run({"a": a, "b": b})["out"], a + b.T)


def test_too_little_memory_for_the_buffers_is_told_as_such(
    add: OnnxRuntimeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is torch that allocates them, and not ONNX Runtime that failed."""

    def refuse(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(module._Binding, "run", refuse)
    with pytest.raises(torch.OutOfMemoryError):
        add.run(good(add))
    monkeypatch.undo()
    assert add.run(good(add))["out"].shape == (2, 3)


@pytest.mark.parametrize("content", [b"", b"not an onnx file", b"\x08\x0a\x12\xff\xff\xff\xff\x0f"], ids=repr)
def test_a_corrupt_file_is_a_bundle_error_of_one_line(tmp_path: Path, content: bytes) -> None:
    """ONNX Runtime's own exceptions, some of many lines, do not get through."""
    path = tmp_path / "net.onnx"
    path.write_bytes(content)
    with pytest.raises(BundleError) as caught:
        OnnxRuntimeEngine("net", path, component({"a": (1,)}, {"out": (1,)}), CPU)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_a_bundle_error_of_one_line(tmp_path: Path) -> None:
    """The file may vanish between the bundle's check and the session."""
    with pytest.raises(BundleError) as caught:
        OnnxRuntimeEngine("net", tmp_path / "gone.onnx", component({"a": (1,)}, {"out": (1,)}), CPU)
    assert "gone.onnx" in str(caught.value)
    assert "\n" not in str(caught.value)


# Threads


def test_threads_share_an_engine_and_no_buffer(sd15_bundle: Path) -> None:
    """Four threads hammer one engine with inputs of their own: each gets its own answers, in buffers of its own."""
    engine = load_engines(Bundle.load(sd15_bundle), "onnxruntime", "cpu")["text_encoder"]
    feeds = [random_feeds(engine.inputs, seed) for seed in range(4)]
    expected = [engine.run(one)["hidden_states"].clone() for one in feeds]
    assert not torch.allclose(expected[0], expected[1])
    start, end = threading.Barrier(4), threading.Barrier(4)

    def hammer(i: int) -> int:
        start.wait(60)
        for _ in range(100):
            output = engine.run(feeds[i])["hidden_states"]
            torch.testing.assert_close(output, expected[i], rtol=1e-5, atol=1e-6)
        end.wait(60)  # all threads are alive here, so equal addresses would be one buffer
        torch.testing.assert_close(output, expected[i], rtol=1e-5, atol=1e-6)
        return output.data_ptr()

    with ThreadPoolExecutor(4) as pool:
        addresses = list(pool.map(hammer, range(4)))
    assert len({*addresses, engine.run(feeds[0])["hidden_states"].data_ptr()}) == 5


class FakeStream:
    """As much of a CUDA stream as an engine asks of one; the device is the CPU, so everything is in order."""

    def __init__(self, address: int = 1) -> None:
        self.cuda_stream, self.device = address, CPU

    def wait_stream(self, other: Any) -> None: ...

    def synchronize(self) -> None: ...


class OnStreams:
    """An engine that believes in CUDA, and the stream that each thread is on."""

    def __init__(self, engine: OnnxRuntimeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine, self.now = engine, threading.local()
        engine._stream, engine._lock = FakeStream(), threading.Lock()  # type: ignore[assignment]
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.now.stream)

    def run(self, stream: FakeStream, feeds: Mapping[str, Tensor]) -> Tensor:
        self.now.stream = stream
        return self.engine.run(feeds)["out"]


def test_on_cuda_buffers_belong_to_the_stream(add: OnnxRuntimeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread for every request makes no buffers of its own; another stream has others. The CUDA device is a fake."""
    engine, one, two = OnStreams(add, monkeypatch), FakeStream(100), FakeStream(200)
    feeds = {"a": torch.ones(2, 3), "b": torch.ones(3, 2)}
    first = engine.run(one, feeds)
    for _ in range(5):
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(engine.run, one, feeds).result(60) is first
    other = engine.run(two, feeds)
    assert other.data_ptr() != first.data_ptr()
    assert engine.run(one, feeds) is first
    assert engine.run(two, feeds) is other


def test_on_cuda_a_stream_keeps_its_last_few_shapes(add: OnnxRuntimeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is the stream's: what one runs does not push out another's buffers. The CUDA device is a fake."""
    engine, one, two = OnStreams(add, monkeypatch), FakeStream(100), FakeStream(200)

    def run(stream: FakeStream, n: int) -> Tensor:
        rows, columns = 1 + n // 8, 1 + n % 8
        return engine.run(stream, {"a": torch.full((rows, columns), 1.0), "b": torch.full((columns, rows), 2.0)})

    first, second, elsewhere = run(one, 1), run(one, 2), run(two, 1)
    for n in range(3, KEPT + 1):
        run(one, n)
    assert run(one, 1) is first
    assert run(one, KEPT + 1).eq(3).all()
    assert run(one, 1) is first, "used last"
    assert run(one, 2) is not second, "pushed out"
    assert run(two, 1) is elsewhere


def test_on_cuda_one_run_is_enqueued_at_a_time(add: OnnxRuntimeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """All runs share the session's stream: one that goes between another's fork and join would mix with it."""
    engine, inside, most = OnStreams(add, monkeypatch), [0], [0]
    beside = module._beside_current

    @contextmanager
    def count(stream: Any) -> Iterator[None]:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        with beside(stream):
            yield
            time.sleep(0.001)
        inside[0] -= 1

    monkeypatch.setattr(module, "_beside_current", count)
    barrier = threading.Barrier(4)

    def hammer(i: int) -> None:
        barrier.wait(60)
        for n in range(1, 9):
            out = engine.run(FakeStream(100 + i), {"a": torch.full((n, n), float(i)), "b": torch.full((n, n), 1.0)})
            assert out.eq(i + 1).all()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(hammer, range(4)))
    assert most == [1]


@pytest.fixture
def session_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The thread counts that sessions are made with."""
    counts: list[int] = []
    make = ort.InferenceSession

    def record(path: str, options: ort.SessionOptions, **kwargs: Any) -> ort.InferenceSession:
        counts.append(options.intra_op_num_threads)
        return make(path, options, **kwargs)

    monkeypatch.setattr(module.ort, "InferenceSession", record)
    return counts


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs Linux's CPU affinity")
@pytest.mark.parametrize("cores", [1, 2, 3])
def test_threads_follow_the_cores(
    cores: int, monkeypatch: pytest.MonkeyPatch, session_threads: list[int], sd15_bundle: Path
) -> None:
    """In a container the machine's cores are not ours: ONNX Runtime's own guess would be too many threads."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    engines = load_engines(Bundle.load(sd15_bundle), "onnxruntime", "cpu")
    assert session_threads == [cores] * (len(engines) - 1), "the VAE's encoder comes later"


def test_the_encoder_is_loaded_at_its_first_run(session_threads: list[int], sd15_bundle: Path) -> None:
    """A pipeline that is given no image does not pay for it; threads that need it at once load it once."""
    engine = load_engines(Bundle.load(sd15_bundle), "onnxruntime", "cpu")["vae_encoder"]
    loaded, images = len(session_threads), {"sample": torch.zeros(1, 3, 64, 64)}
    with ThreadPoolExecutor(4) as threads:
        first, *others = threads.map(lambda _: engine.run(images)["latent_parameters"].clone(), range(4))
    assert len(session_threads) == loaded + 1
    assert all(torch.equal(first, other) for other in others)
    with pytest.raises(EngineError, match="sample"):
        engine.run({"sample": torch.zeros(1, 3, 64, 72)})


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux's CPU affinity")
def test_a_process_pinned_to_one_core_gets_no_thread_pool(sd15_bundle: Path) -> None:
    """The same seen from outside: pinned to one core, an engine adds no thread to the process."""
    program = f"""if True:
        import os
        os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})
        from hypersd.engines import Bundle, onnx_runtime
        from hypersd.engines.load import choose, load_choice
        def count():
            return len(os.listdir("/proc/self/task"))
        before = count()
        bundle = Bundle.load({str(sd15_bundle)!r})
        engines = load_choice(bundle, choose(bundle, "onnxruntime", "cpu"), "cpu")
        print(count() - before)
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "0"


# Devices


@pytest.mark.parametrize("device", ["tpu", "", "cuda:x", "gpu", "CUDA0", "cpu:-1", None, 2.5])
def test_unknown_devices_are_rejected_with_those_there_are(device: Any) -> None:
    """A misspelt device names the ones that exist."""
    with pytest.raises(RequestError, match="expected auto, cpu, cuda or cuda:N") as caught:
        resolve_device(device)
    assert repr(device) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("device", ["mps", "meta", "xpu"])
def test_devices_that_only_torch_knows_are_rejected(device: str) -> None:
    """Torch would make tensors there, ONNX Runtime would not find them."""
    with pytest.raises(RequestError, match=str(device)):
        resolve_device(device)


def test_cuda_without_its_provider_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commonest mistake, the CPU build of onnxruntime on a GPU machine, is never a silent fall back to the CPU."""
    monkeypatch.setattr(module.ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device in ("cuda", "cuda:1", torch.device("cuda")):
        with pytest.raises(DeviceError, match="onnxruntime-gpu") as caught:
            resolve_device(device)
        assert "\n" not in str(caught.value)
    assert resolve_device("auto") == CPU


def test_cuda_without_a_device_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime-gpu on a machine without a GPU: rejected if asked for, passed over if the choice is ours."""
    monkeypatch.setattr(
        module.ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="no CUDA device"):
        resolve_device("cuda")
    assert resolve_device("auto") == CPU


def test_auto_takes_the_gpu_if_both_libraries_see_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has to ask for the GPU; a bare "cuda" means the first."""
    monkeypatch.setattr(
        module.ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda", 0)
    assert resolve_device("cuda") == torch.device("cuda", 0)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    assert resolve_device("cpu") == CPU
    with pytest.raises(DeviceError, match=r"^no CUDA device 7: this machine has 2, counted from 0$"):
        resolve_device("cuda:7")


def test_a_session_that_fell_back_to_the_cpu_is_rejected(
    monkeypatch: pytest.MonkeyPatch, add: OnnxRuntimeEngine, tmp_path: Path
) -> None:
    """ONNX Runtime drops a provider that will not start and goes on: that must not pass for the GPU."""
    real = ort.InferenceSession
    monkeypatch.setattr(
        module.ort, "InferenceSession", lambda path, options, **_: real(path, options, ["CPUExecutionProvider"])
    )
    with pytest.raises(DeviceError, match="CUDA provider"):
        module._make_cuda_session(tmp_path / "add.onnx", torch.device("cuda", 0), 1, SomeStream())


class SomeStream:
    """A stand-in for a CUDA stream: the address that a session is given."""

    cuda_stream = 1234567


NOT_ALL_ON_THE_GPU = "This session cannot use the graph capture feature as requested by the user"


def record_sessions(
    monkeypatch: pytest.MonkeyPatch, error: str = "", *, takes_lowered: bool = False, on_cpu: Sequence[str] | None = ()
) -> list[dict[str, Any]]:
    """The arguments that sessions are made with: stand-ins, since no machine here has a CUDA device.

    Those that are to be recorded fail with ``error`` if there is one, unless ``takes_lowered`` and the graph comes as
    bytes. ``on_cpu`` are operators of nodes that are not on the GPU; None is a version that cannot tell.
    """
    calls: list[dict[str, Any]] = []

    class Session:
        def __init__(self, graph: str | bytes, options: Any, **arguments: Any) -> None:
            assert one_capture.locked(), "the CUDA provider waits for the whole device, which spoils a capture"
            calls.append({"graph": graph, "options": options, **arguments})
            is_taken = takes_lowered and isinstance(graph, bytes)
            if error and not is_taken and "enable_cuda_graph" in arguments["providers"][0][1]:
                raise RuntimeError(error)

        def get_providers(self) -> list[str]:
            return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    if on_cpu is not None:
        nodes = [SimpleNamespace(op_type=operator) for operator in on_cpu]
        parts = [SimpleNamespace(ep_name="CPUExecutionProvider", get_nodes=lambda: nodes)]
        parts.append(
            SimpleNamespace(ep_name="CUDAExecutionProvider", get_nodes=lambda: [SimpleNamespace(op_type="Conv")])
        )
        Session.get_provider_graph_assignment_info = lambda self: parts  # type: ignore[attr-defined]
    monkeypatch.setattr(module.ort, "InferenceSession", Session)
    return calls


def test_a_cuda_session_runs_on_our_stream_and_may_be_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """On our stream, without ONNX Runtime's fall-back, which makes a session that failed again without its options."""
    calls = record_sessions(monkeypatch)
    _, capturable = module._make_cuda_session(Path("net.onnx"), torch.device("cuda", 1), 1, SomeStream())
    assert capturable
    (call,) = calls
    expected = {"device_id": "1", "user_compute_stream": "1234567", "enable_cuda_graph": "1"}
    assert call["providers"] == [("CUDAExecutionProvider", expected), "CPUExecutionProvider"]
    assert call["enable_fallback"] == 0


def test_a_network_that_cannot_be_recorded_still_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that copies between host and device: ONNX Runtime rejects to record it, and it is run step by step."""
    monkeypatch.setattr(module.ort, "__version__", "1.31.1")  # an older one would be given a lowered graph
    calls = record_sessions(monkeypatch, f"{NOT_ALL_ON_THE_GPU} as the model has control flow")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, capturable = module._make_cuda_session(Path("net.onnx"), torch.device("cuda", 0), 1, SomeStream())
    assert not capturable
    assert [call["providers"][0][1].get("enable_cuda_graph") for call in calls] == ["1", None]
    assert calls[1]["providers"][0][1]["user_compute_stream"] == "1234567"


@pytest.mark.parametrize("takes_lowered", [True, False])
def test_a_graph_that_a_version_has_no_kernels_for_is_lowered(
    takes_lowered: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sd15_bundle: Path
) -> None:
    """An ONNX Runtime before 1.27 is given operators that it has kernels for, without a warning.

    Also if that cannot be recorded. The weights stay where they are, and are found through links, of which the Hub's
    cache consists.
    """
    calls = record_sessions(monkeypatch, NOT_ALL_ON_THE_GPU, takes_lowered=takes_lowered)
    monkeypatch.setattr(module.ort, "__version__", "1.26.0")
    for file in (sd15_bundle / "unet").iterdir():
        (tmp_path / file.name).symlink_to(file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, capturable = module._make_cuda_session(tmp_path / "model.onnx", torch.device("cuda", 0), 1, SomeStream())
    assert capturable == takes_lowered
    monkeypatch.undo()
    graph, options = calls[-1]["graph"], calls[-1]["options"]
    assert "Attention" not in {node.op_type for node in onnx.load_from_string(graph).graph.node}
    session = module.ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])  # with all weights
    assert {end.name for end in session.get_inputs()} == {"sample", "timestep", "encoder_hidden_states"}


@pytest.mark.parametrize(
    ("version", "has_onnx", "remedy"),
    [
        ("1.23.2", False, r"pip install onnx, .*, or onnxruntime-gpu 1\.27 or newer"),
        ("1.24.4", False, r"pip install onnx, .*, or onnxruntime-gpu 1\.27 or newer"),
        ("1.24.4", True, r"install onnxruntime-gpu 1\.27 or newer"),
        ("1.31.1", True, "export it again"),
    ],
)
def test_nodes_on_the_cpu_are_a_warning(
    version: str, has_onnx: bool, remedy: str, monkeypatch: pytest.MonkeyPatch, sd15_bundle: Path
) -> None:
    """It is not silently slow: the warning has the operators, their number and the remedy.

    ONNX Runtime names the nodes from 1.24 on; for older ones the operators that they lack are counted in the file.
    """
    path = sd15_bundle / "unet" / "model.onnx"
    operators = Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)
    lacking = {name: operators[name] for name in ("Attention", "Conv", "Resize", "Sin", "Cos")}
    on_cpu = None if version == "1.23.2" else list(Counter(lacking).elements())
    record_sessions(monkeypatch, NOT_ALL_ON_THE_GPU, on_cpu=on_cpu)
    monkeypatch.setattr(module.ort, "__version__", version)
    if not has_onnx:
        monkeypatch.setitem(sys.modules, "onnx", None)  # neither found nor imported
    with pytest.warns(module.CpuNodesWarning, match=rf": {remedy}$") as caught:
        module._make_cuda_session(path, torch.device("cuda", 0), 1, SomeStream())
    (message,) = [str(warning.message) for warning in caught]
    assert all(f"{count} {name}" in message for name, count in lacking.items() if count)
    assert f"{lacking['Attention']} Attention" in message
    assert "\n" not in message


def test_a_session_that_fails_for_another_reason_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged file is a damaged file."""
    calls = record_sessions(monkeypatch, "Protobuf parsing failed")
    with pytest.raises(BundleError, match="Protobuf"):
        module._make_cuda_session(Path("net.onnx"), torch.device("cuda", 0), 1, SomeStream())
    assert len(calls) == 1


def test_weights_that_do_not_fit_are_not_a_damaged_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is full: that says how much is free, and what to do. The session is a stand-in."""
    record_sessions(monkeypatch, "CUDA failure 2: out of memory ; GPU=0 ; expr=cudaMalloc((void**)&p, size);")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1_230_000_000, 8_000_000_000))
    with pytest.raises(EngineError, match=r"weights of net\.onnx did not fit, 1\.23 GB are free on cuda:0"):
        module._make_cuda_session(Path("net.onnx"), torch.device("cuda", 0), 1, SomeStream())


def test_runs_that_do_not_fit_on_a_gpu_say_so(add: OnnxRuntimeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime's arena has words of its own for it. The CUDA device is a fake."""
    engine = OnStreams(add, monkeypatch)
    monkeypatch.setattr(module._Binding, "run", raising("Failed to allocate memory for requested buffer of size 99"))
    with pytest.raises(EngineError, match=r"^out of device memory: net's intermediate results did not fit, .*smaller"):
        engine.run(FakeStream(), {"a": torch.ones(2, 3), "b": torch.ones(3, 2)})
    monkeypatch.setattr(module._Binding, "run", raising("Non-zero status code"))
    with pytest.raises(EngineError, match=r"^net: ONNX Runtime failed: Non-zero"):
        engine.run(FakeStream(), {"a": torch.ones(2, 3), "b": torch.ones(3, 2)})


def raising(words: str) -> Any:
    def run(*_: Any) -> None:
        raise RuntimeError(words)

    return run


@pytest.mark.parametrize(("version", "is_kept_out"), [("1.23.2", True), ("1.27.0", True), ("1.28.0", False)])
def test_8_bit_weights_are_not_optimized_where_that_fails(
    version: str, is_kept_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to 1.27 ONNX Runtime makes an invalid graph of an int8 bundle's UNet: the floors' tests load one."""
    calls = record_sessions(monkeypatch)
    monkeypatch.setattr(module.ort, "__version__", version)
    module._make_cuda_session(Path("net.onnx"), torch.device("cuda", 0), 1, SomeStream())
    entries = {}
    with contextlib.suppress(RuntimeError):  # there is no such entry
        entries["qdq"] = calls[-1]["options"].get_session_config_entry("session.disable_quant_qdq")
    assert entries == ({"qdq": "1"} if is_kept_out else {})


def test_runs_on_cuda_neither_wait_nor_make_graphs_of_their_own() -> None:
    """The two run options that recording rests on, under ONNX Runtime's names."""
    options = module._cuda_run_options()
    assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
    assert options.get_run_config_entry("gpu_graph_id") == "-1"


def test_the_cpu_is_not_recorded(add: OnnxRuntimeEngine) -> None:
    """There is no graph of a CPU's work."""
    assert not add.capturable


def test_a_recording_keeps_the_buffers_that_it_writes_to(add: OnnxRuntimeEngine) -> None:
    """A graph may outlive its thread, and a shape its place among the last few: its buffers stay."""
    kept: list[Any] = []

    def capture(work: Any, memory: Any) -> Any:
        return lambda: None, work()

    class Watch(GraphedFunction):
        def _record(self, key: Any, entry: Any) -> None:
            super()._record(key, entry)
            kept.extend(entry.kept)

    graphed = Watch(lambda key, feeds: add.run(feeds), capture)
    feeds = {"a": torch.ones(2, 3), "b": torch.ones(3, 2)}
    for _ in range(3):
        output = graphed(0, feeds)["out"]
    assert kept[0] is add
    assert kept[1].outputs["out"] is output


@pytest.mark.parametrize("backend", ["", "onnx", "tensorrt5", "ONNXRUNTIME", "null"])
def test_unknown_backends_are_rejected_with_those_there_are(backend: str, sd15_bundle: Path) -> None:
    """A misspelt backend names the ones that exist."""
    with pytest.raises(RequestError) as caught:
        choose(Bundle.load(sd15_bundle), backend)
    assert repr(backend) in str(caught.value)
    assert "auto, onnxruntime" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "most"), [("200000 100000", 2), ("150000 100000", 2), ("50000 100000", 1), ("max 100000", 64), ("", 64)]
)
def test_threads_follow_a_containers_quota(
    text: str, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container of two processors on a machine of 64 gets two threads, not 64."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    quota = tmp_path / "cpu.max"
    quota.write_text(text)
    assert available_cores(quota) == most
    assert available_cores(tmp_path / "missing") == 64
