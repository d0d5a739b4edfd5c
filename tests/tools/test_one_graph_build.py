"""A one-graph: the sampler's arithmetic as nodes, the components' own weights, and its place in the bundle."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from hypersd.engines import Bundle
from hypersd.engines.compare import TOLERANCES, differences
from hypersd.engines.onnx_runtime import make_plain_session
from hypersd.engines.progress import Silent
from hypersd.engines.specs import TensorSpec
from hypersd.errors import BundleError, RequestError
from hypersd.export import ExportOptions, export_bundle
from hypersd.runtime.params import Params
from hypersd.samplers import make_sampler
from hypersd.samplers.loop import draw_noise, sample
from hypersd.tools.graph_recorder import Recorded, Recorder
from hypersd.tools.one_graph import add_one_graph, check_can_compose

SHAPE = (1, 4, 8, 8)


class Notes(Silent):
    """Messages to the user."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def denoise(sample: Any, t: int) -> Any:
    """Stands in for the UNet: the arithmetic sees other numbers at every timestep."""
    return torch.tensor(t / 2000.0) * sample  # at most half of it: the remaining difference is no rounding error


def run_recorded(path: Path, sample: Callable[..., Any], latents: Tensor, noises: list[Tensor | None]) -> Tensor:
    """The result of ONNX Runtime for the nodes that ``sample`` recorded."""
    dtype = str(latents.dtype).removeprefix("torch.")
    recorder, spec = Recorder(path.parent), TensorSpec(dtype=dtype, shape=SHAPE)  # type: ignore[arg-type]
    tensors = {"latents": latents, **{f"noise_{i}": noise for i, noise in enumerate(noises) if noise is not None}}
    values = {name: Recorded(recorder, recorder.input(name, spec)) for name in tensors}
    result = sample(denoise, values["latents"], noises=[values.get(f"noise_{i}") for i in range(len(noises))])
    path.write_bytes(ir.to_proto(recorder.model({"output": (result.value, spec)}, "test")).SerializeToString())
    feeds = {name: tensor.numpy() for name, tensor in tensors.items()}
    return torch.from_numpy(np.asarray(make_plain_session(path).run(None, feeds)[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("kind", ["ddim", "tcd", "lcm"])
def test_the_recorded_sampler_computes_the_samplers_latents(
    kind: str, prediction_type: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """The graph's arithmetic is the runtime's, to the last bits, for every number of steps, eta, and with clipping."""
    for steps, eta, clip in itertools.product((1, 2, 4), (0.0, 0.5), (False, True)):
        sampler = make_sampler(kind, prediction_type=prediction_type, clip_sample=clip)
        generator = torch.Generator().manual_seed(steps)
        latents = torch.randn(SHAPE, generator=generator).to(dtype)
        plan = sampler.plan(steps, eta=eta)
        noises = draw_noise(latents, plan, generator=generator)
        expected = sample(denoise, latents, plan, noises=noises)
        actual = run_recorded(tmp_path / "steps.onnx", partial(sample, plan=plan), latents, noises)
        assert actual.dtype == dtype
        # In float16 ONNX Runtime's CPU provider leaves out roundings between one operation and the next.
        allowed = (1e-6, 1e-6) if dtype == torch.float32 else TOLERANCES["float16"]
        error = differences(actual.numpy(), expected.numpy())
        assert all(found <= most for found, most in zip(error, allowed, strict=True)), (steps, eta, clip, error)


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(str(path), load_external_data=False).graph.node)


def test_weights_are_shared_and_only_the_steps_add_nodes(sd15_bundle: Path, copy_bundle) -> None:
    """A one-graph takes kilobytes: its weights are in the components' files, for any number of steps."""
    bundle = copy_bundle(sd15_bundle)
    before = {path for path in bundle.root.rglob("*") if path.is_file()}
    for steps in (1, 2, 4):
        bundle = add_one_graph(bundle, Params(prompt="", num_inference_steps=steps))
    graphs = {steps: bundle.manifest.one_graphs[f"one-graph-{steps}step{'s' * (steps > 1)}"] for steps in (1, 2, 4)}
    new = {path for path in bundle.root.rglob("*") if path.is_file()} - before
    assert new == {bundle.path(graph.network.onnx) for graph in graphs.values()}
    components = {name: part for name, part in bundle.manifest.components.items() if name != "vae_encoder"}
    networks = {name: operators(bundle.path(component.onnx)) for name, component in components.items()}
    for steps, graph in graphs.items():
        path = bundle.path(graph.network.onnx)
        weights = {file for component in components.values() for file in component.files[1:]}
        assert set(graph.network.files[1:]) == weights
        found = operators(path)
        for operator in ("Conv", "GroupNormalization", "Attention", "Gemm"):
            others = sum(counts[operator] for name, counts in networks.items() if name != "unet")
            assert found[operator] == others + steps * networks["unet"][operator], operator
        inlined = sum(sum(counts.values()) * (steps if name == "unet" else 1) for name, counts in networks.items())
        assert inlined < sum(found.values()) <= inlined + 20 + 15 * steps
        assert path.stat().st_size < sum(bundle.manifest.files[file].size for file in weights) / 4
    external = [
        {v.name for v in ir.load(bundle.path(g.network.onnx)).graph.initializers.values() if v.name and "/" in v.name}
        for g in graphs.values()
    ]
    assert external[0] == external[1] == external[2]


def test_an_existing_graph_is_kept_and_an_altered_one_is_composed_again(sd15_bundle: Path, copy_bundle) -> None:
    """The second call does nothing and reports it; a damaged file is never taken for the graph."""
    bundle, notes = add_one_graph(copy_bundle(sd15_bundle), Params(prompt="", num_inference_steps=2)), Notes()
    path = bundle.root / "one-graph-2steps.onnx"
    content, written = path.read_bytes(), path.stat().st_mtime_ns
    assert add_one_graph(bundle, Params(prompt="", num_inference_steps=2), notes) == bundle
    assert path.stat().st_mtime_ns == written
    assert ["exists already" in note for note in notes.notes] == [True]
    path.write_bytes(content[:-1] + b"?")  # of the same size, which opening a bundle does not see
    with pytest.raises(BundleError, match="altered"):
        Bundle.load(bundle.root, hashes=True)
    assert add_one_graph(bundle, Params(prompt="", num_inference_steps=2)) == bundle
    assert path.read_bytes() == content
    assert Bundle.load(bundle.root, hashes=True) == bundle
    path.unlink()
    with pytest.raises(BundleError, match=r"one-graph-2steps\.onnx is missing"):
        Bundle.load(bundle.root)


def test_other_settings_are_other_graphs(sd15_bundle: Path, copy_bundle) -> None:
    """Graphs of several settings are side by side; their names show the settings that are not the defaults."""
    bundle = copy_bundle(sd15_bundle)
    for eta in (None, 0.25):
        bundle = add_one_graph(bundle, Params(prompt="", num_inference_steps=2, eta=eta))
    graphs = bundle.manifest.one_graphs
    assert list(graphs) == ["one-graph-2steps", "one-graph-2steps-eta0.25"]
    assert [graph.eta for graph in graphs.values()] == [1.0, 0.25]
    assert len({graph.network.key for graph in graphs.values()}) == 2
    assert list(graphs["one-graph-2steps"].network.inputs) == ["input_ids", "latents", "noise_0"]


def test_a_finished_export_keeps_its_one_graphs(
    tiny_repos: Path, sd15_bundle: Path, copy_bundle, source_options
) -> None:
    """They are added to a finished bundle: the same export again finds it finished, and keeps them."""
    name = "Hyper-SD15-1step-lora"
    bundle = add_one_graph(copy_bundle(sd15_bundle), Params(prompt="", num_inference_steps=1))
    options = ExportOptions(sources=source_options(name), precision="fp32")
    assert export_bundle(name, bundle.root, options) == bundle
    assert list(bundle.manifest.one_graphs) == ["one-graph-1step"]


def test_unsupported_settings_are_rejected(sd15_bundle: Path, copy_bundle) -> None:
    """Guidance, ControlNets, other steps and other sizes: one line each, and nothing is written."""
    with pytest.raises(RequestError, match=r"guidance 5, which a one-graph does not support"):
        add_one_graph(copy_bundle(sd15_bundle, "guided", guidance_scale=5.0), Params(prompt="", num_inference_steps=1))
    with pytest.raises(RequestError, match=r"supports no ControlNet, the bundle has canny, depth"):
        check_can_compose("Hyper-SD15-1step-lora", 0.0, ["canny", "depth"])
    bundle = copy_bundle(sd15_bundle)
    with pytest.raises(RequestError, match="not distilled for 9 steps"):
        add_one_graph(bundle, Params(prompt="", num_inference_steps=9))
    with pytest.raises(RequestError, match="outside this bundle's"):
        add_one_graph(bundle, Params(prompt="", num_inference_steps=1, height=4096))
    with pytest.raises(RequestError, match="batch 2 is outside this bundle's 1"):
        add_one_graph(bundle, Params(prompt="", num_inference_steps=1, num_images_per_prompt=2))
    with pytest.raises(RequestError, match="eta"):
        add_one_graph(bundle, Params(prompt="", num_inference_steps=1, eta=1.5))
    assert not list(bundle.root.glob("*one-graph*"))
    assert Bundle.load(bundle.root) == bundle


def test_tensorrt_rtx_builds_it(sd15_bundle: Path, copy_bundle, tmp_path: Path) -> None:
    """TensorRT-RTX builds the whole file, with the uint8 output; 1.7 crashes if attentions share keys."""
    pytest.importorskip("tensorrt_rtx")
    from hypersd.engines.tensorrt.build_process import BuildJob, run_build

    bundle = add_one_graph(copy_bundle(sd15_bundle), Params(prompt="", num_inference_steps=2))
    network, plan = bundle.manifest.one_graphs["one-graph-2steps"].network, tmp_path / "one-graph.engine"
    job = BuildJob(
        backend="tensorrt-rtx",
        component="one-graph-2steps",
        onnx=str(bundle.path(network.onnx)),
        plan=str(plan),
        inputs=network.inputs,
        outputs=network.outputs,
    )
    built = run_build(job, lambda *_: None)
    weights = sum(bundle.manifest.files[file].size for file in network.files[1:])
    assert plan.stat().st_size > 0
    assert built.weights_memory is not None
    assert weights / 3 < built.weights_memory < 1.2 * weights  # the steps share the weights in the engine, too
