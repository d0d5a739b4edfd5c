"""The contenders of the bench: a registry by name. Their modules are named here, not imported."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...engines.precision import PRECISIONS
from ...errors import RequestError
from .contender import Contender, Context

if TYPE_CHECKING:
    from ...engines import Bundle

OURS = "hypersd"  # the baseline of all comparisons


def _of_bundle(name: str, summary: str, module: str, libraries: tuple[str, ...] = (), **arguments: Any) -> Contender:
    """A contender that reads the bundle; ``arguments`` are further ones of its ``Runner``."""

    def options(context: Context) -> dict[str, Any]:
        return {"bundle": str(context.bundle.root), "device": context.device, **arguments}

    return Contender(
        name=name,
        summary=summary,
        module=f"{__package__}.{module}",
        options=options,
        libraries=libraries,
        holds_halves=arguments.get("precision") == "bf16",
        why_not={"eager": _why_not_text_to_image, "compiled": _why_not_compiled}.get(
            arguments.get("mode", ""), _no_reason
        ),
    )


def _no_reason(_: Context) -> None:
    """Nothing speaks against it."""


def _is_the_automatic_choice(context: Context) -> str | None:
    from ...engines.load import choose

    chosen = choose(context.bundle, "auto", context.device).backend
    return f"{OURS} chooses the same backend" if chosen == "onnxruntime" else None


def _why_no_one_graph(context: Context) -> str | None:
    has = context.bundle.manifest.one_graphs
    return None if has else "the bundle has no graph of the whole image: export it with --one-graph"


def _why_not_compiled(context: Context) -> str | None:
    """torch.compile writes C++ for processors and looks for these compilers."""
    if reason := _why_not_text_to_image(context):
        return reason
    if any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "g++", "clang++")):
        return None
    return "torch.compile needs a C++ compiler: install g++"


def _why_not_text_to_image(context: Context) -> str | None:
    """The others are timed as they make an image of a text."""
    if context.bundle.manifest.is_inpainting:
        return "the bundle's UNet is for inpainting, the bench times it from text to image"
    return None


def _why_not_rival(context: Context) -> str | None:
    if context.bundle.manifest.controlnets:
        return "the bundle's UNet has inputs for ControlNets, which others' pipelines do not feed"
    if context.bundle.manifest.lora_slot is not None:
        return "the bundle's UNet has an input for LoRAs, which others' pipelines do not feed"
    return _why_not_text_to_image(context)


def _why_not_openvino_rival(context: Context) -> str | None:
    if context.device not in ("auto", "cpu"):
        return f"OpenVINO runs on the CPU here, and --device is {context.device}"
    return _why_not_rival(context)


def _why_not_genai(context: Context) -> str | None:
    manifest = context.bundle.manifest
    if manifest.sampler.guidance_scale > 1 and manifest.shapes.batch.max < 2:
        return "the bundle's text encoder takes one prompt, and with guidance GenAI gives it two"
    if len(manifest.sampler.timesteps or ()) > 1:
        return "OpenVINO GenAI takes no custom timesteps"
    return _why_not_openvino_rival(context)


def _genai_options(context: Context) -> dict[str, Any]:
    from .openvino_folder import write_openvino_folder

    image, sampler = context.image, context.bundle.manifest.sampler.kind
    assert image is not None
    if sampler == "ddim" and image.eta:
        raise RequestError(f"--eta {image.eta:g}: the DDIM of OpenVINO GenAI has no eta, expected 0")
    write_openvino_folder(context.bundle, context.folder, for_genai=True)
    shape = {"height": image.height, "width": image.width, "guidance_scale": image.guidance_scale}
    return {"folder": str(context.folder), "sampler": sampler, "eta": image.eta, **shape}


def _optimum_intel_options(context: Context) -> dict[str, Any]:
    from .openvino_folder import write_openvino_folder

    image, manifest = context.image, context.bundle.manifest
    assert image is not None
    write_openvino_folder(context.bundle, context.folder, for_genai=False)
    return {
        "folder": str(context.folder),
        "family": manifest.family,
        "precision": PRECISIONS[manifest.precision].plain.name,
        "rows": 2 if image.guidance_scale > 1 else 1,
        "latents": [image.height // manifest.vae.spatial, image.width // manifest.vae.spatial],
    }


def _optimum_options(context: Context) -> dict[str, Any]:
    from .optimum_folder import write_optimum_folder

    write_optimum_folder(context.bundle, context.folder)
    manifest = context.bundle.manifest
    return {
        "folder": str(context.folder),
        "family": manifest.family,
        "precision": PRECISIONS[manifest.precision].plain.name,
        "device": context.device,
    }


_US, _ORT, _OPENVINO = "hypersd_contender", ("onnxruntime",), ("openvino",)
_DIFFUSERS = ("diffusers", "transformers", "peft")
_OPENVINO_SUMMARY = "hypersd on OpenVINO, in bfloat16 if the processor supports it"
_MODELS = f"{__package__}.openvino_models"
_FP32 = {"backend": "openvino", "precision": "fp32"}
CONTENDERS = (
    _of_bundle(OURS, "hypersd on the backend that it chooses", _US),
    dataclasses.replace(
        _of_bundle("hypersd-onnxruntime", "hypersd on ONNX Runtime", _US, _ORT, backend="onnxruntime"),
        why_not_usual=_is_the_automatic_choice,
    ),
    _of_bundle("hypersd-openvino", _OPENVINO_SUMMARY, _US, _OPENVINO, backend="openvino"),
    _of_bundle("hypersd-openvino-fp32", "hypersd on OpenVINO in float32", _US, _OPENVINO, **_FP32),
    dataclasses.replace(
        _of_bundle("hypersd-one-graph", "hypersd's graph of the whole image", _US, _ORT, is_one_graph=True),
        why_not=_why_no_one_graph,
    ),
    *(
        _of_bundle(name, summary, "diffusers_contender", _DIFFUSERS, precision=precision, mode=mode)
        for name, summary, precision, mode in (
            ("diffusers", "diffusers, eager (on a CPU in float32)", "bundle", "eager"),
            ("diffusers-bf16", "diffusers, eager, in bfloat16", "bf16", "eager"),
            ("diffusers-compiled", "diffusers, UNet and decoder through torch.compile", "bundle", "compiled"),
            ("diffusers-compiled-bf16", "the same in bfloat16", "bf16", "compiled"),
        )
    ),
    Contender(
        name="optimum",
        summary="optimum-onnx on the bundle's own ONNX files",
        module=f"{__package__}.optimum_contender",
        options=_optimum_options,
        libraries=("optimum.onnxruntime", *_ORT),
        why_not=_why_not_rival,
    ),
    Contender(
        name="openvino-genai",
        summary="OpenVINO GenAI's pipeline (C++) on the bundle's own weights",
        module=f"{__package__}.openvino_genai_contender",
        options=_genai_options,
        libraries=("openvino_genai", "transformers"),
        preparation=_MODELS,
        takes_noise=True,
        holds_halves=True,
        why_not=_why_not_genai,
    ),
    Contender(
        name="optimum-intel",
        summary="optimum-intel's OpenVINO pipeline on the bundle's own weights",
        module=f"{__package__}.optimum_intel_contender",
        options=_optimum_intel_options,
        libraries=("optimum.intel", *_OPENVINO),
        preparation=_MODELS,
        holds_halves=True,
        why_not=_why_not_openvino_rival,
    ),
)


def find_contender(name: str) -> Contender:
    """Find a contender by its name.

    Raises:
        RequestError: the name is not known; the message lists all.
    """
    for contender in CONTENDERS:
        if contender.name == name:
            return contender
    raise RequestError(f"contender {name!r} is not known: expected one of {', '.join(c.name for c in CONTENDERS)}")


def choose_contenders(
    bundle: Bundle, device: str, named: Sequence[str], pythons: Mapping[str, str]
) -> tuple[list[Contender], list[str]]:
    """Choose the contenders, the baseline first, with a line for each that is left out.

    The baseline is hypersd; if only some of hypersd's backends are named, it is the first of them.

    Raises:
        RequestError: a named contender is not known or cannot run here, or an interpreter does not run.
    """
    from .contender_process import check_python  # the command line reads this registry: it waits for no library

    for name, python in pythons.items():
        find_contender(name)
        check_python(name, python)
    context = Context(bundle, device, Path())
    if named:
        return _named(context, named, pythons), []
    chosen, left_out = [], []
    for contender in CONTENDERS:
        reason = contender.why_not_here(context, contender.name in pythons) or contender.why_not_usual(context)
        if reason is None:
            chosen.append(contender)
        else:
            left_out.append(f"{contender.name} is left out: {reason}")
    return chosen, left_out


def _named(context: Context, names: Sequence[str], pythons: Mapping[str, str]) -> list[Contender]:
    ours = [name for name in names if name.startswith(OURS)]
    first = OURS if OURS in ours or not ours else ours[0]
    contenders = [find_contender(name) for name in dict.fromkeys([first, *names])]
    for contender in contenders:
        if reason := contender.why_not_here(context, contender.name in pythons):
            raise RequestError(f"contender {contender.name} cannot run here: {reason}")
    return contenders
