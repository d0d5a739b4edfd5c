"""TensorRT on a GPU: that its plans compute what ONNX Runtime and diffusers do, and what they leave behind."""

from __future__ import annotations

import gc
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hypersd.engines.progress import Silent

pytestmark = pytest.mark.gpu
SD15, SDXL = "Hyper-SD15-1step-lora", "Hyper-SDXL-1step-lora"
CALLS = 1000
PSNR = 30.0  # dB, what `hypersd verify` asks of fp16
LATENT_ERROR = 2e-2  # root mean square of the difference, as a part of the latents'
MB = 1 << 20
OTHERS = 32 * MB  # device memory that others may take during a test; a leak of 1000 calls is more
CALLS_OF_A_KIND = 6  # two that warm up, one that records, and replays


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(1 / max(np.mean((a.astype(np.float64) - b) ** 2), 1e-20)))


class Notes(Silent):
    """Keeps what was noted of each stage."""

    def __init__(self) -> None:
        self.of: dict[str, str] = {}

    def finish(self, stage: str, seconds: float, note: str, ok: bool) -> None:
        self.of[stage] = note


def copied(root: Path, folder: Path) -> Path:
    """A copy of a bundle that a test may change: its engines too, but nothing that was compiled at a load."""
    return Path(shutil.copytree(root, folder / root.name, ignore=shutil.ignore_patterns("*.cache")))


def assert_draws_as_the_cpu(root: Path, backend: str, **settings: Any) -> None:
    """Eager, recorded and replayed, every image is ONNX Runtime's on the CPU."""
    from hypersd import Pipeline

    ours = Pipeline.load(root, backend=backend)
    theirs = Pipeline.load(root, backend="onnxruntime", device="cpu")
    for seed in range(CALLS_OF_A_KIND):
        images = [pipe("a cat", seed=seed, output_type="np", **settings).images for pipe in (ours, theirs)]
        assert images[0].shape == images[1].shape
        quality = [psnr(one, other) for one, other in zip(*images, strict=True)]
        assert min(quality) >= PSNR, (seed, quality)


@pytest.fixture(params=[SD15, SDXL])
def pipe(request: pytest.FixtureRequest, built, backend: str):
    from hypersd import Pipeline

    return Pipeline.load(built(request.param), backend=backend)


@pytest.mark.parametrize("name", [SD15, SDXL])
def test_every_plan_was_compared_with_onnx_runtime(built, backend: str, name: str) -> None:
    """On a GPU no plan is recorded unchecked, and the error is within what fp16 allows."""
    from hypersd.engines import Bundle
    from hypersd.engines.compare import TOLERANCES

    manifest = Bundle.load(built(name)).manifest
    (target,) = [target for target in manifest.engines.values() if target.backend == backend]
    assert target.plans.keys() == manifest.components.keys()
    errors = {component: plan.error for component, plan in target.plans.items()}
    assert all(error is not None and error <= TOLERANCES["float16"][0] for error in errors.values()), errors


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_latents_are_those_of_diffusers_on_the_same_gpu(pipe, reference, steps: int) -> None:
    """Text, UNet and sampler with one seed: both draw their noise in float16 on the CPU."""
    import copy

    import torch

    judge = copy.deepcopy(reference(pipe.manifest.checkpoint)).to("cuda", torch.float16)
    settings = {"num_inference_steps": steps, "eta": 1.0, "output_type": "latent"}
    ours = pipe("a red cube", seed=3, **settings).images.float()
    generator = torch.Generator().manual_seed(3)
    theirs = judge("a red cube", guidance_scale=0, generator=generator, **settings).images.float()
    assert ours.shape == theirs.shape
    assert (ours - theirs).pow(2).mean().sqrt() <= LATENT_ERROR * theirs.pow(2).mean().sqrt()


def test_images_are_those_of_onnx_runtime(pipe, built) -> None:
    """Same bundle, same seed, several steps with noise of their own: the backend changes nothing that is seen."""
    from hypersd import Pipeline

    other = Pipeline.load(built(pipe.manifest.checkpoint), backend="onnxruntime", device="cpu")
    for steps, seed in ((1, 0), (4, 1), (8, 2)):
        settings = {"num_inference_steps": steps, "eta": 1.0, "seed": seed, "output_type": "np"}
        assert psnr(pipe("a cat", **settings).images, other("a cat", **settings).images) >= PSNR, (steps, seed)


