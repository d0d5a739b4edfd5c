"""Memory of OpenVINO's engines: weights once, in the precision that is computed in, and nothing of a run at rest."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from hypersd.engines.at_rest import AtRest
from hypersd.engines.mapped_files import release_pages
from hypersd.engines.openvino.library import has_native_bf16

WIDTH, LAYERS, ROWS = 4096, 4, 4096  # 67 million weights, and layers whose outputs take 34 MB
HALVES = 2 * WIDTH * WIDTH * LAYERS / 1e6  # MB of the weights in two bytes each

MEASURE = """if True:
    import json, re, sys, time
    from pathlib import Path
    import torch
    from hypersd.engines.openvino import openvino_engine
    from hypersd.engines.openvino.openvino_engine import OpenVinoEngine
    from hypersd.engines.openvino.library import core
    from hypersd.engines.specs import Component, TensorSpec

    def memory(field):
        return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1e3

    path, precision, rows, width = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    spec = TensorSpec(dtype="float16", shape=(rows, width))
    core()
    openvino_engine.REST = 0.5
    before = memory("VmRSS")
    component = Component(inputs={"x": spec}, outputs={"y": spec}, files=("net.onnx",), key="0" * 64)
    engine = OpenVinoEngine("net", path, component, precision)
    figures = {"peak": memory("VmHWM") - before, "loaded": memory("VmRSS") - before}
    output = engine.run({"x": torch.full((rows, width), 0.5, dtype=torch.float16)})["y"]
    figures["run"] = memory("VmRSS") - before
    deadline = time.monotonic() + 60
    while memory("VmRSS") - before > figures["run"] - 30 and time.monotonic() < deadline:
        time.sleep(0.1)
    figures["rest"] = memory("VmRSS") - before
    first = output.clone()
    again = engine.run({"x": torch.full((rows, width), 0.5, dtype=torch.float16)})["y"]
    figures["same"] = bool(torch.equal(first, again)) and again is output and bool(first.isfinite().all())
    print(json.dumps(figures))
"""


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph of float16 layers, whose weights of 134 MB lie beside it."""
    path = tmp_path_factory.mktemp("halves") / "net.onnx"
    generator = np.random.default_rng(0)
    nodes, weights, last = [], [], "x"
    for layer in range(LAYERS):
        values = generator.standard_normal((WIDTH, WIDTH), np.float32).astype(np.float16) / np.float16(WIDTH**0.5)
        weights.append(numpy_helper.from_array(values, f"w{layer}"))
        output = "y" if layer == LAYERS - 1 else f"h{layer}"
        nodes.append(helper.make_node("MatMul", [last, f"w{layer}"], [output]))
        last = output
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, [ROWS, WIDTH]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, path, save_as_external_data=True, location="net.onnx_data", size_threshold=1024)
    return path


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
@pytest.mark.skipif(not has_native_bf16(), reason="needs a processor that multiplies in bfloat16")
def test_half_precision_takes_its_weights_twice_at_the_load_and_once_after(halves: Path) -> None:
    """The file's mapping and the packed weights, without copies in float32; then the packed ones; then no results."""
    program = [sys.executable, "-c", MEASURE, str(halves), "bf16", str(ROWS), str(WIDTH)]
    done = subprocess.run(program, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    spare = 230  # MB of the library itself, less than a copy of the weights in float32 would take
    assert figures["peak"] < 2 * HALVES + spare, figures
    assert HALVES / 2 < figures["loaded"] < HALVES + spare, figures
    assert figures["rest"] < figures["run"] - 30, figures
    assert figures["same"], "the same numbers in the same buffer, after its memory was given back"


def test_released_pages_are_read_again(tmp_path: Path) -> None:
    """A file that is mapped to be read keeps its content, and what was written to a private copy is not lost."""
    file, beside = tmp_path / "in" / "weights", tmp_path / "inside" / "weights"
    for each in (file, beside):
        each.parent.mkdir()
        each.write_bytes(b"\x01" * 65536)
    mapped = np.memmap(file, np.uint8, "r")
    written = np.memmap(file, np.uint8, "c")
    written[0] = 9
    assert mapped.sum() == 65536
    release_pages(tmp_path / "in")
    assert mapped.sum() == 65536
    assert written[0] == 9
    assert np.memmap(beside, np.uint8, "r").sum() == 65536


def test_work_waits_for_rest() -> None:
    """Once for each rest, however many touches come before it, and again after the next touch."""
    rested, count = threading.Event(), 0

    def act() -> None:
        nonlocal count
        count += 1
        rested.set()

    at_rest = AtRest(act, seconds=0.05)
    for expected in (1, 2):
        for _ in range(100):
            at_rest.touch()
        assert rested.wait(60)
        rested.clear()
        assert count == expected


def test_bfloat16_group_normalization_is_as_exact_as_openvinos_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups whose mean is up to 60 times their spread, where the mean of squares would be nothing but rounding."""
    from small_graphs import write_graph

    from hypersd.engines.openvino import compiled_graph
    from hypersd.engines.openvino.openvino_engine import OpenVinoEngine

    groups, channels, side = 8, 64, 48
    generator = torch.Generator().manual_seed(0)
    means = torch.tensor([0.0, 0.5, -2, 5, -10, 20, -40, 60]).repeat_interleave(channels // groups)
    x = torch.randn(1, channels, side, side, generator=generator) + means[None, :, None, None]
    nodes = [
        helper.make_node("GroupNormalization", ["x", "scale", "bias"], ["n"], num_groups=groups, epsilon=1e-5),
        # a layer after it: OpenVINO keeps the end of a graph in float32
        helper.make_node("Conv", ["n", "kernel"], ["y"]),
    ]
    inputs = {"x": (1, channels, side, side), "scale": (channels,), "bias": (channels,)}
    inputs["kernel"] = (channels, channels, 1, 1)
    path = tmp_path / "net.onnx"
    component = write_graph(path, nodes, inputs, {"y": (1, channels, side, side)})
    feeds = {"x": x, "scale": torch.ones(channels), "bias": torch.zeros(channels)}
    feeds["kernel"] = torch.eye(channels)[:, :, None, None].contiguous()
    expected = torch.nn.functional.group_norm(x.double(), groups)

    def errors() -> torch.Tensor:
        """Root mean square of each group's error, and the size of its mean error."""
        output = OpenVinoEngine("net", path, component, "bf16").run(feeds)["y"].double()
        error = (output - expected).reshape(groups, -1)
        return torch.stack([error.square().mean(1).sqrt(), error.mean(1).abs()])

    ours = errors()
    monkeypatch.setattr(compiled_graph, "expand_group_normalizations", lambda model: None)
    theirs = errors()
    assert (ours <= 1.25 * theirs + 3e-3).all(), (ours, theirs)
    assert ours[0, -1] < 0.2, "60 times the spread: a mean of squares less the mean's square is off by the whole spread"
