"""The components of a bundle before they are exported: what each is made from, and how."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Mapping
from typing import Any

from ..engines.component_names import cond_embedding, controlnet
from ..engines.lora_slot import LoraSlot
from ..engines.manifest import SourceFile
from ..engines.precision import PRECISIONS, Precision
from ..engines.specs import ImageShapes
from ..families import TextEncoder, find_family
from ..weights.lora_file import Fusion, LoraFile
from .checkpoints import Checkpoint
from .components import (
    ComponentModule,
    text_encoder_component,
    unet_component,
    vae_decoder_component,
    vae_encoder_component,
)
from .controlnet_components import cond_embedding_component, controlled_unet_component, controlnet_component
from .int8_weights import round_linear_weights
from .layout import Part
from .lora_slot import with_slot
from .models import VaeHalf, is_tiny, load_controlnet, load_text_encoder, load_unet, load_vae
from .sources import Sources, pixels_per_latent
from .trace import OPSET

EXPORTER_VERSION = 5  # raise it when the exporter makes another graph or other specs from the same inputs
TOOLS = ("torch", "diffusers", "transformers", "onnx", "onnxscript")


@dataclasses.dataclass(frozen=True)
class ComponentExport:
    """One component to export.

    Attributes:
        name: its name in the bundle.
        part: the part of the sources that it is made from.
        key: hash of everything that its ONNX file depends on.
        graph: hash of that without name and weights.
        precision: of its weights.
        load: loads the weights; called only if the component is not there yet.
    """

    name: str
    part: str
    key: str
    graph: str
    precision: Precision
    load: Callable[[], ComponentModule]


def tool_versions() -> dict[str, str]:
    """Versions of the packages that write a bundle."""
    from .. import __version__
    from ..engines.onnx_runtime import ort_version  # its distribution has another name for GPUs

    tools = {tool: importlib.metadata.version(tool) for tool in TOOLS}
    return {"hypersd": __version__, **tools, "onnxruntime": ort_version()}


def component_exports(
    checkpoint: Checkpoint,
    sources: Sources,
    records: dict[str, tuple[SourceFile, ...]],
    shapes: ImageShapes,
    precision: str,
    loras: Mapping[str, LoraFile] | None = None,
    text_only: bool = False,
    slot: LoraSlot | None = None,
) -> list[ComponentExport]:
    """The bundle's components, smallest first, so that errors show early.

    Args:
        checkpoint: which Hyper-SD file.
        sources: where the weights are.
        records: the weight files' hashes, by part.
        shapes: image sizes and batch.
        precision: the bundle's; SDXL's own VAE stays float32, because it overflows in float16, and int8 is the UNet's
            alone.
        loras: the opened LoRAs to fuse, in order, by the names of their records.
        text_only: leave the VAE's encoder out.
        slot: through which UNet and text encoders take LoRAs at run time.
    """
    exports = _Exports(checkpoint, sources, records, shapes, PRECISIONS[precision], loras or {}, slot)
    return [
        *map(exports.text_encoder, find_family(checkpoint.family).text_encoders),
        *([] if text_only else [exports.vae_encoder()]),
        exports.vae_decoder(),
        *map(exports.cond_embedding, sources.controlnets),
        *map(exports.controlnet, sources.controlnets),
        exports.unet(),
    ]


@dataclasses.dataclass(frozen=True)
class _Exports:
    """The inputs of :func:`component_exports`, and a method for each kind of component."""

    checkpoint: Checkpoint
    sources: Sources
    records: dict[str, tuple[SourceFile, ...]]
    shapes: ImageShapes
    precision: Precision
    loras: Mapping[str, LoraFile]
    slot: LoraSlot | None

    def text_encoder(self, kind: TextEncoder) -> ComponentExport:
        name, dtype = kind.component, self.precision.plain.dtype
        part = self.sources.parts[name]

        def load() -> ComponentModule:
            encoder = load_text_encoder(part, kind.class_name, dtype, self._fusion(name))
            return self._slotted(name, encoder, text_encoder_component(kind, encoder, self.shapes))

        more = {"batch": str(self.shapes.batch), "family": self.checkpoint.family, **self._slot_key(name)}
        return self._export(name, name, load, **more)

    def vae_encoder(self) -> ComponentExport:
        is_small = is_tiny(self.sources.parts["vae"])
        return self._vae("encoder", lambda vae: vae_encoder_component(vae, self.shapes, self._scale, is_small))

    def vae_decoder(self) -> ComponentExport:
        return self._vae("decoder", lambda vae: vae_decoder_component(vae, self.shapes, self._scale))

    def _vae(self, half: VaeHalf, make: Callable[[Any], ComponentModule]) -> ComponentExport:
        part = self.sources.parts["vae"]
        precision = PRECISIONS["fp32"] if needs_float32(part, self.checkpoint.family) else self.precision.plain

        def load() -> ComponentModule:
            return make(load_vae(part, precision.dtype, half))

        return self._export(f"vae_{half}", "vae", load, precision=precision, shapes=self._sizes)

    def cond_embedding(self, name: str) -> ComponentExport:
        part = controlnet(name)

        def load() -> ComponentModule:
            return cond_embedding_component(self._load_controlnet(part), self.shapes, self._scale)

        return self._export(cond_embedding(name), part, load, shapes=self._sizes, latent_scale=self._scale)

    def controlnet(self, name: str) -> ComponentExport:
        part, guided = controlnet(name), self.checkpoint.is_guided

        def load() -> ComponentModule:
            return controlnet_component(self._load_controlnet(part), self.shapes, guided, self._scale)

        return self._export(part, part, load, shapes=self._sizes, guided=guided, latent_scale=self._scale)

    def unet(self) -> ComponentExport:
        make = controlled_unet_component if self.sources.controlnets else unet_component
        part, guided = self.sources.parts["unet"], self.checkpoint.is_guided

        def load() -> ComponentModule:
            loaded = load_unet(part, self.precision.dtype, self._fusion("unet"))
            if self.precision.is_compact:
                round_linear_weights(loaded)
            return self._slotted("unet", loaded, make(loaded, self.shapes, guided, self._scale))

        more = {"shapes": self._sizes, "latent_scale": self._scale, "residuals": bool(self.sources.controlnets)}
        more |= self._slot_key("unet")
        return self._export("unet", "unet", load, precision=self.precision, guided=guided, **more)

    def _slotted(self, name: str, model: Any, component: ComponentModule) -> ComponentModule:
        """The component with its LoRA slot, if the bundle gives it one."""
        if self.slot is None or name not in self.slot.components:
            return component
        return with_slot(component, model, self.slot, name)

    def _slot_key(self, name: str) -> dict[str, Any]:
        """The slot's part of the hash: its places follow from the configuration."""
        return {"lora_slot": self.slot.rank} if self.slot is not None and name in self.slot.components else {}

    def _load_controlnet(self, part: str) -> Any:
        return load_controlnet(self.sources.parts[part], self.precision.dtype)

    def _fusion(self, component: str) -> Fusion:
        return Fusion(component, tuple(self.loras.values()))

    @property
    def _scale(self) -> int:
        return latent_scale(self.sources)

    @property
    def _sizes(self) -> list[str]:
        return [f"{r.name}={r.min}:{r.opt}:{r.max}" for r in self.shapes.extents]

    def _export(
        self,
        name: str,
        part: str,
        load: Callable[[], ComponentModule],
        *,
        precision: Precision | None = None,
        **more: Any,
    ) -> ComponentExport:
        config, precision = self.sources.parts[part].config, precision or self.precision.plain
        graph = {
            "kind": name.partition("/")[0],
            "exporter": EXPORTER_VERSION,
            "tools": tool_versions(),
            "opset": OPSET,
            "precision": precision.name,
            "config": {key: value for key, value in config.items() if not key.startswith("_") or key == "_class_name"},
            **more,
        }
        made_from = {
            "name": name,
            "weights": [record.sha256 for record in self.records[part]],
            "loras": [
                [lora.strength, *(record.sha256 for record in self.records[name])]
                for name, lora in self.loras.items()
                if part in lora.layers
            ],
            "graph": graph,
        }
        return ComponentExport(name, part, _hash(made_from), _hash(graph), precision, load)


def _hash(inputs: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def latent_scale(sources: Sources) -> int:
    """Pixels per latent."""
    return pixels_per_latent(sources.parts["vae"].config)


def needs_float32(vae: Part, family: str) -> bool:
    """Whether the VAE overflows in float16, in which case diffusers encodes and decodes in float32 too."""
    return find_family(family).is_vae_upcast and not is_tiny(vae) and bool(vae.config.get("force_upcast", True))
