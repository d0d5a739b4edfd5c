"""The OpenVINO engine: ONNX Runtime's numbers in float32, near ones in bfloat16, in buffers that are reused."""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from counting import load_engines
from small_graphs import component, random_feeds, write_add
from torch import Tensor

from hypersd import Pipeline
from hypersd.engines import Bundle, load
from hypersd.engines.by_shapes import KEPT
from hypersd.engines.engine import Engine
from hypersd.engines.late_engine import LateEngine
from hypersd.engines.load import Choice, choose, load_choice
from hypersd.engines.openvino import compiled_graph, library, openvino_engine
from hypersd.engines.openvino.library import PRECISIONS, has_native_bf16, resolve_precision
from hypersd.engines.openvino.openvino_engine import OpenVinoEngine
from hypersd.engines.stored_models import VARIABLE
from hypersd.errors import BundleError, DeviceError, EngineError, HyperSDError, RequestError

needs_bf16 = pytest.mark.skipif(not has_native_bf16(), reason="needs a processor that multiplies in bfloat16")


@pytest.fixture
def add(tmp_path: Path) -> OpenVinoEngine:
    """out [rows, columns] = a [rows, columns] + the transpose of b [columns, rows], all sizes 1 to 8."""
    path = tmp_path / "add.onnx"
    return OpenVinoEngine("net", path, write_add(path), "fp32")


def load_openvino(root: Path, precision: str) -> Mapping[str, Engine]:
    bundle = Bundle.load(root)
    return load_choice(bundle, choose(bundle, "openvino", precision=precision))


def load_unet(root: Path, precision: str) -> OpenVinoEngine:
    bundle = Bundle.load(root)
    unet = bundle.component("unet")
    return OpenVinoEngine("unet", bundle.path(unet.onnx), unet, precision)


@pytest.fixture(scope="module")
def exact() -> Callable[[Path], Mapping[str, Engine]]:
    """``exact(bundle)``: its engines in float32, loaded once."""
    return functools.cache(lambda root: load_openvino(root, "fp32"))


def first_step_feeds(engine: Engine, seed: int) -> dict[str, Tensor]:
    """Inputs as of the first step of an image of 1024x1024: large numbers where large numbers are usual."""
    feeds = random_feeds(engine.inputs, seed)
    for name, number in (("timestep", 999.0), ("time_ids", 1024.0)):
        if name in feeds:
            feeds[name].fill_(number)
    return feeds


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Root mean square of the error, in parts of what it is an error of."""
    return float((ours.float() - theirs.float()).square().mean().sqrt() / theirs.float().std())


# Float32's own error lies at 1e-6 and float16's, of the weights, at 5e-4; ONNX Runtime rounds where we do not.
@pytest.mark.parametrize(("family", "bound"), [("sd15", 1e-5), ("sdxl", 1e-5), ("sdxl_dynamic", 2e-3)])
def test_float32_outputs_are_those_of_onnx_runtime(
    family: str, bound: float, exact: Callable[[Path], Mapping[str, Engine]], request: pytest.FixtureRequest
) -> None:
    """Every network, fixed and ranged in shape, in the manifest's dtypes, on the first run and on later ones."""
    root = request.getfixturevalue(f"{family}_bundle")
    references = load_engines(Bundle.load(root), "onnxruntime", "cpu")
    for name, engine in exact(root).items():
        for seed in (0, 1, 2):
            feeds = first_step_feeds(engine, seed)
            ours, theirs = engine.run(feeds), references[name].run(feeds)
            assert ours.keys() == theirs.keys()
            for key, value in theirs.items():
                assert ours[key].dtype == value.dtype
                assert value.std() > 0, "a constant output would prove nothing"
                assert distance(ours[key], value) < bound, (name, key, seed)


@needs_bf16
@pytest.mark.parametrize("family", ["sd15", "sdxl_dynamic"])
def test_bfloat16_outputs_are_near_in_the_manifests_dtypes(
    family: str, exact: Callable[[Path], Mapping[str, Engine]], request: pytest.FixtureRequest
) -> None:
    """Each network rounds to 8 bits, so it is 1 % off or a little more; it must not be float32 in disguise."""
    root = request.getfixturevalue(f"{family}_bundle")
    for name, engine in load_openvino(root, "bf16").items():
        feeds = first_step_feeds(engine, 0)
        ours, theirs = engine.run(feeds), exact(root)[name].run(feeds)
        for key, value in theirs.items():
            assert ours[key].dtype == value.dtype
            assert 1e-3 < distance(ours[key], value) < 0.04, (name, key)


