"""The floor: work counted from graphs is what torch counts while the same networks run, and seconds follow from it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from floor.graph_shapes import graph_shapes
from floor.graph_work import Work, graph_work
from floor.products import cpu_products
from floor.rates import Rates, machine_rates
from make_tiny_repos import SD15_REPO, SDXL_REPO
from measure_floor import floor_seconds, image_floor
from onnx import TensorProto, helper
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hypersd.engines import Bundle
from hypersd.errors import BundleError, RequestError

NO_LIMIT = float("inf")


@pytest.fixture(scope="module")
def base(tiny_repos: Path) -> Callable[[str], Any]:
    """``base(repo)``: diffusers' own pipeline of a tiny base; a LoRA that is fused changes no work."""
    from diffusers import DiffusionPipeline

    return functools.cache(lambda repo: DiffusionPipeline.from_pretrained(str(tiny_repos / repo)))


def counted_by_torch(run: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Attention as plain matrix products: the counter does not know what a CPU has for it."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        run(*args, **kwargs)
    return counter.get_total_flops()


def work_of(bundle: Bundle, name: str, **extents: int) -> Work:
    return graph_work(bundle.path(bundle.component(name).onnx), extents)


def test_the_work_of_fixed_graphs_is_what_torch_counts(sd15_bundle: Path, base) -> None:
    """Convolutions, matrix products with and without bias, and attention, to the operation."""
    bundle, pipe = Bundle.load(sd15_bundle), base(SD15_REPO)
    text, latents = torch.zeros(1, 77, 32), torch.zeros(1, 4, 8, 8)
    unet = counted_by_torch(pipe.unet, latents, torch.zeros(1), text)
    assert work_of(bundle, "unet").flops == unet
    assert work_of(bundle, "vae_decoder").flops == counted_by_torch(pipe.vae.decode, latents)
    tokens = torch.zeros(1, 77, dtype=torch.int64)
    assert work_of(bundle, "text_encoder").flops == counted_by_torch(pipe.text_encoder, tokens)


def test_the_work_of_graphs_of_any_size_is_what_torch_counts(sdxl_dynamic_bundle: Path, base) -> None:
    """Shapes that are computed in the graph: batches, and sizes that do not halve to whole numbers."""
    bundle, pipe = Bundle.load(sdxl_dynamic_bundle), base(SDXL_REPO)
    latents, text = torch.zeros(2, 4, 13, 9), torch.zeros(2, 77, 64)
    added = {"text_embeds": torch.zeros(2, 32), "time_ids": torch.zeros(2, 6)}
    halves = {"latent_height_div2": 7, "latent_width_div2": 5}
    unet = work_of(bundle, "unet", batch=2, latent_height=13, latent_width=9, **halves)
    assert unet.flops == counted_by_torch(pipe.unet, latents, 1, text, added_cond_kwargs=added)
    decoder = work_of(bundle, "vae_decoder", batch=2, latent_height=13, latent_width=9)
    assert decoder.flops == counted_by_torch(pipe.vae.decode, latents)


def test_weights_are_read_once_and_tables_are_not(sd15_bundle: Path, base) -> None:
    """All parameters of the UNet; of the text encoder those that are not the rows of a dictionary."""
    bundle, pipe = Bundle.load(sd15_bundle), base(SD15_REPO)
    parameters = sum(parameter.nbytes for parameter in pipe.unet.parameters())  # equal ones are one in the file
    assert work_of(bundle, "unet").weight_bytes == pytest.approx(parameters, rel=0.01)
    encoder = {name: parameter.nbytes for name, parameter in pipe.text_encoder.named_parameters()}
    tables = sum(size for name, size in encoder.items() if "token_embedding" in name)
    read = work_of(bundle, "text_encoder").weight_bytes
    assert tables > 1000
    assert abs(read - (sum(encoder.values()) - tables)) < 0.1 * tables


def save(path: Path, *nodes: onnx.NodeProto, weights: tuple[onnx.TensorProto, ...] = (), **inputs: Any) -> Path:
    """A graph of a few nodes; the last one's output is its output."""
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    output = helper.make_empty_tensor_value_info(nodes[-1].output[0])
    graph = helper.make_graph(nodes, "graph", infos, [output], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), path)
    return path


def weight(name: str, *shape: int) -> onnx.TensorProto:
    return helper.make_tensor(name, TensorProto.FLOAT16, shape, bytes(2 * torch.Size(shape).numel()), raw=True)