@pytest.mark.parametrize("name", [SD15, SDXL])
def test_rows_beyond_a_static_batch_are_drawn_one_by_one(built, backend: str, name: str) -> None:
    """Guidance and two images on a bundle for one: the networks read and write slices of larger tensors."""
    settings = {"num_inference_steps": 4, "guidance_scale": 3.0, "negative_prompt": "red", "num_images_per_prompt": 2}
    assert_draws_as_the_cpu(built(name), backend, **settings)


def test_shapes_change_inside_one_recording(backend: str, sdxl_dynamic_bundle: Path, tmp_path: Path) -> None:
    """Three images on a bundle for one or two: runs of two rows and of one, in one graph."""
    from hypersd.engines import build_engines

    root = build_engines(copied(sdxl_dynamic_bundle, tmp_path), backend).root
    assert_draws_as_the_cpu(root, backend, num_inference_steps=8, num_images_per_prompt=3)
    assert_draws_as_the_cpu(root, backend, num_inference_steps=8, num_images_per_prompt=3, height=104, width=96)


def test_a_controlnet_beside_the_unet(backend: str, sdxl_dynamic_bundle: Path, tmp_path: Path) -> None:
    """Its residuals go from engine to engine, in ranged shapes, with and without guidance, for part of the steps."""
    from hypersd.engines import build_engines

    root = build_engines(copied(sdxl_dynamic_bundle, tmp_path), backend).root
    image = Image.effect_noise((96, 104), 60)
    for control in ({}, {"guidance_scale": 1.0}, {"control_guidance_end": 0.5}, {"num_images_per_prompt": 3}):
        assert_draws_as_the_cpu(root, backend, num_inference_steps=8, control_image=image, **control)


def test_low_memory_draws_the_same(pipe, built, backend: str) -> None:
    from hypersd import Pipeline

    low = Pipeline.load(built(pipe.manifest.checkpoint), backend=backend, low_memory=True)
    for seed in range(2):
        images = [each("a cat", num_inference_steps=2, seed=seed, output_type="np").images for each in (pipe, low)]
        assert psnr(*images) >= PSNR, seed


def test_many_calls_take_no_more_device_memory(pipe) -> None:
    """Of the whole device, so that TensorRT's own allocations count too."""
    import torch

    def used() -> int:
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        return total - free

    for seed in range(10):
        pipe("a cat", num_inference_steps=2, seed=seed)
    gc.collect()
    before, allocated = used(), torch.cuda.memory_allocated()
    for seed in range(CALLS):
        pipe("a cat", num_inference_steps=2, seed=seed)
    assert used() <= before + OTHERS
    assert torch.cuda.memory_allocated() <= allocated


