"""What each network of a bundle is made from, and how."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Callable
from typing import Any

from ..engines.component_names import cond_embedding, controlnet
from ..engines.manifest import ImageShapes, SourceFile
from ..families import TextEncoder, find_family
from .checkpoints import Checkpoint
from .controlnet_networks import cond_embedding_network, controlled_unet_network, controlnet_network
from .layout import Part
from .models import TORCH_DTYPES, is_tiny, load_controlnet, load_text_encoder, load_unet, load_vae
from .networks import Network, text_encoder_network, unet_network, vae_decoder_network
from .sources import Sources, pixels_per_latent
from .trace import OPSET

RECIPE_VERSION = 2  # raise it when the exporter makes another graph from the same inputs
TOOLS = ("torch", "diffusers", "transformers", "onnx", "onnxscript")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One network to export.

    Attributes:
        name: the component's name in the bundle.
        part: the name of the part of the sources that it is made from.
        key: hash of all that its ONNX file depends on.
        precision: ``"fp16"`` or ``"fp32"``.
        load: loads the weights; called only if the component is not there yet.
    """

    name: str
    part: str
    key: str
    precision: str
    load: Callable[[], Network]


def tool_versions() -> dict[str, str]:
    """Versions of what the bundle was written with."""
    from .. import __version__
    from ..engines.onnx_runtime import ort_version  # its distribution has another name for GPUs

    tools = {tool: importlib.metadata.version(tool) for tool in TOOLS}
    return {"hypersd": __version__, **tools, "onnxruntime": ort_version()}


def make_recipes(
    checkpoint: Checkpoint,
    sources: Sources,
    records: dict[str, tuple[SourceFile, ...]],
    shapes: ImageShapes,
    precision: str,
    lora_scale: float,
) -> list[Recipe]:
    """The bundle's networks, smallest first, so that what is wrong shows early.

    Args:
        checkpoint: which Hyper-SD file.
        sources: where the weights are.
        records: the weight files' hashes, by part.
        shapes: image sizes and batch.
        precision: the bundle's; SDXL's own VAE stays float32, because it overflows in float16.
        lora_scale: factor on top of the LoRA's own alpha/rank.
    """
    family, parts = checkpoint.family, sources.parts

    def recipe(name: str, part: str, precision: str, load: Callable[[], Network], **more: Any) -> Recipe:
        weights = [record.sha256 for record in records[part]]
        return Recipe(name, part, _key(name, parts[part], weights, precision, more), precision, load)

    def text_encoder(kind: TextEncoder) -> Recipe:
        name = kind.component

        def load() -> Network:
            encoder = load_text_encoder(parts[name], kind.class_name, TORCH_DTYPES[precision])
            return text_encoder_network(kind, encoder, shapes)

        return recipe(name, name, precision, load, batch=str(shapes.batch), family=family)

    def vae_decoder() -> Recipe:
        vae_precision = "fp32" if needs_float32(parts["vae"], family) else precision

        def load() -> Network:
            return vae_decoder_network(
                load_vae(parts["vae"], TORCH_DTYPES[vae_precision]), shapes, latent_scale(sources)
            )

        return recipe("vae_decoder", "vae", vae_precision, load, shapes=_described(shapes))

    def controlnet_recipe(name: str) -> Recipe:
        def load() -> Network:
            loaded = load_controlnet(parts[controlnet(name)], TORCH_DTYPES[precision])
            return controlnet_network(loaded, shapes, checkpoint.is_guided, latent_scale(sources))

        more = {"shapes": _described(shapes), "guided": checkpoint.is_guided, "latent_scale": latent_scale(sources)}
        return recipe(controlnet(name), controlnet(name), precision, load, **more)

    def cond_embedding_recipe(name: str) -> Recipe:
        def load() -> Network:
            loaded = load_controlnet(parts[controlnet(name)], TORCH_DTYPES[precision])
            return cond_embedding_network(loaded, shapes, latent_scale(sources))

        more = {"shapes": _described(shapes), "latent_scale": latent_scale(sources)}
        return recipe(cond_embedding(name), controlnet(name), precision, load, **more)

    def unet() -> Recipe:
        def load() -> Network:
            loaded = load_unet(parts["unet"], sources.lora, family, lora_scale, TORCH_DTYPES[precision])
            network = controlled_unet_network if sources.controlnets else unet_network
            return network(loaded, shapes, checkpoint.is_guided, latent_scale(sources))

        lora = [record.sha256 for record in records.get("lora", ())]
        more = {
            "lora": lora,
            "lora_scale": lora_scale,
            "guided": checkpoint.is_guided,
            "latent_scale": latent_scale(sources),
            **({"residuals": True} if sources.controlnets else {}),
        }
        return recipe("unet", "unet", precision, load, shapes=_described(shapes), **more)

    names = sources.controlnets
    return [
        *map(text_encoder, find_family(family).text_encoders),
        vae_decoder(),
        *map(cond_embedding_recipe, names),
        *map(controlnet_recipe, names),
        unet(),
    ]


def latent_scale(sources: Sources) -> int:
    """Pixels per latent."""
    return pixels_per_latent(sources.parts["vae"].config)


def needs_float32(vae: Part, family: str) -> bool:
    """Whether diffusers, too, decodes in float32."""
    return find_family(family).is_vae_upcast and not is_tiny(vae) and bool(vae.config.get("force_upcast", True))


def _described(shapes: ImageShapes) -> list[str]:
    return [f"{r.name}={r.min}:{r.opt}:{r.max}" for r in (shapes.batch, shapes.height, shapes.width)]


def _key(name: str, part: Part, weights: list[str], precision: str, more: dict[str, Any]) -> str:
    config = {key: value for key, value in part.config.items() if not key.startswith("_") or key == "_class_name"}
    inputs = {
        "name": name,
        "recipe": RECIPE_VERSION,
        "tools": tool_versions(),
        "opset": OPSET,
        "precision": precision,
        "weights": weights,
        "config": config,
        **more,
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
