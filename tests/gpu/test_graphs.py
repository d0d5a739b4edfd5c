"""CUDA graphs on a real GPU: the same bits as step by step, no growth, and no mixing of pipelines or threads.

Skipped without a CUDA device, which tests/conftest.py hides unless CUDA_VISIBLE_DEVICES is set:
``CUDA_VISIBLE_DEVICES=0 pytest -m gpu tests/gpu``.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from counting import load_engines
from PIL import Image
from torch import Tensor

from hypersd import Pipeline
from hypersd.engines import Bundle
from hypersd.engines.cuda.capture import capture_cuda_graph
from hypersd.engines.cuda.graphs import WARM_UPS, GraphedFunction, GraphWarning
from hypersd.engines.onnx_runtime import OnnxRuntimeEngine, resolve_device
from hypersd.engines.specs import Range
from hypersd.errors import DeviceError
from hypersd.runtime.runner import KEPT_GRAPHS
from hypersd.runtime.text import load_tokenizers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("error::hypersd.engines.cuda.graphs.GraphWarning"),
]
PROMPTS = ["a photo of a cat", "blue dog", "", "red cat"]


def load(root: Path, largest: int | None = None) -> tuple[Pipeline, Pipeline]:
    """A pipeline that records and one that does not, on the same engines: ONNX Runtime's CUDA provider.

    They are as for a bundle whose largest batch is ``largest``, if that is given.

    The same, because cuDNN chooses its algorithms by timing them: another session may compute other bits.
    """
    try:
        resolve_device("cuda")
    except DeviceError as error:
        pytest.skip(str(error))
    bundle = Bundle.load(root)
    engines = load_engines(bundle, "onnxruntime", "cuda")
    assert all(engine.capturable for engine in engines.values()), "ONNX Runtime would not record a network"
    tokenizers, manifest = load_tokenizers(bundle), bundle.manifest
    if largest is not None:
        batch = Range(name="batch", min=1, opt=1, max=largest)
        manifest = msgspec.structs.replace(manifest, shapes=msgspec.structs.replace(manifest.shapes, batch=batch))
    graphed = Pipeline(manifest, engines, tokenizers, capture=capture_cuda_graph)
    return graphed, Pipeline(manifest, engines, tokenizers, capture=None)


def assert_recorded(pipe: Pipeline, graphs: int | None = None) -> None:
    """All kinds of call that are kept have their graph, and there are ``graphs`` of them."""
    assert pipe.recorded_graphs
    assert all(pipe.recorded_graphs)
    assert graphs in (None, len(pipe.recorded_graphs))


def images_of(pipe: Pipeline, prompt: str, **arguments: Any) -> np.ndarray:
    images = pipe(prompt, **arguments).images
    if isinstance(images, list):
        return np.stack([np.asarray(image) for image in images])
    return images.cpu().numpy() if isinstance(images, Tensor) else images


def assert_alike(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Images [N, H, W, 3] in 0..1 of other kernels: no image is off by more than rounding may come to."""
    assert ours.shape == theirs.shape
    assert np.sqrt(((ours - theirs) ** 2).mean(axis=(1, 2, 3))).max() <= 0.03  # 30 dB


# Recording itself, without any engine


def test_a_replay_computes_what_the_work_does() -> None:
    """Torch operations alone."""

    def work(key: int, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"out": torch.tanh(inputs["x"] * key).sum(dim=-1)}

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        graphed = GraphedFunction(work)
        for i in range(WARM_UPS + 4):
            x = torch.randn(64, 32, device="cuda")
            assert torch.equal(graphed(3, {"x": x})["out"], work(3, {"x": x})["out"])
            assert torch.cuda.current_stream() == stream, f"call {i}"
        assert graphed.recorded == [True]


