"""A bundle's components and the arithmetic between them as one ONNX graph, for fixed settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from ..engines.bundle import Bundle
from ..engines.component_names import IMAGES, LATENTS, input_ids, lora_input, noise_input
from ..engines.image_shapes import narrowed
from ..engines.lora_slot import LORA
from ..engines.specs import ImageShapes, Range, TensorSpec
from ..families import find_family
from ..runtime.request import Request
from ..samplers import make_sampler
from ..samplers.loop import sample
from .graph_recorder import Recorded, Recorder

FLOAT, UINT8 = ir.DataType.FLOAT, ir.DataType.UINT8


@dataclasses.dataclass(frozen=True)
class Composed:
    """A graph with its inputs and outputs; its weights are in the bundle's files."""

    model: ir.Model
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]

    @property
    def weight_files(self) -> list[str]:
        """The files of its weights, relative to the bundle."""
        tensors = [value.const_value for value in self.model.graph.initializers.values()]
        return list(dict.fromkeys(str(tensor.location) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)))

    def proto(self) -> Any:
        """The graph as ``onnx.ModelProto``; its file must be in the bundle's own folder."""
        return ir.to_proto(self.model)


def compose(bundle: Bundle, request: Request) -> Composed:
    """The whole image as one graph: ``input_ids [B,77]``, ``latents`` and ``noise_0`` and so on ``[B,4,h,w]`` to
    ``images [B,H,W,3]``, uint8. ``input_ids_2`` are the tokens of SDXL's second tokenizer; a step without noise has no
    input for it.

    Every step has its own copy of the UNet's nodes, and all copies share the weights. A Loop around one copy would be
    less than half of the file, but OpenVINO 2026.4 does not compile it and TensorRT-RTX 1.7 does not build it. The
    keys and values of the prompt, which all steps share, are left to the engines: ONNX Runtime and OpenVINO find them,
    and TensorRT-RTX 1.7 crashes if attentions share them in the graph.
    """
    return _Composer(bundle, request).compose()


