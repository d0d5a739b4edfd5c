"""A pipeline on a one-graph: the images of the separate components, and rejection of other settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hypersd import Pipeline
from hypersd.engines import Bundle
from hypersd.engines.engine import NullEngine
from hypersd.errors import RequestError
from hypersd.runtime.one_graph_function import find_one_graph
from hypersd.runtime.params import Params
from hypersd.runtime.text import TruncationWarning, load_tokenizers
from hypersd.tools.one_graph import add_one_graph

PROMPT = "a photo of a cat"
MOST_ROUNDED = 1e-3  # share of values that lie between two of 255 and round to the other one


def pixels(images: list[Any]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)


def difference(bundle: Bundle, **call: Any) -> tuple[int, float]:
    """The bundle's last one-graph against its separate networks: the largest of 255, and the share of what differs."""
    name, settings = list(bundle.manifest.one_graphs.items())[-1]
    one_graph = Pipeline.load(bundle.root, one_graph=name)
    expected = pixels(
        Pipeline.load(bundle.root)(
            PROMPT,
            num_inference_steps=settings.num_inference_steps,
            eta=settings.eta,
            height=settings.height,
            width=settings.width,
            **call,
        ).images
    )
    assert expected.std() > 5  # an image
    actual = pixels(one_graph(PROMPT, **call).images)
    assert actual.shape == expected.shape
    return int(np.abs(actual - expected).max()), float((actual != expected).mean())


@pytest.mark.parametrize(
    ("kind", "steps", "eta"), [("tcd", 1, 1.0), ("tcd", 4, 0.5), ("ddim", 2, 0.5), ("ddim", 4, 0.0), ("lcm", 2, 0.0)]
)
def test_sd15_pixels_are_those_of_the_separate_components(
    kind: str, steps: int, eta: float, sd15_bundle: Path, copy_bundle
) -> None:
    """One graph generates the same image from the same seed, but for pixels that round to the other side."""
    bundle = add_one_graph(copy_bundle(sd15_bundle, kind=kind), Params(prompt="", num_inference_steps=steps, eta=eta))
    largest, share = difference(bundle, seed=3)
    assert largest <= 1
    assert share < MOST_ROUNDED


def test_sdxl_pixels_are_those_of_the_separate_components(sdxl_bundle: Path, copy_bundle) -> None:
    """Both encoders, the pooled text and the size conditioning are in the graph."""
    largest, share = difference(
        add_one_graph(copy_bundle(sdxl_bundle), Params(prompt="", num_inference_steps=2, eta=0.5)), seed=3
    )
    assert largest <= 1
    assert share < MOST_ROUNDED


def test_half_precision_with_a_float32_decoder(sdxl_mixed_bundle: Path, copy_bundle) -> None:
    """Casts between the networks; the roundings of float16 are others where all is one graph."""
    largest, _ = difference(
        add_one_graph(copy_bundle(sdxl_mixed_bundle), Params(prompt="", num_inference_steps=2, eta=0.5)), seed=3
    )
    assert largest <= 3


def test_a_size_and_a_number_out_of_the_bundles_ranges(sd15_tiny_vae_bundle: Path, copy_bundle) -> None:
    """The components' ranges become the one size of the graph, which makes several images per run."""
    bundle = add_one_graph(
        copy_bundle(sd15_tiny_vae_bundle), Params(prompt="", num_inference_steps=2, height=96, num_images_per_prompt=2)
    )
    (name,) = bundle.manifest.one_graphs
    assert name == "one-graph-2steps-64x96-batch2"
    assert bundle.manifest.one_graphs[name].network.inputs["latents"].shape == (2, 4, 12, 8)
    largest, share = difference(bundle, seed=[3, 4], num_images_per_prompt=2)
    assert largest <= 1
    assert share < MOST_ROUNDED