def test_a_failed_recording_leaves_torch_and_the_function_usable() -> None:
    """A wait for the device spoils the recording: one line says so, and the results are right all the same.

    The stream is what it was, memory is served, and other keys are recorded.
    """
    fail = [True]

    def work(key: int, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if fail[0] and torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream().synchronize()
        return {"out": inputs["x"] * key}

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        graphed, x = GraphedFunction(work), torch.ones(8, device="cuda")
        for _ in range(WARM_UPS):
            graphed(2, {"x": x})
        with pytest.warns(GraphWarning, match="recording failed") as caught:
            assert torch.equal(graphed(2, {"x": x})["out"], x * 2)
        (warning,) = caught
        assert "\n" not in str(warning.message)
        assert torch.cuda.current_stream() == stream
        for i in range(WARM_UPS + 3):
            assert torch.equal(graphed(2, {"x": x + i})["out"], (x + i) * 2)
        fail[0] = False
        for i in range(WARM_UPS + 3):
            assert torch.equal(graphed(3, {"x": x + i})["out"], (x + i) * 3)
            assert torch.equal(graphed(2, {"x": x + i})["out"], (x + i) * 2)
        assert graphed.recorded == [True, False]
    torch.cuda.synchronize()


# The pipeline


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sdxl_dynamic"])
def test_graphs_draw_the_same_bits_as_step_by_step(family: str, request: pytest.FixtureRequest) -> None:
    """Prompts and seeds change under one graph, settings between graphs."""
    graphed, plain = load(request.getfixturevalue(f"{family}_bundle"))
    calls: list[dict[str, Any]] = [
        {"num_inference_steps": 8, "eta": 1.0},
        {"num_inference_steps": 8, "eta": 0.3, "guidance_scale": 4.0, "output_type": "np"},
        {"num_inference_steps": 8, "num_images_per_prompt": 2, "output_type": "pt"},
        {"num_inference_steps": 8, "guidance_scale": 4.0, "negative_prompt": "red", "output_type": "latent"},
    ]
    for i in range(WARM_UPS + 4):
        for call in calls:
            ours, theirs = (images_of(pipe, PROMPTS[i % 4], seed=i, **call) for pipe in (graphed, plain))
            assert np.array_equal(ours, theirs), f"round {i}, {call}"
    assert_recorded(graphed, len(calls))


def test_numbers_are_inputs_of_a_graph(sd15_bundle: Path) -> None:
    """Eta, guidance scale and timesteps change under one graph, to the bit."""
    graphed, plain = load(sd15_bundle)
    for i in range(WARM_UPS + 4):
        for steps in ({"num_inference_steps": 3}, {"timesteps": [999 - i, 500 + i, 20]}):
            call = {
                "seed": i,
                "eta": 0.1 + 0.1 * i,
                "guidance_scale": 2.0 + i,
                "force": True,
                "output_type": "np",
                **steps,
            }
            assert np.array_equal(*(images_of(pipe, PROMPTS[0], **call) for pipe in (graphed, plain))), call
    assert_recorded(graphed, 1)


def test_a_padded_batch_is_the_cpus(sd15_bundle: Path) -> None:
    """Three images of a bundle for four share the graph of four, and are those that the CPU generates."""
    graphed, _ = load(sd15_bundle, largest=4)
    on_cpu = Pipeline.load(sd15_bundle, "onnxruntime", "cpu")
    for i in range(WARM_UPS + 2):
        for images in (3, 4):
            call = {"prompt": PROMPTS[:images], "seed": [i + n for n in range(images)], "output_type": "np"}
            assert_alike(*(images_of(pipe, num_inference_steps=2, **call) for pipe in (graphed, on_cpu)))
    assert_recorded(graphed, 1)


def test_low_memory_generates_the_same_and_disturbs_no_recording(sd15_bundle: Path, sdxl_bundle: Path) -> None:
    """Each of its stages makes and frees sessions, which wait for the whole device, while another pipeline records."""
    graphed, plain = load(sd15_bundle)
    low, usual = (Pipeline.load(sdxl_bundle, "onnxruntime", "cuda", low_memory=each) for each in (True, False))
    call: dict[str, Any] = {"num_inference_steps": 1, "output_type": "np"}
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(lambda: [images_of(low, PROMPTS[i % 4], seed=i, **call) for i in range(8)])
        for n in range(1, KEPT_GRAPHS + 1):
            words = {"num_inference_steps": n, "seed": n, "force": True, "output_type": "np"}
            expected = images_of(plain, PROMPTS[0], **words)
            for _ in range(WARM_UPS + 2):
                assert np.array_equal(images_of(graphed, PROMPTS[0], **words), expected)
        images = made.result(300)
    assert_recorded(graphed, KEPT_GRAPHS)
    for i, image in enumerate(images):
        assert_alike(image, images_of(usual, PROMPTS[i % 4], seed=i, **call))


def test_control_images_are_inputs_of_a_graph(sdxl_dynamic_bundle: Path) -> None:
    """Images and strengths that change are drawn by one graph, to the bit; zeros of plain calls stay zeros."""
    graphed, plain = load(sdxl_dynamic_bundle)
    images = [Image.effect_noise((64, 64), sigma) for sigma in (20, 90)]
    for i in range(WARM_UPS + 4):
        control = {"control_image": images[i % 2], "controlnet_conditioning_scale": 0.2 * i + 0.1}
        for call in (control, {}, {**control, "control_guidance_end": 0.5}):
            settings = {"num_inference_steps": 8, "seed": i, "output_type": "np", **call}
            assert np.array_equal(images_of(graphed, PROMPTS[0], **settings), images_of(plain, PROMPTS[0], **settings))
    assert_recorded(graphed, 3)


def test_a_stream_draws_what_calls_draw(sd15_bundle: Path) -> None:
    """Tensors too: they are for the stream of the caller, from whichever thread they come."""
    pipe, _ = load(sd15_bundle)
    generator, words = np.random.default_rng(0), {"num_inference_steps": 2, "strength": 0.5, "seed": 3}
    frames = [Image.fromarray(generator.integers(0, 256, (64, 64, 3), np.uint8)) for _ in range(WARM_UPS + 4)]
    for output_type in ("pil", "pt"):
        with torch.cuda.stream(torch.cuda.Stream()):
            made = [
                np.asarray(image if output_type == "pil" else image.cpu())
                for image in pipe.stream(frames, PROMPTS[0], output_type=output_type, look_ahead=2, **words)
            ]
        for frame, image in zip(frames, made, strict=True):
            single = images_of(pipe, PROMPTS[0], image=frame, output_type=output_type, **words)[0]
            assert np.array_equal(image, single)
    assert_recorded(pipe, graphs=2)


def test_a_thousand_calls_do_not_grow(sdxl_bundle: Path) -> None:
    """Nothing is allocated after the first calls: not by torch, and not on the device by anybody."""
    pipe, _ = load(sdxl_bundle)
    arguments: dict[str, Any] = {"num_inference_steps": 4, "eta": 1.0}
    for i in range(20):
        images_of(pipe, PROMPTS[i % 4], seed=i, **arguments)
    torch.cuda.synchronize()
    before, free = torch.cuda.memory_stats(), torch.cuda.mem_get_info()[0]
    for i in range(1000):
        images_of(pipe, PROMPTS[i % 4], seed=i, **arguments)
    torch.cuda.synchronize()
    after = torch.cuda.memory_stats()
    for name in ("allocated_bytes.all.current", "reserved_bytes.all.current", "num_device_alloc"):
        assert after.get(name, 0) == before.get(name, 0), name
    assert free - torch.cuda.mem_get_info()[0] < 32 << 20, "others may use the GPU, but a leak would show"
    assert_recorded(pipe, 1)


def test_a_thread_for_every_call_gets_to_the_graph_and_makes_no_buffers(sd15_bundle: Path) -> None:
    """As many services work; step by step, which callbacks ask for, too."""
    graphed, plain = load(sd15_bundle)
    callback = {"callback_on_step_end": lambda *_: None}
    expected = images_of(plain, PROMPTS[0], seed=0, num_inference_steps=2)
    used = []
    for _ in range(30):
        for call in ({}, callback):
            with ThreadPoolExecutor(1) as pool:
                drawn = pool.submit(images_of, graphed, PROMPTS[0], seed=0, num_inference_steps=2, **call).result(60)
            assert np.array_equal(drawn, expected)
        torch.cuda.synchronize()
        used.append((torch.cuda.memory_allocated(), -torch.cuda.mem_get_info()[0]))
    assert_recorded(graphed, 1)
    (ours, all_), (ours_before, all_before) = used[-1], used[WARM_UPS + 3]
    assert ours == ours_before
    assert all_ - all_before < 32 << 20, "ONNX Runtime's handles of cuBLAS and cuDNN are not torch's memory"
    for name, engine in graphed.engines.items():
        assert isinstance(engine, OnnxRuntimeEngine)
        if name != "vae_encoder":  # nothing was given to encode
            assert len(engine._of_stream) == 2, "the two pipelines'"


def test_many_kinds_of_call_replace_one_another(sd15_bundle: Path) -> None:
    """More kinds than are kept: graphs are dropped with their memory and made again, and the images stay right."""
    graphed, plain = load(sd15_bundle)
    numbers = range(1, KEPT_GRAPHS + 5)
    kinds: list[dict[str, Any]] = [{"num_inference_steps": n, "eta": 1.0, "force": True} for n in numbers]
    expected = [images_of(plain, PROMPTS[0], seed=n, **kind) for n, kind in enumerate(kinds)]
    used = []
    for _ in range(3):
        for n, kind in enumerate(kinds):
            for _ in range(WARM_UPS + 2):
                assert np.array_equal(images_of(graphed, PROMPTS[0], seed=n, **kind), expected[n])
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_allocated())
    assert used[2] <= used[1] + (1 << 20)
    assert_recorded(graphed, KEPT_GRAPHS)


