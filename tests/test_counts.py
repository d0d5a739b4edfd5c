"""The cost of an image, counted and not timed: a regression fails here on any machine.

The bounds are what it costs now. Who makes it cost less lowers them; who has to raise one says in the commit what for.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
from counting import counting_pipe
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hypersd import Pipeline
from hypersd.engines import Bundle
from hypersd.engines.late_engine import LateEngine

PROMPT = "a photo of a cat"
STEPS = 4
COPIES = ("copy_", "_to_copy", "clone", "cat", "repeat", "repeat_interleave")


class TorchWork(TorchDispatchMode):
    """Counts what torch does: kernels, bytes of new tensors, bytes that are only moved."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.allocated = 0
        self.copied = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        before = {_storage(tensor) for tensor in _tensors((args, kwargs))}
        made = [tensor for tensor in _tensors(result) if _storage(tensor) not in before]
        if made or name.endswith("_"):  # not a view
            self.kernels[name] += 1
        self.allocated += sum(tensor.untyped_storage().nbytes() for tensor in made)
        if name in COPIES:
            self.copied += sum(tensor.nbytes for tensor in _tensors(result))
        return result


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in _tensors(part)]
    return _tensors(list(value.values())) if isinstance(value, dict) else []


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def work_of(pipe: Pipeline, **arguments: Any) -> TorchWork:
    """The cost of a call after the first one with its shapes."""
    call: dict[str, Any] = {"num_inference_steps": STEPS, "eta": 1.0, "seed": 0, **arguments}
    for _ in range(2):
        pipe(PROMPT, **call)
    with TorchWork() as work:
        pipe(PROMPT, **call)
    return work


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_runs_of_networks(family: str, request: pytest.FixtureRequest) -> None:
    """A new prompt runs each text encoder once, each step the UNet once, the decoder once; the VAE's encoder never."""
    pipe, engines = counting_pipe(request.getfixturevalue(f"{family}_bundle"))
    for prompt, encoded in [(PROMPT, 1), (PROMPT, 0), ("blue dog", 1)]:
        for engine in engines.values():
            engine.rows.clear()
        pipe(prompt, num_inference_steps=STEPS, seed=0)
        expected = {name: [1] * encoded for name in engines} | {"unet": [1] * STEPS, "vae_decoder": [1]}
        expected["vae_encoder"] = []
        assert {name: engine.rows for name, engine in engines.items()} == expected


@pytest.mark.parametrize(
    ("family", "kernels", "allocated", "copied"), [("sd15", 46, 123_520, 35_456), ("sdxl", 48, 133_528, 45_464)]
)
def test_torch_operations_of_an_image(
    family: str, kernels: int, allocated: int, copied: int, request: pytest.FixtureRequest
) -> None:
    """The host's share of a call: a kernel is microseconds on a CPU, and a launch on a GPU.

    Of 64x64 pixels, 4 steps, in float32: ten kernels a step, one pass over the pixels in float32 and two in uint8.
    """
    work = work_of(Pipeline.load(request.getfixturevalue(f"{family}_bundle")))
    assert sum(work.kernels.values()) <= kernels, work.kernels
    assert work.allocated <= allocated
    assert work.copied <= copied


def test_operations_that_an_init_image_adds(sd15_bundle: Path) -> None:
    """An image of the output's size: one conversion, the encoder's sample with its noise, and noise added once."""
    pipe = Pipeline.load(sd15_bundle)
    image = Image.new("RGB", (64, 64), "orange")
    plain = work_of(pipe)
    started = work_of(pipe, image=image, strength=1.0)
    masked = work_of(pipe, image=image, mask_image=image.convert("L"))
    assert sum((started.kernels - plain.kernels).values()) <= 17, started.kernels - plain.kernels
    assert sum((masked.kernels - plain.kernels).values()) <= 52, masked.kernels - plain.kernels
    assert started.allocated - plain.allocated <= 206_860
    assert masked.allocated - plain.allocated <= 284_964


def test_operations_that_a_step_adds(sd15_bundle: Path) -> None:
    """Diffusers' arithmetic of TCD, an operation each, so that images are the same to the bit; and its noise."""
    pipe = Pipeline.load(sd15_bundle)
    shorter, longer = work_of(pipe), work_of(pipe, num_inference_steps=STEPS + 1)
    assert sum((longer.kernels - shorter.kernels).values()) <= 10
    latents = 4 * 8 * 8 * 4  # bytes
    assert longer.allocated - shorter.allocated <= 10 * latents + 256
    assert longer.copied - shorter.copied <= 256, "a row of the timesteps, and no latents"


KINDS = ("Attention", "GroupNormalization", "LayerNormalization", "Cast")  # opset 23 has the first three whole
# (bundle, network): nodes at most, and how many of these kinds. Casts: the last token's place; in float16 embeddings
# of the timestep and the sizes, which are computed in float32.
GRAPHS = {
    ("sd15_bundle", "text_encoder"): (88, 3, 0, 7, 0),
    ("sd15_bundle", "unet"): (323, 8, 21, 12, 0),
    ("sd15_bundle", "vae_decoder"): (126, 1, 22, 0, 0),
    ("sdxl_bundle", "text_encoder_2"): (88, 3, 0, 7, 1),
    ("sdxl_bundle", "unet"): (511, 16, 21, 24, 0),
    ("sdxl_dynamic_bundle", "unet"): (543, 16, 21, 24, 3),
}


@pytest.mark.parametrize(("bundle", "component"), GRAPHS)
def test_nodes_of_graphs(bundle: str, component: str, request: pytest.FixtureRequest) -> None:
    """More nodes are more launches; what a runtime has one kernel for must not come in pieces, nor be cast around.

    A node of weights alone, such as a linear layer's Transpose, is run once by every runtime while it loads.
    """
    opened = Bundle.load(request.getfixturevalue(bundle))
    graph = onnx.load(opened.path(opened.component(component).onnx), load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    launched = [node for node in graph.node if not weights.issuperset(node.input)]
    nodes = Counter(node.op_type for node in launched)
    most, *kinds = GRAPHS[bundle, component]
    assert len(launched) <= most, nodes
    assert [nodes[kind] for kind in KINDS] == kinds


def modules_after(statement: str) -> int:
    """Modules that a statement loads in a fresh interpreter."""
    program = f"import sys; before = set(sys.modules); {statement}; print(len(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    return int(done.stdout)


def test_modules_of_an_import() -> None:
    """``import hypersd`` waits for nothing but Python's own: milliseconds, where torch takes a second."""
    assert modules_after("import hypersd") <= modules_after("import typing, warnings") + 3, "itself and its errors"


def test_modules_of_the_command_line() -> None:
    """``hypersd --help`` loads no library."""
    extra = modules_after("import hypersd.cli; hypersd.cli.make_parser()") - modules_after("import argparse")
    assert extra <= 70


def test_threads_that_wait_take_no_core(sd15_bundle: Path) -> None:
    """Each network has a pool of threads: spinning, they made a small image three times slower on two cores."""
    pipe = Pipeline.load(sd15_bundle, backend="onnxruntime")
    for engine in pipe.engines.values():
        if isinstance(engine, LateEngine):
            continue  # loads an engine of the same kind with the first image
        options: Any = getattr(engine, "_session").get_session_options()  # noqa: B009
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