NODES = {  # what a node takes, and its multiplications
    "grouped convolution": (
        helper.make_node("Conv", ["x", "w"], ["y"], strides=[2, 2], group=2),
        {"x": [3, 4, 9, 7], "w": [6, 2, 3, 3]},
        3 * 6 * 4 * 3 * 2 * 9,
    ),
    "transposed convolution": (
        helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2]),
        {"x": [1, 4, 5, 3], "w": [4, 6, 2, 2]},
        4 * 5 * 3 * 6 * 4,
    ),
    "matrix product over batches": (
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        {"x": [5, 1, 2, 3], "w": [4, 3, 7]},
        5 * 4 * 2 * 3 * 7,
    ),
    "transposed Gemm": (
        helper.make_node("Gemm", ["x", "w"], ["y"], transA=1, transB=1),
        {"x": [3, 2], "w": [7, 3]},
        2 * 3 * 7,
    ),
    "attention of 4 dimensions": (
        helper.make_node("Attention", ["x", "k", "w"], ["y"]),
        {"x": [2, 3, 10, 8], "k": [2, 3, 7, 8], "w": [2, 3, 7, 5]},
        2 * 3 * 10 * 7 * (8 + 5),
    ),
    "attention of 3 dimensions with fewer heads of keys": (
        helper.make_node("Attention", ["x", "k", "w"], ["y"], q_num_heads=4, kv_num_heads=2),
        {"x": [2, 10, 32], "k": [2, 7, 16], "w": [2, 7, 10]},
        2 * 4 * 10 * 7 * (8 + 5),
    ),
}


@pytest.mark.parametrize("kind", NODES)
def test_the_work_of_each_kind_of_node(kind: str, tmp_path: Path) -> None:
    """Also of forms that no bundle has today."""
    node, inputs, products = NODES[kind]
    assert graph_work(save(tmp_path / "model.onnx", node, **inputs), {}) == Work(2 * products, 0)


def test_weights_count_in_their_own_type(tmp_path: Path) -> None:
    """Two bytes each in float16, each weight once."""
    twice = [helper.make_node("MatMul", [a, "w"], [b]) for a, b in (("x", "h"), ("h", "y"))]
    path = save(tmp_path / "model.onnx", *twice, weights=(weight("w", 6, 6),), x=["batch", 6])
    assert graph_work(path, {"batch": 5}) == Work(2 * 2 * 5 * 36, 2 * 36)


def test_an_extent_that_is_missing_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "model.onnx", helper.make_node("Identity", ["x"], ["y"]), x=["batch", "height"])
    with pytest.raises(RequestError, match="input x: extent of 'height' is missing, got those of batch"):
        graph_work(path, {"batch": 5})


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (helper.make_node("MatMul", ["i", "w"], ["y"], name="product"), "product is not known: nor is i's shape"),
        (helper.make_node("Einsum", ["x", "x"], ["y"], equation="ij,ij->i"), "Einsum, cannot be counted"),
        (helper.make_node("FusedConv", ["x", "w"], ["y"], domain="com.microsoft"), "FusedConv, cannot be counted"),
    ],
    ids=["unknown shape", "einsum", "another domain"],
)
def test_work_that_cannot_be_told_is_refused(node: onnx.NodeProto, message: str, tmp_path: Path) -> None:
    """Left out silently, it would make a floor that is too low and a runtime that looks slow."""
    where = helper.make_node("NonZero", ["x"], ["n"])  # as many as there are
    path = save(
        tmp_path / "model.onnx", where, helper.make_node("Cast", ["n"], ["i"], to=TensorProto.FLOAT), node,
        weights=(weight("w", 6, 6),), x=[6, 6],
    )  # fmt: skip
    with pytest.raises(BundleError, match=message):
        graph_work(path, {})


def test_a_file_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no protobuf")
    with pytest.raises(BundleError, match="cannot be read as ONNX"):
        graph_work(tmp_path / "model.onnx", {})


def test_shapes_that_do_not_follow_are_left_out(tmp_path: Path) -> None:
    """And those behind a Reshape that takes its shape from other shapes are there."""
    shape = helper.make_node("Shape", ["h"], ["s"], start=2)
    nodes = [
        helper.make_node("Transpose", ["x"], ["h"], perm=[0, 2, 1]),
        shape,
        helper.make_node("Concat", ["s", "rest"], ["to"], axis=0),
        helper.make_node("Reshape", ["x", "to"], ["r"]),
        helper.make_node("NonZero", ["r"], ["y"]),
    ]
    rest = helper.make_tensor("rest", TensorProto.INT64, [1], [-1])
    model = onnx.load(save(tmp_path / "model.onnx", *nodes, weights=(rest,), x=["batch", 6, 4]))
    shapes = graph_shapes(model, {"batch": 5})
    assert shapes["r"] == (6, 20)
    assert "y" not in shapes
    assert [node.op_type for node in model.graph.node] == ["Transpose", "Shape", "Concat", "Reshape", "NonZero"]


