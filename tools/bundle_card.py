"""The model card of a bundle on the Hub, made from its manifest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ..engines.hub import REPO_ID
from ..engines.manifest import Manifest
from ..families import find_family
from .verify_figures import VerifyFigures

UNKNOWN_LICENCE = "That of its base model, and that of Hyper-SD: see their model cards."


def write_card(
    repo_id: str, manifest: Manifest, licence: str | None = None, figures: VerifyFigures | None = None
) -> str:
    """The text of a README.md, Markdown with the Hub's metadata at its beginning.

    Args:
        repo_id: the repository ``owner/name`` that the card is for.
        manifest: the bundle's.
        licence: the base's, as the Hub names it; None if it is not known.
        figures: those of `hypersd verify`; None without.
    """
    title = find_family(manifest.family).title
    parts = [
        _metadata(manifest, licence),
        f"# {repo_id.partition('/')[2]}\n\n{manifest.checkpoint} for {title}, exported with hypersd "
        f"{manifest.versions.get('hypersd', '')} to ONNX" + (" with TensorRT engines." if manifest.engines else "."),
        _usage(repo_id, manifest),
        "## Settings\n\n" + _table(("setting", "value"), _settings(manifest)),
        "## Made from\n\n" + _table(("part", "file", "SHA-256"), _sources(manifest)),
        "## Components\n\n" + _table(("component", "MB"), _components(manifest)),
    ]
    if manifest.engines:
        parts.append("## Engines\n\n" + _table(("target", "for"), _targets(manifest)))
    if figures is not None:
        parts.append(_verified(figures))
    parts.append(f"## Licence\n\n{licence or UNKNOWN_LICENCE}")
    return "\n\n".join(parts) + "\n"


def _metadata(manifest: Manifest, licence: str | None) -> str:
    """YAML, of which JSON's strings and lists are a part (https://huggingface.co/docs/hub/model-cards)."""
    fields: dict[str, Any] = {
        **({"license": licence} if licence else {}),
        **({"base_model": manifest.origin.base} if REPO_ID.fullmatch(manifest.origin.base) else {}),
        "library_name": "hypersd",
        "pipeline_tag": "text-to-image",
        "tags": ["hyper-sd", "onnx", manifest.family, *(["tensorrt"] if manifest.engines else [])],
    }
    return "\n".join(["---", *(f"{name}: {json.dumps(value)}" for name, value in fields.items()), "---"])


def _usage(repo_id: str, manifest: Manifest) -> str:
    """A call with the images that the bundle takes, on the command line and in Python."""
    photo, options, arguments = 'Image.open("photo.png")', "", ['"a photo of a cat"']
    if manifest.is_inpainting:
        options += " --image photo.png --mask mask.png"
        arguments += [f"image={photo}", 'mask_image=Image.open("mask.png")']
    if names := list(manifest.controlnets):
        is_one = len(names) == 1
        options += " --control-image photo.png" if is_one else f" --control-image {names[0]}=photo.png"
        arguments.append(f"control_image={photo}" if is_one else f'control_image={{"{names[0]}": {photo}}}')
    imported = "from PIL import Image\n\n" if len(arguments) > 1 else ""
    call = "".join(f"\n    {argument}," for argument in arguments) + "\n" if imported else arguments[0]
    return (
        "## Use\n\n```bash\n"
        f'hypersd generate {repo_id} "a photo of a cat"{options}\n```\n\n```python\n{imported}'
        f'from hypersd import Pipeline\n\npipe = Pipeline.load("{repo_id}")\nimage = pipe({call}).images[0]\n```'
    )


def _settings(manifest: Manifest) -> list[tuple[str, ...]]:
    sampler, shapes = manifest.sampler, manifest.shapes
    return [
        ("sampler", sampler.kind),
        ("steps", ", ".join(map(str, sorted(sampler.allowed_steps)))),
        *([("timesteps", ", ".join(map(str, sampler.timesteps)))] if sampler.timesteps else []),
        ("eta", f"{sampler.eta:g}"),
        ("guidance scale", f"{sampler.guidance_scale:g}"),
        ("image", f"{shapes.width} x {shapes.height} pixels, {shapes.batch} at a time"),
        ("precision", manifest.precision),
        ("VAE", ("tiny (TAESD)" if manifest.vae.tiny else "full") + ("" if manifest.has_encoder else ", decoder only")),
        *([("base", "for inpainting")] if manifest.is_inpainting else []),
        *([("ControlNets", ", ".join(manifest.controlnets))] if manifest.controlnets else []),
        *([("LoRAs", ", ".join(manifest.origin.described_loras))] if manifest.origin.added_loras else []),
        *([("LoRA slot", f"rank {manifest.lora_slot.rank}")] if manifest.lora_slot else []),
    ]


def _sources(manifest: Manifest) -> list[tuple[str, ...]]:
    """The weight files; of a local one the name alone, because its folder is the exporter's own affair."""
    return [
        (part, f"{file.repo}/{file.filename}" if file.repo else file.filename, f"`{file.sha256[:16]}…`")
        for part, files in manifest.origin.weights.items()
        for file in files
    ]


def _components(manifest: Manifest) -> list[tuple[str, ...]]:
    components = manifest.components.items()
    return [(name, f"{manifest.component_bytes(component) / 1e6:,.1f}") for name, component in components]


def _targets(manifest: Manifest) -> list[tuple[str, ...]]:
    return [
        (name, f"{target.backend} {target.version}, {', '.join(target.compute_capabilities) or 'portable'}")
        for name, target in manifest.engines.items()
    ]


def _verified(figures: VerifyFigures) -> str:
    rows = [
        (
            image.prompt,
            ", ".join(image.controlnets) or "none",
            image.starts_from,
            str(image.seed),
            "equal" if image.psnr is None else f"{image.psnr:.1f}",
            f"{image.largest:.1e}",
        )
        for image in figures.images
    ]
    words = f"`hypersd verify` on {figures.backend}: differences from diffusers' images, in parts of full scale."
    headings = ("prompt", "ControlNets", "starts from", "seed", "PSNR dB", "largest error")
    return f"## Verification\n\n{words}\n\n{_table(headings, rows)}"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)