class _Composer:
    """One composition."""

    def __init__(self, bundle: Bundle, request: Request) -> None:
        extents = {"batch": request.batch, "height": request.height, "width": request.width}
        shapes = {name: Range(name=name, min=size, opt=size, max=size) for name, size in extents.items()}
        self.manifest = narrowed(bundle.manifest, ImageShapes(**shapes))
        self.family, self.components = find_family(self.manifest.family), self.manifest.components
        self.graphs = {name: ir.load(bundle.path(component.onnx)).graph for name, component in self.components.items()}
        sampler = make_sampler(self.manifest.sampler.kind, **self.manifest.scheduler)
        self.plan = sampler.plan(request.num_inference_steps, request.timesteps, request.eta)
        self.recorder = Recorder(bundle.root)

    def compose(self) -> Composed:
        """The runtime's own sampler runs on recorded tensors, which have a tensor's operators."""
        inputs = self._inputs()
        values = {name: self.recorder.input(name, tensor) for name, tensor in inputs.items()}
        tensors: dict[str, Any] = {name: Recorded(self.recorder, value) for name, value in values.items()}
        noises = [tensors.get(noise_input(i)) for i in range(len(self.plan))]
        denoise: Any = self._denoiser(self._conditions(values))
        finished: Any = sample(denoise, tensors[LATENTS], self.plan, noises=noises)
        batch, channels, height, width = self.components["vae_decoder"].outputs["sample"].shape
        outputs = {IMAGES: TensorSpec(dtype="uint8", shape=(batch, height, width, channels))}
        model = self.recorder.model({IMAGES: (self._pixels(self._decode(finished.value)), outputs[IMAGES])}, "hypersd")
        return Composed(model, inputs, outputs)

    def _inputs(self) -> dict[str, TensorSpec]:
        latents = self.components["unet"].inputs["sample"]
        noises = {noise_input(i): latents for i, step in enumerate(self.plan) if step.noisy}
        tokens = {input_ids(name): self.components[name].inputs["input_ids"] for name in self.family.encoder_names}
        slots = self.manifest.lora_slot.components if self.manifest.lora_slot else []
        loras = {lora_input(name): self.components[name].inputs[LORA] for name in slots}
        return {**tokens, LATENTS: latents, **noises, **loras}

    def _inline(self, component: str, call: str, feeds: Mapping[str, ir.Value]) -> dict[str, ir.Value]:
        outputs = self.recorder.inline(component, call, self.graphs[component], feeds)
        return {str(old.name): new for old, new in zip(self.graphs[component].outputs, outputs, strict=True)}

    def _conditions(self, values: Mapping[str, ir.Value]) -> dict[str, ir.Value]:
        """The UNet's inputs that all steps share: the encoders' hidden states side by side, and SDXL's additions."""
        hidden, conditions = [], {}
        for name in self.family.encoder_names:
            feeds = {"input_ids": values[input_ids(name)], **self._lora(name, values)}
            outputs = self._inline(name, name, feeds)
            hidden.append(outputs.pop("hidden_states"))
            conditions |= outputs
        joined = hidden[0] if len(hidden) == 1 else self.recorder.node("Concat", *hidden, axis=-1)
        conditions |= {"encoder_hidden_states": joined, **self._lora("unet", values)}
        if self.family.size_conditioning is not None:
            shapes, time_ids = self.manifest.shapes, self.components["unet"].inputs["time_ids"]
            row = self.family.size_conditioning(shapes.height.opt, shapes.width.opt)
            conditions["time_ids"] = self.recorder.constant(np.array([row] * shapes.batch.opt, time_ids.dtype))
        return conditions

    def _lora(self, component: str, values: Mapping[str, ir.Value]) -> dict[str, ir.Value]:
        name = lora_input(component)
        return {LORA: values[name]} if name in values else {}

    def _denoiser(self, conditions: Mapping[str, ir.Value]) -> Callable[[Recorded, int], Recorded]:
        calls: list[int] = []

        def denoise(sample: Recorded, t: int) -> Recorded:
            calls.append(t)
            timestep = self.recorder.constant(np.array([t], np.float32))
            feeds = {"sample": sample.value, "timestep": timestep, **conditions}
            return Recorded(self.recorder, self._inline("unet", f"unet/step_{len(calls)}", feeds)["out_sample"])

        return denoise

    def _decode(self, latents: ir.Value) -> ir.Value:
        """Latents to images in -1..1; a float32 decoder divides by the scaling factor in float32."""
        dtype = ir.DataType.from_numpy(np.dtype(self.components["vae_decoder"].inputs["latent_sample"].dtype))
        wide = self.recorder.cast(self.recorder.cast(latents, dtype), FLOAT)
        scaled = self.recorder.node("Div", wide, self._number(self.manifest.vae.scaling_factor))
        feeds = {"latent_sample": self.recorder.cast(scaled, dtype)}
        return self._inline("vae_decoder", "vae_decoder", feeds)["sample"]

    def _pixels(self, sample: ir.Value) -> ir.Value:
        """Images in -1..1 to uint8 as in the runtime's ``to_pixels``: halves round to the even neighbour.

        The last node casts to uint8: some engines support this type only at the ends of a graph.
        """
        node, cast, number = self.recorder.node, self.recorder.cast, self._number
        half = number(0.5)
        centred = node("Add", node("Mul", cast(sample, FLOAT), half), half)
        rounded = cast(cast(centred, sample.dtype or FLOAT), FLOAT)  # to_pixels rounds to the sample's type here
        scaled = node("Mul", node("Clip", rounded, number(0.0), number(1.0)), number(255.0))
        return cast(node("Transpose", node("Round", scaled), perm=[0, 2, 3, 1]), UINT8)

    def _number(self, value: float) -> ir.Value:
        return self.recorder.constant(np.array(value, np.float32))