@pytest.fixture(scope="module")
def two_steps(sd15_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bundle with a one-graph of two steps."""
    import shutil

    from hypersd.engines.files import link_or_copy

    root = tmp_path_factory.mktemp("one-graph") / "bundle"
    shutil.copytree(sd15_bundle, root, copy_function=link_or_copy, ignore=shutil.ignore_patterns("bundle.json"))
    shutil.copyfile(sd15_bundle / "bundle.json", root / "bundle.json")
    return add_one_graph(root, Params(prompt="", num_inference_steps=2)).root


@pytest.fixture(scope="module")
def pipe(two_steps: Path) -> Pipeline:
    return Pipeline.load(two_steps, one_graph="one-graph-2steps")


def test_several_images_are_generated_one_by_one(pipe: Pipeline) -> None:
    """The number of images is free, and none depends on its neighbours."""
    output = pipe([PROMPT, "a dog"], num_images_per_prompt=2, seed=[1, 2, 3, 4])
    assert output.request.batch == len(output.images) == 4
    assert output.images[0].size == (64, 64)
    together = pixels(output.images)
    assert (pixels(pipe("a dog", seed=3).images)[0] == together[2]).all()
    assert (pixels(pipe(PROMPT, seed=1).images)[0] == together[0]).all()
    assert (together[0] != together[1]).any()


def test_the_caller_may_bring_latents_and_generators(pipe: Pipeline) -> None:
    """A seed stands for a generator's numbers: first the latents, then the noise."""
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn((1, 4, 8, 8), generator=generator)
    brought = pipe(PROMPT, latents=latents, generator=generator)
    assert brought.seed is None
    assert (pixels(brought.images) == pixels(pipe(PROMPT, seed=5).images)).all()
    with pytest.raises(
        RequestError, match=r"latents: expected a tensor of the shape \[1, 4, 8, 8\], got \[1, 4, 8, 9\]"
    ):
        pipe(PROMPT, latents=torch.zeros(1, 4, 8, 9))


def test_one_run_of_one_engine_is_an_image(two_steps: Path) -> None:
    """That is what it is for: the host enqueues one network, whatever the number of steps."""
    manifest = Bundle.load(two_steps).manifest
    engine = NullEngine("one-graph", manifest.one_graphs["one-graph-2steps"].network)
    tokenizers = load_tokenizers(Bundle.load(two_steps))
    pipe = Pipeline(manifest, {"one-graph-2steps": engine}, tokenizers, one_graph="one-graph-2steps")
    output = pipe(PROMPT, num_images_per_prompt=3)
    assert engine.runs == 3  # of a graph of one image a run
    assert list(output.timings) == ["tokenize", "generate", "convert", "total"]
    assert pixels(output.images).shape == (3, 64, 64, 3)


def test_openvino_generates_the_same(pipe: Pipeline, two_steps: Path) -> None:
    """The file is no special one of ONNX Runtime's; a graph with a Loop OpenVINO does not compile."""
    pytest.importorskip("openvino")
    whole = pixels(Pipeline.load(two_steps, "openvino", one_graph="one-graph-2steps")(PROMPT, seed=3).images)
    assert np.abs(whole - pixels(pipe(PROMPT, seed=3).images)).max() <= 1
    with pytest.raises(RequestError, match="backend 'tensorrt' runs no one-graph"):
        Pipeline.load(two_steps, "tensorrt", one_graph="one-graph-2steps")


def test_a_long_prompt_warns(pipe: Pipeline) -> None:
    """As in a pipeline: what CLIP does not see is named."""
    with pytest.warns(TruncationWarning, match="cut off"):
        pipe("very " * 100)


def test_other_settings_are_rejected_in_one_line(pipe: Pipeline, two_steps: Path) -> None:
    """Nothing is generated with other settings than the graph's; the line names all that differ."""
    for settings, said in (
        ({"num_inference_steps": 4}, r"one-graph-2steps is fixed to steps=2 \(asked: 4\)"),
        ({"timesteps": [999, 500]}, r"timesteps=None \(asked: \(999, 500\)\)"),
        ({"eta": 0.25}, r"eta=1\.0 \(asked: 0\.25\)"),
        ({"height": 128}, r"height=64 \(asked: 128\)"),
        ({"guidance_scale": 5.0}, "guidance_scale=0"),
        ({"output_type": "np"}, "output_type=pil"),
    ):
        with pytest.raises(RequestError, match=said):
            pipe(PROMPT, **settings)
    manifest = Bundle.load(two_steps).manifest
    assert find_one_graph(manifest, Params(prompt="", num_inference_steps=2)) == "one-graph-2steps"
    with pytest.raises(RequestError, match=r"fixed to steps=2 \(asked: 4\), eta=1\.0 \(asked: 0\.5\); add one"):
        find_one_graph(manifest, Params(prompt="", num_inference_steps=4, eta=0.5))


def test_a_bundle_without_a_one_graph_says_so(sd15_bundle: Path, two_steps: Path) -> None:
    """The message says what to do."""
    with pytest.raises(RequestError, match="it has none; add one with `hypersd export --one-graph`"):
        Pipeline.load(sd15_bundle, one_graph="one-graph-2steps")
    with pytest.raises(RequestError, match="has no one-graph 'one-graph-9steps', it has one-graph-2steps"):
        Pipeline.load(two_steps, one_graph="one-graph-9steps")


def test_a_one_graph_has_no_stages(pipe: Pipeline, two_steps: Path) -> None:
    """Callbacks, embeddings and single decoding need the components."""
    for call in (
        lambda: pipe(PROMPT, callback_on_step_end=lambda *_: None),
        lambda: pipe.encode_prompt([PROMPT]),
        lambda: pipe.decode(torch.zeros(1, 4, 8, 8)),
    ):
        with pytest.raises(RequestError, match="one-graph has no stages of its own"):
            call()
    with pytest.raises(RequestError, match="leave them or one_graph out"):
        Pipeline.load(two_steps, one_graph="one-graph-2steps", vae_tile=64)
