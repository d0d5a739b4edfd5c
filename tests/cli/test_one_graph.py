"""`hypersd export --one-graph`, and its graphs in `info` and `generate`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hypersd.cli import main
from hypersd.engines import Bundle
from hypersd.runtime.params import Params
from hypersd.tools.one_graph import add_one_graph


def test_export_info_and_generate(
    export_arguments: list[str], sd15_bundle: Path, copy_bundle, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A finished export gets its one-graphs, info shows them, and generate makes the same image."""
    bundle = copy_bundle(sd15_bundle)
    export = [*export_arguments, "--precision", "fp32", "--backend", "none", "--out", str(bundle.root)]
    assert main([*export, "--one-graph", "2", "1", "2"]) == 0
    assert capsys.readouterr().out.count("it shares the weights of the components") == 2
    assert list(Bundle.load(bundle.root, hashes=True).manifest.one_graphs) == ["one-graph-2steps", "one-graph-1step"]
    assert main(["info", str(bundle.root), "--hashes"]) == 0
    shown = capsys.readouterr().out
    assert "one-graph-2steps: 2 steps, eta 1, 1 of 64 x 64" in shown
    assert "one-graph-1step: 1 step, eta 1" in shown
    files = []
    for options in ([], ["--one-graph"]):
        files.append(tmp_path / f"{len(options)}.png")
        words = ["generate", str(bundle.root), "a cat", "--seed", "3", "--steps", "2", "-o", str(files[-1]), *options]
        assert main([*words, "--device", "cpu"]) == 0
    assert "with ONNX Runtime in fp32, one-graph-2steps, loaded in" in capsys.readouterr().err
    separate, whole = (np.asarray(Image.open(file)).astype(int) for file in files)
    assert np.abs(separate - whole).max() <= 1
    assert Image.open(files[0]).info["hypersd"] == Image.open(files[1]).info["hypersd"]


def test_several_images_use_the_first_graph_if_no_steps_are_given(
    sd15_bundle: Path, copy_bundle, tmp_path: Path
) -> None:
    """Without --steps the graph fixes their number; every image has its own seed."""
    bundle = add_one_graph(copy_bundle(sd15_bundle), Params(prompt="", num_inference_steps=2))
    output = tmp_path / "cat.png"
    assert main(["generate", str(bundle.root), "a cat", "--one-graph", "--count", "2", "-o", str(output)]) == 0
    first, second = (Image.open(tmp_path / f"cat-{i}.png") for i in (0, 1))
    assert json.loads(second.info["hypersd"])["seed"] == json.loads(first.info["hypersd"])["seed"] + 1
    assert (np.asarray(first) != np.asarray(second)).any()


def test_engines_are_built_of_the_separate_components(
    export_arguments: list[str], sd15_bundle: Path, copy_bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights are not built twice: --backend makes a plan for each component, and the one-graph stays as it is."""
    pytest.importorskip("tensorrt_rtx")
    bundle = copy_bundle(sd15_bundle)
    export = [*export_arguments, "--precision", "fp32", "--backend", "tensorrt-rtx", "--out", str(bundle.root)]
    assert main([*export, "--one-graph", "1"]) == 0
    manifest = Bundle.load(bundle.root, hashes=True).manifest
    (target,) = manifest.engines.values()
    assert target.plans.keys() == manifest.components.keys()
    assert list(manifest.one_graphs) == ["one-graph-1step"]
    assert (
        "the engines are of the separate components; one-graphs run on ONNX Runtime and OpenVINO"
        in capsys.readouterr().err
    )


def test_impossible_graphs_are_rejected_before_anything_is_exported(
    export_arguments: list[str], tmp_path: Path, fails: Callable[..., str]
) -> None:
    """Minutes are not spent on an export whose one-graph then fails."""
    out = ["--out", tmp_path / "bundle"]
    said = fails(*export_arguments, *out, "--one-graph", "9")
    assert "--one-graph 9: Hyper-SD15-1step-lora was distilled for 1, 2, 3, 4, 5, 6, 7, 8 steps" in said
    said = fails("export", "--ckpt", "Hyper-SD15-8steps-CFG-lora", *out, "--one-graph", "8")
    assert "guidance 5, which a one-graph does not support" in said
    said = fails(*export_arguments, *out, "--one-graph", "1", "--controlnet", "canny=some/where")
    assert "supports no ControlNet" in said
    assert not list(tmp_path.iterdir())


def test_generate_rejects_what_the_graph_does_not_support(
    sd15_bundle: Path, copy_bundle, fails: Callable[..., str]
) -> None:
    """One line each: no such graph, or an unsupported option."""
    bundle = add_one_graph(copy_bundle(sd15_bundle), Params(prompt="", num_inference_steps=2))
    words = ["generate", bundle.root, "a cat", "--one-graph"]
    assert "one-graph-2steps is fixed to steps=2 (asked: 4)" in fails(*words, "--steps", "4")
    assert "one-graph-2steps is fixed to eta=1.0 (asked: 0.5)" in fails(*words, "--eta", "0.5")
    assert "a one-graph has no --guidance-scale" in fails(*words, "--guidance-scale", "3")
    assert "a one-graph has no --backend" in fails(*words, "--backend", "tensorrt")
    assert "no one-graph of this bundle fits: it has none" in fails("generate", sd15_bundle, "a cat", "--one-graph")