@needs_bf16
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_time_of_a_step_is_not_rounded_to_bfloat16(
    family: str,
    exact: Callable[[Path], Mapping[str, Engine]],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Timestep 999 has no bfloat16: with the angles of its embedding rounded the UNet computes for another timestep."""
    root = request.getfixturevalue(f"{family}_bundle")
    right, kept = exact(root)["unet"], load_unet(root, "bf16")
    monkeypatch.setattr(compiled_graph, "take_angles", lambda model: None)
    rounded = load_unet(root, "bf16")
    feeds = first_step_feeds(right, 0)
    at_zero = {**feeds, "timestep": torch.zeros(1)}  # whose angles are 0 in any precision
    unavoidable = distance(kept.run(at_zero)["out_sample"], right.run(at_zero)["out_sample"])
    far, near = (distance(net.run(feeds)["out_sample"], right.run(feeds)["out_sample"]) for net in (rounded, kept))
    assert near < 2 * unavoidable
    assert far > 2 * near


def test_shapes_come_and_go(add: OpenVinoEngine) -> None:
    """Runs at one shape leave no trace in those at another, in whatever order they come."""
    for rows, columns in [(2, 3), (3, 2), (2, 3), (8, 8), (1, 1), (3, 2), (2, 3)]:
        a, b = torch.randn(rows, columns), torch.randn(columns, rows)
        assert torch.equal(add.run({"b": b, "a": a})["out"], a + b.T)


def test_buffers_are_reused_at_the_same_shapes(add: OpenVinoEngine) -> None:
    """The contract of ``Engine.run``, and OpenVINO writes into the buffer itself: it is spoilt before every run."""
    small, large = ({"a": torch.randn(n, n), "b": torch.randn(n, n)} for n in (2, 4))
    first, other = add.run(small)["out"], add.run(large)["out"]
    assert first.data_ptr() != other.data_ptr()
    for _ in range(3):
        first.fill_(torch.nan)
        fresh = {name: tensor.clone() for name, tensor in small.items()}  # at other addresses
        assert add.run(fresh)["out"] is first
        assert torch.equal(first, small["a"] + small["b"].T)
        assert add.run(large)["out"] is other


def test_outputs_follow_inputs_changed_in_place_and_moved(add: OpenVinoEngine) -> None:
    """Inputs are read where they lie: the address may stay or change between calls, and its old memory be gone."""
    a, b = torch.zeros(2, 2), torch.zeros(2, 2)
    for i in range(20):
        a.fill_(i)
        assert add.run({"a": a, "b": b})["out"].eq(i).all()
        assert add.run({"a": torch.full((2, 2), i + 0.5), "b": b})["out"].eq(i + 0.5).all()


def test_the_least_recent_shapes_go_first(add: OpenVinoEngine) -> None:
    """A server whose shapes vary does not keep buffers for every shape that it ever saw."""

    def run(n: int) -> Tensor:
        rows, columns = 1 + n // 8, 1 + n % 8
        return add.run({"a": torch.ones(rows, columns), "b": torch.ones(columns, rows)})["out"]

    first, second = run(1), run(2)
    for n in range(3, KEPT + 1):
        run(n)
    assert run(1) is first
    run(KEPT + 1)
    assert run(1) is first, "used last"
    assert run(2) is not second, "pushed out"


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("rest", [30, 0.001])
def test_threads_share_an_engine_and_no_buffer(rest: float, sd15_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four threads hammer one UNet with inputs of their own: each gets its own answers, in buffers of its own.

    With a short rest, memory of intermediate results is given back between their runs.
    """
    monkeypatch.setattr(openvino_engine, "REST", rest)
    engine = load_unet(sd15_bundle, resolve_precision(None))
    feeds = [first_step_feeds(engine, seed) for seed in range(4)]
    expected = [engine.run(one)["out_sample"].clone() for one in feeds]
    assert not torch.allclose(expected[0], expected[1])
    start, end = threading.Barrier(4), threading.Barrier(4)

    def hammer(i: int) -> int:
        start.wait(60)
        for _ in range(30):
            output = engine.run(feeds[i])["out_sample"]
            torch.testing.assert_close(output, expected[i])
        end.wait(60)  # all threads are alive here, so equal addresses would be one buffer
        torch.testing.assert_close(output, expected[i])
        return output.data_ptr()

    with ThreadPoolExecutor(4) as pool:
        addresses = list(pool.map(hammer, range(4)))
    assert len({*addresses, engine.run(feeds[0])["out_sample"].data_ptr()}) == 5


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs Linux's CPU affinity")
@pytest.mark.parametrize("cores", [1, 2])
def test_options_of_compiled_models(cores: int, monkeypatch: pytest.MonkeyPatch, sd15_bundle: Path) -> None:
    """One image at a time, on the cores that we have, in the precision that was asked for; angles in float32."""
    cores = min(cores, len(os.sched_getaffinity(0)))  # OpenVINO asks for itself, and a test's worker may have one
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    precision = resolve_precision(None)
    for name, engine in load_openvino(sd15_bundle, precision).items():
        if isinstance(engine, LateEngine):
            continue
        assert isinstance(engine, OpenVinoEngine)
        *angles, network = engine._parts
        assert len(angles) == (name == "unet" and precision == "bf16")
        for part in engine._parts:
            assert part.get_property("INFERENCE_NUM_THREADS") == cores
            assert part.get_property("NUM_STREAMS") == 1
        hint = network.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        assert hint == PRECISIONS[precision]
        assert [part.get_property("INFERENCE_PRECISION_HINT").get_type_name() for part in angles] in ([], ["f32"])


# Refusals


BAD_FEEDS = {
    "missing": (lambda feeds: feeds.pop("b"), ["['a', 'b']", "['a']"]),
    "dtype": (lambda feeds: feeds.update(a=feeds["a"].half()), ["'a'", "float32[1..8, 1..8]", "float16[2, 3]"]),
    "too large": (lambda feeds: feeds.update(a=torch.zeros(9, 3)), ["'a'", "1..8", "float32[9, 3]"]),
    "strided": (lambda feeds: feeds.update(a=torch.zeros(3, 2).T), ["'a'", "contiguous"]),
    "do not fit": (lambda feeds: feeds.update(b=torch.ones(4, 5)), ["'b'", "columns 3", "received 4"]),
    "graded": (lambda feeds: feeds.update(a=torch.ones(2, 3, requires_grad=True)), ["OpenVINO failed", "grad"]),
}


@pytest.mark.parametrize(("spoil", "parts"), BAD_FEEDS.values(), ids=BAD_FEEDS)
def test_bad_inputs_are_rejected_in_one_line(add: OpenVinoEngine, spoil: Any, parts: list[str]) -> None:
    """On the first run and on a later one, and the engine is as good as before."""
    for _ in range(2):
        feeds = {"a": torch.zeros(2, 3), "b": torch.zeros(3, 2)}
        spoil(feeds)
        with pytest.raises(EngineError) as caught:
            add.run(feeds)
        message = str(caught.value)
        assert "\n" not in message
        assert message.startswith("net: ")
        assert [part for part in parts if part not in message] == []
        a, b = torch.randn(2, 3), torch.randn(3, 2)
        assert torch.equal(add.run({"a": a, "b": b})["out"], a + b.T)


@pytest.mark.parametrize("content", [b"", b"not an onnx file", b"\x08\x0a\x12\xff\xff\xff\xff\x0f", None], ids=repr)
def test_a_file_that_cannot_be_read_is_a_bundle_error_of_one_line(tmp_path: Path, content: bytes | None) -> None:
    """A damaged file, and one that vanished between the bundle's check and the load."""
    path = tmp_path / "net.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BundleError) as caught:
        OpenVinoEngine("net", path, component({"a": (1,)}, {"out": (1,)}), "fp32")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_graph_than_the_manifests_is_rejected(tmp_path: Path) -> None:
    """A bundle that was put together by hand."""
    path = tmp_path / "net.onnx"
    write_add(path)
    with pytest.raises(BundleError, match=r"\['a', 'b', 'out'\], the manifest says \['a', 'out'\]"):
        OpenVinoEngine("net", path, component({"a": (1,)}, {"out": (1,)}), "fp32")


def refusal(kind: type[HyperSDError], bundle: Path, *args: Any, **kwargs: Any) -> str:
    """The error of ``choose`` for these arguments, which is one line."""
    with pytest.raises(kind) as caught:
        choose(Bundle.load(bundle), *args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_options_that_do_not_go_together_are_rejected(sd15_bundle: Path) -> None:
    """Before anything is loaded: other devices, TensorRT's targets, unknown precisions, precisions of others."""
    assert "expected auto or cpu" in refusal(RequestError, sd15_bundle, "openvino", "cuda")
    assert "expected auto or cpu" in refusal(RequestError, sd15_bundle, "openvino", torch.device("cuda", 1))
    assert "only TensorRT has targets" in refusal(RequestError, sd15_bundle, "openvino", target="sm89")
    assert "expected one of fp32, bf16" in refusal(RequestError, sd15_bundle, "openvino", precision="fp16")
    for backend in ("auto", "onnxruntime"):
        assert "only OpenVINO" in refusal(RequestError, sd15_bundle, backend, "cpu", precision="fp32")


def test_bfloat16_is_for_processors_that_have_it(sd15_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere it is rejected if it was asked for, never emulated in silence; what is left open becomes float32."""
    bundle = Bundle.load(sd15_bundle)
    monkeypatch.setattr(library, "has_native_bf16", lambda: False)
    assert choose(bundle, "openvino").precision == "fp32"
    assert "expected fp32" in refusal(DeviceError, sd15_bundle, "openvino", precision="bf16")
    monkeypatch.setattr(library, "has_native_bf16", lambda: True)
    assert choose(bundle, "openvino", "cpu").precision == "bf16"
    expected = Choice(backend="openvino", target=None, manifest=bundle.manifest, passed_over={}, precision="fp32")
    assert choose(bundle, "openvino", precision="fp32") == expected


def test_half_precision_on_a_cpu_is_openvinos(
    sdxl_mixed_bundle: Path, sd15_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``auto`` computes in the precision that was asked for at the export; without OpenVINO it is as it was."""
    halves, full = Bundle.load(sdxl_mixed_bundle), Bundle.load(sd15_bundle)
    for device in ("auto", "cpu"):
        chosen = choose(halves, "auto", device)
        assert (chosen.backend, chosen.precision) == ("openvino", resolve_precision(None))
        assert choose(halves, "auto", device, precision="fp32").precision == "fp32"
        assert choose(full, "auto", device).backend == "onnxruntime"
    assert choose(halves, "onnxruntime", "cpu").backend == "onnxruntime"
    monkeypatch.setattr(load, "is_installed", lambda: False)
    assert choose(halves, "auto", "cpu").backend == "onnxruntime"


@needs_bf16
def test_stored_models_have_their_weights_in_float16(
    sd15_bundle: Path, sdxl_mixed_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of float32 bundles: the same outputs at every load, and a damaged one is replaced."""
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    plain = load_unet(sd15_bundle, "fp32")
    assert list(tmp_path.iterdir()) == [], "float32 is computed from the bundle's own weights"
    feeds = first_step_feeds(plain, 0)
    outputs = []
    for damage in (False, False, True):
        if damage:
            [weights] = tmp_path.glob("unet-*/model.bin")
            weights.write_bytes(b"")
        outputs.append(load_unet(sd15_bundle, "bf16").run(feeds)["out_sample"].clone())
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert 1e-3 < distance(outputs[0], plain.run(feeds)["out_sample"]) < 0.04
    [stored] = tmp_path.glob("unet-*/model.bin")
    size = sum(file.size for name, file in Bundle.load(sd15_bundle).manifest.files.items() if name.startswith("unet/"))
    assert stored.stat().st_size < 0.6 * size
    load_openvino(sdxl_mixed_bundle, "bf16")
    others = {path.name.partition("-")[0] for path in tmp_path.glob("[!.]*")} - {"text_encoder", "unet"}
    assert others == {"vae_decoder"}, "the VAE alone is float32 there"
    assert len(list(tmp_path.glob("unet-*/model.xml"))) == 1


def test_without_the_package_it_says_what_to_install(sd15_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra is no part of the plain install."""
    monkeypatch.setitem(sys.modules, "openvino", None)  # which makes its import fail
    monkeypatch.setattr(library, "core", library.core.__wrapped__)
    assert "pip install -e '.[openvino]'" in refusal(DeviceError, sd15_bundle, "openvino")


def test_a_pipeline_generates_the_images_of_onnx_runtime(sd15_bundle: Path) -> None:
    """All networks together, from ``Pipeline.load`` on."""
    ours = Pipeline.load(sd15_bundle, backend="openvino", precision="fp32")
    theirs = Pipeline.load(sd15_bundle, backend="onnxruntime", device="cpu")
    images = [pipe("a photo of a cat", seed=0, output_type="np").images for pipe in (ours, theirs)]
    assert abs(images[0] - images[1]).max() < 1e-4
    assert images[1].std() > 0.05