def test_a_floor_is_the_longer_of_computing_and_reading() -> None:
    work = Work(flops=600, weight_bytes=70)
    assert floor_seconds(work, Rates(100, 100)) == 6
    assert floor_seconds(work, Rates(100, 10)) == 7


def test_the_floor_of_a_image_has_its_stages(sd15_bundle: Path) -> None:
    """Every step takes as long, and a size or batch that a fixed graph draws at once takes as many times as long."""
    bundle, rates = Bundle.load(sd15_bundle), Rates(1e9, NO_LIMIT)
    one, three = (image_floor(bundle, steps, 64, 64, batch, rates) for steps, batch in ((2, 1), (1, 3)))
    assert list(one) == ["text encoders", "step 1", "step 2", "decode"]
    flops = {name: work_of(bundle, name).flops / 1e9 for name in ("text_encoder", "unet", "vae_decoder")}
    assert list(one.values()) == pytest.approx(
        [flops["text_encoder"], flops["unet"], flops["unet"], flops["vae_decoder"]]
    )
    assert list(three.values()) == pytest.approx([3 * one[stage] for stage in ("text encoders", "step 1", "decode")])
    with pytest.raises(RequestError, match="64"):
        image_floor(bundle, 1, 128, 64, 1, rates)


def test_guidance_takes_two_rows_of_the_unet(sdxl_dynamic_bundle: Path) -> None:
    """And no second decoding; a checkpoint with CFG in its name draws with guidance."""
    bundle = Bundle.load(sdxl_dynamic_bundle)
    floor = image_floor(bundle, 1, 104, 72, 1, Rates(1e9, NO_LIMIT))
    sides = {"latent_height": 13, "latent_width": 9}
    two = work_of(bundle, "unet", batch=2, latent_height_div2=7, latent_width_div2=5, **sides).flops
    assert floor["step 1"] == pytest.approx(two / 1e9)
    assert floor["decode"] == pytest.approx(work_of(bundle, "vae_decoder", batch=1, **sides).flops / 1e9)
    encoders = [work_of(bundle, name, batch=1).flops for name in ("text_encoder", "text_encoder_2")]
    assert floor["text encoders"] == pytest.approx(sum(encoders) / 1e9)


def test_weights_count_in_the_narrower_type(sd15_bundle: Path) -> None:
    """Computing a float32 bundle in bfloat16 need not read four bytes per weight; a batch reads weights once."""
    bundle = Bundle.load(sd15_bundle)
    own, wide, narrow = (
        image_floor(bundle, 1, 64, 64, 2, Rates(NO_LIMIT, 1e9, itemsize))["step 1"] for itemsize in (None, 8, 2)
    )
    assert own == wide == pytest.approx(work_of(bundle, "unet").weight_bytes / 1e9)
    assert narrow == pytest.approx(own / 2)


def test_rates_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are of the order of a processor's, and the threads are afterwards what they were."""
    monkeypatch.setattr("floor.rates.COPIED", {"cpu": 16 << 20})
    monkeypatch.setattr("floor.rates.LARGEST", 512)
    before = torch.get_num_threads()
    rates = machine_rates("cpu", "bfloat16", threads=1)
    assert rates.flops_per_second > 1e8
    assert rates.bytes_per_second > 1e8
    assert rates.itemsize == 2
    assert rates.library in {*cpu_products(torch.float32), *cpu_products(torch.bfloat16)}
    assert torch.get_num_threads() == before
    with pytest.raises(RequestError, match="dtype 'int8' is not known: expected float32, float16, bfloat16"):
        machine_rates("cpu", "int8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_library_multiplies(dtype: torch.dtype) -> None:
    """Each of those that are installed, and all of the same numbers but torch."""
    made = {library: make(32)() for library, make in cpu_products(dtype).items()}
    assert isinstance(product := made.pop("torch"), torch.Tensor)
    assert product.dtype == dtype
    single = np.random.default_rng(0).random((32, 32), np.float32)
    for found in made.values():
        (value,) = found.values() if hasattr(found, "values") else found
        assert np.asarray(value, np.float32).shape == (32, 32)
        if dtype == torch.float32:
            assert np.allclose(value, single @ single, rtol=1e-2)