def test_two_pipelines_and_two_threads_draw_what_each_draws_alone(built, backend: str) -> None:
    from hypersd import Pipeline

    pipes = {name: Pipeline.load(built(name), backend=backend) for name in (SD15, SDXL)}
    alone = {(n, s): pipe("a cat", seed=s, output_type="np").images for n, pipe in pipes.items() for s in range(8)}
    wrong: list[object] = []

    def draw(name: str) -> None:
        for _ in range(5):
            for seed in range(8):
                drawn = pipes[name]("a cat", seed=seed, output_type="np").images
                if not np.array_equal(drawn, alone[name, seed]):
                    wrong.append((name, seed))

    threads = [threading.Thread(target=draw, args=(name,)) for name in (SD15, SDXL, SD15, SDXL)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_replayed_engine_gives_the_bits_of_a_run_one(pipe) -> None:
    import torch

    from hypersd.engines.cuda.capture import capture_cuda_graph
    from hypersd.engines.cuda.graphs import GraphedEngine
    from hypersd.engines.tensorrt.validate import random_feeds

    captures: list[object] = []

    def capture(work, memory):
        captures.append(work)
        return capture_cuda_graph(work, memory)

    for name, engine in pipe.engines.items():
        graphed = GraphedEngine(engine, capture)
        for feeds in random_feeds(engine.inputs):
            on_gpu = {key: tensor.to(engine.device) for key, tensor in feeds.items()}
            with torch.cuda.stream(torch.cuda.Stream()):  # the default stream cannot be recorded
                eager = {key: tensor.clone() for key, tensor in engine.run(on_gpu).items()}
                captures.clear()
                for _ in range(5):  # the first runs are eager, later ones replayed
                    replayed = graphed.run(on_gpu)
                torch.cuda.synchronize()
                assert len(captures) == 1
                assert all(torch.equal(eager[key], replayed[key]) for key in eager), name


def test_engines_of_a_pipeline_share_one_block_of_activations(pipe) -> None:
    pipe("a cat", seed=0, callback_on_step_end=lambda *_: None)
    lanes = [lane for engine in pipe.engines.values() for own in engine._lanes.values() for lane in own.values()]
    blocks = {lane.block.data_ptr() for lane in lanes}
    assert len(blocks) == 1


def test_a_shape_outside_the_plan_is_refused(pipe) -> None:
    import torch

    from hypersd.errors import EngineError, RequestError

    with pytest.raises(RequestError, match="height"):
        pipe("a cat", height=4096)
    feeds = {"latent_sample": torch.zeros(1, 4, 999, 8, dtype=torch.float16, device=pipe.device)}
    with pytest.raises(EngineError, match="latent_sample"):
        pipe.engines["vae_decoder"].run(feeds)


def test_a_full_device_is_told(built, backend: str, cuda) -> None:
    """Drawn once before, so that what is not this pipeline's own (kernels of torch, contexts) is on the device."""
    from hypersd import Pipeline
    from hypersd.errors import EngineError

    root = built(SDXL)
    Pipeline.load(root, backend=backend)("a cat", seed=0)
    hog = fill_device(cuda)
    try:
        with pytest.raises(EngineError, match="memory"):
            Pipeline.load(root, backend=backend)("a cat", seed=0)
    finally:
        hog.clear()
        empty_device_cache()
    Pipeline.load(root, backend=backend)("a cat", seed=0)  # what failed left nothing behind


def fill_device(cuda: Any) -> list[object]:
    """Take all device memory but 2 MB, or as little more as the driver keeps to itself."""
    import torch

    empty_device_cache()
    free, _ = torch.cuda.mem_get_info()
    for left in (2, 4, 8, 16, 32, 64):
        try:
            return [torch.empty(free - left * MB, dtype=torch.uint8, device=cuda)]
        except torch.OutOfMemoryError:
            continue
    pytest.fail(f"of {free / MB:.0f} MB that are free not even {(free - 64 * MB) / MB:.0f} can be had")


def empty_device_cache() -> None:
    import torch

    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def test_plans_without_weights_take_them_from_the_onnx_files(fp16_bundle, tmp_path: Path, backend: str) -> None:
    """The same images; smaller on disk where there are weights to speak of."""
    from hypersd import Pipeline
    from hypersd.engines import BuildOptions, build_engines

    root = copied(fp16_bundle(SD15), tmp_path)
    build_engines(root, backend)
    manifest = build_engines(root, backend, BuildOptions(stripped=True)).manifest
    targets = {target.stripped: name for name, target in manifest.engines.items() if target.backend == backend}
    sizes = {kind: manifest.files[manifest.engines[name].plans["unet"].file].size for kind, name in targets.items()}
    weights = sum(manifest.files[file].size for file in manifest.components["unet"].files)
    assert weights <= MB or sizes[True] < sizes[False]
    images = [
        Pipeline.load(root, backend=backend, target=name)("a cat", seed=0, output_type="np").images
        for name in targets.values()
    ]
    assert len(images) == 2
    assert psnr(*images) >= PSNR


def test_the_second_load_takes_the_kernels_from_the_cache(built, tmp_path: Path, backend: str) -> None:
    from hypersd import Pipeline

    if backend != "tensorrt-rtx":
        pytest.skip("only RTX compiles when it loads")
    root, images, notes = copied(built(SD15), tmp_path), [], []
    for _ in range(2):
        notes.append(Notes())
        pipe = Pipeline.load(root, backend=backend, progress=notes[-1])
        images.append(pipe("a cat", seed=0, output_type="np").images)
        assert len(list(root.glob("engines/*/*.cache"))) == len(pipe.engines)
    first, second = ({note for stage, note in noted.of.items() if "first run" in stage} for noted in notes)
    assert first == {"compiled for this GPU: the next load is quicker"}
    assert second == {"compiled at an earlier load"}
    assert np.array_equal(*images)
