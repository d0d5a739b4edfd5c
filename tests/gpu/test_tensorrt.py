"""TensorRT on a GPU: that its plans compute what ONNX Runtime and diffusers do, and what they leave behind."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest

pytestmark = pytest.mark.gpu
SD15, SDXL = "Hyper-SD15-1step-lora", "Hyper-SDXL-1step-lora"
CALLS = 1000
PSNR = 30.0  # dB, what `hypersd verify` asks of fp16
LATENT_ERROR = 2e-2  # root mean square of the difference, as a part of the latents'


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(1 / max(np.mean((a.astype(np.float64) - b) ** 2), 1e-20)))


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


def test_pictures_are_those_of_onnx_runtime(pipe, built) -> None:
    """Same bundle, same seed, several steps with noise of their own: the backend changes nothing that is seen."""
    from hypersd import Pipeline

    other = Pipeline.load(built(pipe.manifest.checkpoint), backend="onnxruntime", device="cpu")
    for steps, seed in ((1, 0), (4, 1), (8, 2)):
        settings = {"num_inference_steps": steps, "eta": 1.0, "seed": seed, "output_type": "np"}
        assert psnr(pipe("a cat", **settings).images, other("a cat", **settings).images) >= PSNR, (steps, seed)


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
    assert used() <= before
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

    from hypersd.engines.graphed_engine import GraphedEngine
    from hypersd.engines.tensorrt.validate import random_feeds

    for name, engine in pipe.engines.items():
        graphed = GraphedEngine(engine)
        for feeds in random_feeds(engine.inputs):
            on_gpu = {key: tensor.to(engine.device) for key, tensor in feeds.items()}
            eager = {key: tensor.clone() for key, tensor in engine.run(on_gpu).items()}
            for _ in range(5):  # the first runs are eager, later ones replayed
                replayed = graphed.run(on_gpu)
            torch.cuda.synchronize()
            assert all(torch.equal(eager[key], replayed[key]) for key in eager), name


def test_engines_of_a_pipeline_share_one_block_of_activations(pipe) -> None:
    pipe("a cat", seed=0, callback_on_step_end=lambda *_: None)
    blocks = {
        lane.block.data_ptr() for engine in pipe.engines.values() for lane in engine._local.__dict__["lanes"].values()
    }
    assert len(blocks) == 1


def test_a_shape_outside_the_plan_is_refused(pipe) -> None:
    import torch

    from hypersd.errors import EngineError, RequestError

    with pytest.raises(RequestError, match="height"):
        pipe("a cat", height=4096)
    feeds = {"latent_sample": torch.zeros(1, 4, 999, 8, dtype=torch.float16, device=pipe.device)}
    with pytest.raises(EngineError, match="latent_sample"):
        pipe.vae_decoder.run(feeds)


def test_a_full_device_is_told_with_what_was_needed_and_free(built, backend: str, cuda) -> None:
    import torch

    from hypersd import Pipeline
    from hypersd.errors import EngineError

    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    hog = torch.empty(free - (24 << 20), dtype=torch.uint8, device=cuda)
    try:
        with pytest.raises(EngineError, match=r"memory.*GB.*free"):
            Pipeline.load(built(SDXL), backend=backend)("a cat", seed=0)
    finally:
        del hog
        torch.cuda.empty_cache()


def test_plans_without_weights_take_them_from_the_onnx_files(fp16_bundle, backend: str) -> None:
    """Smaller on disk, and the same pictures."""
    from hypersd import Pipeline
    from hypersd.engines import BuildOptions, build_engines

    root = fp16_bundle(SD15)
    whole = build_engines(root, backend)
    stripped = build_engines(root, backend, BuildOptions(stripped=True))
    names = {target.stripped: name for name, target in stripped.manifest.engines.items() if target.backend == backend}
    sizes = {
        is_stripped: sum(
            stripped.manifest.files[plan.file].size for plan in stripped.manifest.engines[name].plans.values()
        )
        for is_stripped, name in names.items()
    }
    assert sizes[True] < sizes[False]
    pictures = [
        Pipeline.load(whole.root, backend=backend, target=name)("a cat", seed=0, output_type="np").images
        for name in names.values()
    ]
    assert psnr(*pictures) >= PSNR


def test_the_second_load_takes_the_kernels_from_the_cache(built, backend: str) -> None:
    from hypersd import Pipeline

    if backend != "tensorrt-rtx":
        pytest.skip("only RTX compiles when it loads")
    root = built(SD15)
    first = Pipeline.load(root, backend=backend)("a cat", seed=0, output_type="np").images
    caches = {path: path.read_bytes() for path in root.glob("engines/*/*.cache")}
    assert caches
    second = Pipeline.load(root, backend=backend)("a cat", seed=0, output_type="np").images
    assert {path: path.read_bytes() for path in root.glob("engines/*/*.cache")} == caches
    assert np.array_equal(first, second)
