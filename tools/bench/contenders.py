"""The contenders of the bench: a registry by name. Their modules are named here, not imported."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import RequestError

if TYPE_CHECKING:
    from ...engines import Bundle

OURS = "hypersd"  # the baseline of all comparisons


@dataclasses.dataclass(frozen=True)
class Context:
    """Bundle, device and folder of a contender.

    Attributes:
        bundle: the bundle whose images they generate.
        device: ``"auto"``, ``"cpu"`` or a CUDA device.
        folder: an empty folder, for a contender's own files.
    """

    bundle: Bundle
    device: str
    folder: Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to generate a bundle's images.

    Attributes:
        name: the name on the command line.
        summary: one line.
        module: name of the module with its class ``Runner`` (:class:`hypersd.tools.bench.protocol.Runner`).
        options: makes the arguments of ``Runner``, in JSON's types; called once, right before its process starts.
        libraries: modules that it requires.
        holds_halves: it keeps its weights in two bytes each, for any bundle.
        why_not: the reason why it cannot run here although its libraries are installed; None if it can.
        why_not_usual: the reason why it is left out unless it is named; None if it takes part.
    """

    name: str
    summary: str
    module: str
    options: Callable[[Context], Mapping[str, Any]]
    libraries: tuple[str, ...] = ()
    holds_halves: bool = False
    why_not: Callable[[Context], str | None] = lambda _: None
    why_not_usual: Callable[[Context], str | None] = lambda _: None

    def why_not_here(self, context: Context, has_own_python: bool) -> str | None:
        """The reason why it cannot run here; None if it can. Another interpreter may have other libraries."""
        missing = [name for name in self.libraries if not has_own_python and importlib.util.find_spec(name) is None]
        if missing:
            return f"{' and '.join(missing)} not installed"
        return self.why_not(context)


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


def _why_not_optimum(context: Context) -> str | None:
    if context.bundle.manifest.controlnets:
        return "the bundle's UNet has inputs for ControlNets, which optimum does not feed"
    return _why_not_text_to_image(context)


def _optimum_options(context: Context) -> dict[str, Any]:
    from .optimum_folder import write_optimum_folder

    write_optimum_folder(context.bundle, context.folder)
    manifest = context.bundle.manifest
    return {
        "folder": str(context.folder),
        "family": manifest.family,
        "precision": manifest.precision,
        "device": context.device,
    }


_US, _ORT, _OPENVINO = "hypersd_contender", ("onnxruntime",), ("openvino",)
_DIFFUSERS = ("diffusers", "transformers", "peft")
_OPENVINO_SUMMARY = "hypersd on OpenVINO, in bfloat16 if the processor supports it"
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
        libraries=("optimum", *_ORT),
        why_not=_why_not_optimum,
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
