"""A bundle's networks and the arithmetic between them as one ONNX graph, for settings that are fixed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ..engines.bundle import Bundle
from ..engines.component_names import IMAGES, LATENTS, input_ids, noise_input
from ..engines.manifest import Manifest, TensorSpec
from ..export.networks import spec
from ..families import find_family
from .graph_recorder import Recorded, Recorder

FLOAT, UINT8 = ir.DataType.FLOAT, ir.DataType.UINT8
Denoise = Callable[[Recorded, int], Recorded]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """A sampler at fixed settings, which runs on recorded tensors.

    Attributes:
        noisy: for every step, whether it adds noise.
        sample: finished latents of a denoiser, the first latents and every step's noise.
    """

    noisy: tuple[bool, ...]
    sample: Callable[[Denoise, Recorded, Sequence[Recorded | None]], Recorded]


@dataclasses.dataclass(frozen=True)
class Composed:
    """A graph with its inputs and outputs; its weights lie in the files of the bundle that it was composed from."""

    model: ir.Model
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]

    @property
    def weight_files(self) -> list[str]:
        """The files that the weights lie in, relative to the bundle."""
        tensors = [value.const_value for value in self.model.graph.initializers.values()]
        return list(dict.fromkeys(str(tensor.location) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)))

    def proto(self) -> Any:
        """The graph as ``onnx.ModelProto``, whose file belongs into the bundle's own folder."""
        return ir.to_proto(self.model)


def compose(bundle: Bundle, manifest: Manifest, sampling: Sampling) -> Composed:
    """The whole image as one graph: ``input_ids [B,77]``, ``latents`` and ``noise_0`` and so on ``[B,4,h,w]`` to
    ``images [B,H,W,3]``, uint8. SDXL's second tokenizer's tokens are ``input_ids_2``; a step without noise has no
    input for it.

    Every step has its own copy of the UNet's nodes, and all copies share the weights. A Loop around one copy would be
    less than half of the file, but OpenVINO 2026.4 does not compile it and TensorRT-RTX 1.7 does not build it. What the
    steps have in common, the keys and values of the prompt, is left to the engines: ONNX Runtime and OpenVINO find it,
    and TensorRT-RTX 1.7 crashes where attentions share them in the graph.

    Args:
        bundle: where the networks are.
        manifest: the bundle's, narrowed to one number and size of images.
        sampling: how to sample.
    """
    return _Composer(bundle, manifest, sampling).compose()


class _Composer:
    """One composition."""

    def __init__(self, bundle: Bundle, manifest: Manifest, sampling: Sampling) -> None:
        self.bundle = bundle
        self.manifest = manifest
        self.family = find_family(manifest.family)
        self.sampling = sampling
        self.components = manifest.components
        self.graphs = {name: ir.load(bundle.path(component.onnx)).graph for name, component in self.components.items()}
        self.recorder = Recorder(bundle.root)
        self.inputs = self._inputs()

    def compose(self) -> Composed:
        values = {name: self.recorder.input(name, tensor) for name, tensor in self.inputs.items()}
        noises = [
            Recorded(self.recorder, values[noise_input(i)]) if noisy else None
            for i, noisy in enumerate(self.sampling.noisy)
        ]
        denoise = self._denoiser(self._conditions(values))
        latents = self.sampling.sample(denoise, Recorded(self.recorder, values[LATENTS]), noises)
        batch, channels, height, width = self.components["vae_decoder"].outputs["sample"].shape
        outputs = {IMAGES: spec("uint8", batch, height, width, channels)}
        model = self.recorder.model({IMAGES: (self._pixels(self._decode(latents.value)), outputs[IMAGES])}, "hypersd")
        return Composed(model, self.inputs, outputs)

    def _inputs(self) -> dict[str, TensorSpec]:
        latents = self.components["unet"].inputs["sample"]
        noises = {noise_input(i): latents for i, noisy in enumerate(self.sampling.noisy) if noisy}
        tokens = {input_ids(name): self.components[name].inputs["input_ids"] for name in self.family.encoder_names}
        return {**tokens, LATENTS: latents, **noises}

    def _inline(self, component: str, call: str, feeds: Mapping[str, ir.Value]) -> dict[str, ir.Value]:
        outputs = self.recorder.inline(component, call, self.graphs[component], feeds)
        return {str(old.name): new for old, new in zip(self.graphs[component].outputs, outputs, strict=True)}

    def _conditions(self, values: Mapping[str, ir.Value]) -> dict[str, ir.Value]:
        """The UNet's inputs that stay the same from step to step: both encoders' hidden states side by side."""
        hidden, conditions = [], {}
        for name in self.family.encoder_names:
            outputs = self._inline(name, name, {"input_ids": values[input_ids(name)]})
            hidden.append(outputs.pop("hidden_states"))
            conditions |= outputs
        joined = hidden[0] if len(hidden) == 1 else self.recorder.node("Concat", *hidden, axis=-1)
        conditions["encoder_hidden_states"] = joined
        if self.family.size_conditioning is not None:
            shapes = self.manifest.shapes
            conditions["time_ids"] = self._time_ids(self.family.size_conditioning(shapes.height.opt, shapes.width.opt))
        return conditions

    def _time_ids(self, row: tuple[int, ...]) -> ir.Value:
        """The size conditioning, a row for every image."""
        time_ids, shapes = self.components["unet"].inputs["time_ids"], self.manifest.shapes
        return self.recorder.constant(np.array([row] * shapes.batch.opt, time_ids.dtype))

    def _denoiser(self, conditions: Mapping[str, ir.Value]) -> Denoise:
        calls: list[int] = []

        def denoise(sample: Recorded, t: int) -> Recorded:
            calls.append(t)
            timestep = self.recorder.constant(np.array([t], np.float32))
            feeds = {"sample": sample.value, "timestep": timestep, **conditions}
            return Recorded(self.recorder, self._inline("unet", f"unet/step_{len(calls)}", feeds)["out_sample"])

        return denoise

    def _decode(self, latents: ir.Value) -> ir.Value:
        """Latents to images in -1..1; where the decoder is float32, so is the division by the scaling factor."""
        dtype = ir.DataType.from_numpy(np.dtype(self.components["vae_decoder"].inputs["latent_sample"].dtype))
        wide = self.recorder.cast(self.recorder.cast(latents, dtype), FLOAT)
        scaled = self.recorder.node("Div", wide, self._number(self.manifest.vae.scaling_factor))
        feeds = {"latent_sample": self.recorder.cast(scaled, dtype)}
        return self._inline("vae_decoder", "vae_decoder", feeds)["sample"]

    def _pixels(self, sample: ir.Value) -> ir.Value:
        """Images in -1..1 to uint8 as the runtime's ``to_pixels`` makes them, halves to the even neighbour.

        The type becomes uint8 last: there are engines that know it at the ends of a graph only.
        """
        node, cast, number = self.recorder.node, self.recorder.cast, self._number
        half = number(0.5)
        centred = node("Add", node("Mul", cast(sample, FLOAT), half), half)
        rounded = cast(cast(centred, sample.dtype or FLOAT), FLOAT)  # to_pixels rounds to the sample's type here
        scaled = node("Mul", node("Clip", rounded, number(0.0), number(1.0)), number(255.0))
        return cast(node("Transpose", node("Round", scaled), perm=[0, 2, 3, 1]), UINT8)

    def _number(self, value: float) -> ir.Value:
        return self.recorder.constant(np.array(value, np.float32))
