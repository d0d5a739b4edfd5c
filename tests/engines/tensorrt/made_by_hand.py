"""Manifests, targets and machines that were never exported, built or bought: deciding from them takes no file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from hypersd.engines.image_shapes import narrowed
from hypersd.engines.manifest import FileRecord, Manifest, Origin, SamplerSettings, VaeSettings
from hypersd.engines.specs import Component, EngineTarget, ImageShapes, Plan, Range, TensorSpec
from hypersd.engines.tensorrt.machine import Gpu, Machine
from hypersd.engines.tensorrt.targets import onnx_hash, plan_key
from hypersd.errors import HyperSDError

GIB = 1 << 30
VERSIONS = {"tensorrt": "10.16.1.11", "tensorrt-rtx": "1.7.1.116"}


def shapes(batch: Any = 1, height: Any = 512, width: Any = 512) -> ImageShapes:
    """Each an extent, or (min, opt, max)."""
    spans = {"batch": batch, "height": height, "width": width}
    spans = {name: (span,) * 3 if isinstance(span, int) else span for name, span in spans.items()}
    return ImageShapes(
        **{name: Range(name=name, min=low, opt=usual, max=high) for name, (low, usual, high) in spans.items()}
    )


WIDE = shapes((1, 2, 4), (256, 512, 1024), (256, 512, 768))


def manifest(wide: ImageShapes = WIDE, guided: bool = True, weights: str = "a") -> Manifest:
    """A bundle for ``wide`` as the exporter describes one; ``weights`` is a hex digit that its hashes are made of."""
    batch, height, width = (_dim(getattr(wide, name)) for name in ("batch", "height", "width"))
    latent = [_dim(getattr(wide, name).divided(8, f"latent_{name}")) for name in ("height", "width")]
    twice = Range(name="batch", min=wide.batch.min, opt=2 * wide.batch.opt, max=2 * wide.batch.max)
    rows = _dim(twice if guided else wide.batch)
    hidden = (77, 768)
    networks = {
        "text_encoder": ({"input_ids": ("int64", batch, 77)}, {"hidden_states": ("float16", batch, *hidden)}),
        "vae_decoder": (
            {"latent_sample": ("float16", batch, 4, *latent)},
            {"sample": ("float16", batch, 3, height, width)},
        ),
        "unet": (
            {
                "sample": ("float16", rows, 4, *latent),
                "timestep": ("float32", 1),
                "encoder_hidden_states": ("float16", rows, *hidden),
            },
            {"out_sample": ("float16", rows, 4, *latent)},
        ),
    }
    return Manifest(
        checkpoint="made by hand",
        family="sd15",
        precision="fp16",
        opset=23,
        shapes=wide,
        sampler=SamplerSettings(
            kind="ddim", num_inference_steps=8, allowed_steps=(8,), eta=0.0, guidance_scale=5.0 if guided else 0.0
        ),
        scheduler={},
        vae=VaeSettings(scaling_factor=0.18215),
        force_zeros_for_empty_prompt=False,
        components={
            name: Component(
                inputs=_specs(ins, name == "unet" and guided),
                outputs=_specs(outs, name == "unet" and guided),
                files=(f"{name}/model.onnx",),
                key="0" * 64,
            )
            for name, (ins, outs) in networks.items()
        },
        files={f"{name}/model.onnx": FileRecord(size=1, sha256=weights * 64) for name in networks},
        origin=Origin(base="nowhere", weights={}),
        versions={},
    )


def _dim(extent: Range) -> int | Range:
    return extent.opt if extent.min == extent.max else extent


def _specs(tensors: dict[str, tuple[Any, ...]], guided: bool) -> dict[str, TensorSpec]:
    return {
        name: TensorSpec(dtype=dtype, shape=tuple(shape), rows_per_image=2 if guided and name != "timestep" else 1)
        for name, (dtype, *shape) in tensors.items()
    }


def target(**changes: Any) -> EngineTarget:
    """A portable target of TensorRT-RTX without plans, as asked changed."""
    backend = changes.get("backend", "tensorrt-rtx")
    settings: dict[str, Any] = {
        "backend": backend,
        "version": VERSIONS[backend],
        "compute_capabilities": () if backend == "tensorrt-rtx" else ("8.9",),
        "platform": "x86_64" if backend == "tensorrt-rtx" else "linux-x86_64",
        "precision": "fp16",
        "shapes": WIDE,
        "plans": {},
    }
    return EngineTarget(**settings | changes)


def with_plans(bare: EngineTarget, bundle: Manifest, folder: str = "engines/made") -> EngineTarget:
    """The target with a plan for every network, 1 GiB of weights and 2 GiB of activations each."""
    plans = {
        name: Plan(
            file=f"{folder}/{name}.engine",
            onnx=onnx_hash(bundle, name),
            key=plan_key(bare, component, onnx_hash(bundle, name)),
            seconds=1.0,
            host_memory=GIB,
            weights_memory=GIB,
            activation_memory=2 * GIB,
        )
        for name, component in narrowed(bundle, bare.shapes).components.items()
    }
    return msgspec.structs.replace(bare, plans=plans)


def machine(**changes: Any) -> Machine:
    """A machine with both backends and a GPU that runs them, as asked changed."""
    settings: dict[str, Any] = {
        "platforms": {"tensorrt": "linux-x86_64", "tensorrt-rtx": "x86_64"},
        "gpu": gpu(),
        "no_gpu": "",
        "driver_cuda": (13, 0),
        "versions": VERSIONS,
        "cuda_needed": {"tensorrt": 13, "tensorrt-rtx": 13},
    }
    return Machine(**settings | changes)


def gpu(**changes: Any) -> Gpu:
    settings: dict[str, Any] = {
        "index": 0,
        "name": "NVIDIA RTX 4090",
        "compute_capability": "8.9",
        "free_memory": 20 * GIB,
        "total_memory": 24 * GIB,
    }
    return Gpu(**settings | changes)


def refusal(kind: type[HyperSDError], ask: Callable[[], Any]) -> str:
    """The message of what ``ask`` raises, which is one line."""
    with pytest.raises(kind) as caught:
        ask()
    message = str(caught.value)
    assert "\n" not in message
    return message
