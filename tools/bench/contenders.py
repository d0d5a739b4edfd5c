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
    """Bundle, device and folder that contenders are made for.

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
        holds_halves: it keeps its weights in two bytes each, whatever the bundle does.
        why_not: gives the reason why it cannot run here although its libraries are there; None if it can.
        why_not_usual: gives the reason why it is left out unless it is named; None if it is not.
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


def _ours(name: str, summary: str, libraries: tuple[str, ...] = (), **arguments: str) -> Contender:
    def options(context: Context) -> dict[str, Any]:
        return {"bundle": str(context.bundle.root), "device": context.device, **arguments}

    module = f"{__package__}.hypersd_contender"
    usual = _is_the_automatic_choice if arguments == {"backend": "onnxruntime"} else lambda _: None
    return Contender(
        name=name, summary=summary, module=module, options=options, libraries=libraries, why_not_usual=usual
    )


def _is_the_automatic_choice(context: Context) -> str | None:
    from ...engines.load import choose

    chosen = choose(context.bundle, "auto", context.device).backend
    return f"{OURS} chooses the same backend" if chosen == "onnxruntime" else None


def _one_graph_options(context: Context) -> dict[str, Any]:
    return {"bundle": str(context.bundle.root), "device": context.device, "is_one_graph": True}


def _why_no_one_graph(context: Context) -> str | None:
    has = context.bundle.manifest.one_graphs
    return None if has else "the bundle has no graph of the whole image: export it with --one-graph"


def _diffusers(name: str, summary: str, precision: str, mode: str) -> Contender:
    def options(context: Context) -> dict[str, Any]:
        bundle = str(context.bundle.root)
        return {"bundle": bundle, "device": context.device, "precision": precision, "mode": mode}

    return Contender(
        name=name,
        summary=summary,
        module=f"{__package__}.diffusers_contender",
        options=options,
        libraries=("diffusers", "transformers", "peft"),
        holds_halves=precision == "bf16",
        why_not=_why_no_compiler if mode == "compiled" else lambda _: None,
    )


def _why_no_compiler(_: Context) -> str | None:
    """torch.compile writes C++ for processors and looks for these compilers."""
    if any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "g++", "clang++")):
        return None
    return "torch.compile needs a C++ compiler: install g++"


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


def _why_not_optimum(context: Context) -> str | None:
    from .optimum_folder import why_not_optimum

    return why_not_optimum(context.bundle.manifest)


CONTENDERS = (
    _ours(OURS, "hypersd on the backend that it chooses"),
    _ours("hypersd-onnxruntime", "hypersd on ONNX Runtime", ("onnxruntime",), backend="onnxruntime"),
    _ours(
        "hypersd-openvino",
        "hypersd on OpenVINO, in bfloat16 if the processor has it",
        ("openvino",),
        backend="openvino",
    ),
    _ours(
        "hypersd-openvino-fp32", "hypersd on OpenVINO in float32", ("openvino",), backend="openvino", precision="fp32"
    ),
    Contender(
        name="hypersd-one-graph",
        summary="hypersd's graph of the whole image on ONNX Runtime",
        module=f"{__package__}.hypersd_contender",
        options=_one_graph_options,
        libraries=("onnxruntime",),
        why_not=_why_no_one_graph,
    ),
    _diffusers("diffusers", "diffusers, eager (on a CPU in float32)", "bundle", "eager"),
    _diffusers("diffusers-bf16", "diffusers, eager, in bfloat16", "bf16", "eager"),
    _diffusers("diffusers-compiled", "diffusers, UNet and decoder through torch.compile", "bundle", "compiled"),
    _diffusers("diffusers-compiled-bf16", "the same in bfloat16", "bf16", "compiled"),
    Contender(
        name="optimum",
        summary="optimum-onnx on the bundle's own ONNX files",
        module=f"{__package__}.optimum_contender",
        options=_optimum_options,
        libraries=("optimum", "onnxruntime"),
        why_not=_why_not_optimum,
    ),
)


def find_contender(name: str) -> Contender:
    """A contender by its name.

    Raises:
        RequestError: there is none of that name; the message lists all.
    """
    for contender in CONTENDERS:
        if contender.name == name:
            return contender
    raise RequestError(f"contender {name!r} is not known: expected one of {', '.join(c.name for c in CONTENDERS)}")


def choose_contenders(
    bundle: Bundle, device: str, named: Sequence[str], pythons: Mapping[str, str]
) -> tuple[list[Contender], list[str]]:
    """Choose the contenders, the baseline first, and say in one line each why some are left out.

    The baseline is hypersd; if only some of hypersd's backends are named, it is the first of them.

    Raises:
        RequestError: one that was named is not known or cannot run here, or an interpreter does not run.
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