def test_two_pipelines_and_two_threads_draw_what_they_draw_alone(sd15_bundle: Path, sdxl_bundle: Path) -> None:
    """In one process, at once, recordings included: nothing of one call is in another's image."""
    pipes, plain = zip(load(sd15_bundle), load(sdxl_bundle), strict=True)
    jobs = [(which, seed) for which in range(2) for seed in (1, 2)]
    alone = [images_of(plain[which], PROMPTS[seed], seed=seed, num_inference_steps=4) for which, seed in jobs]
    barrier = threading.Barrier(len(jobs))

    def work(i: int) -> list[np.ndarray]:
        which, seed = jobs[i]
        barrier.wait(60)
        with torch.cuda.stream(torch.cuda.Stream()):
            return [images_of(pipes[which], PROMPTS[seed], seed=seed, num_inference_steps=4) for _ in range(30)]

    with ThreadPoolExecutor(len(jobs)) as pool:
        for i, results in enumerate(pool.map(work, range(len(jobs)))):
            assert all(np.array_equal(result, alone[i]) for result in results), jobs[i]
    for pipe in pipes:
        assert_recorded(pipe, 1)


def test_tensors_are_the_callers(sd15_bundle: Path) -> None:
    """Tensors returned for "pt" are in order with the caller's stream, and later calls do not change them."""
    pipe, _ = load(sd15_bundle)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        results = [pipe(PROMPTS[0], seed=i, output_type="pt").images for i in range(8)]
        sums = [result.double().sum() for result in results]
    stream.synchronize()
    again = [pipe(PROMPTS[0], seed=i, output_type="pt").images for i in range(8)]
    assert all(torch.equal(one, other) for one, other in zip(results, again, strict=True))
    assert all(one == other.double().sum() for one, other in zip(sums, again, strict=True))
    assert_recorded(pipe, 1)
