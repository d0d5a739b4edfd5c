"""What can draw a bundle's images. Imported in any environment: the modules are named here, not imported."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....errors import RequestError

if TYPE_CHECKING:
    from ....engines import Bundle

OURS = "hypersd"  # what all others are compared with


@dataclasses.dataclass(frozen=True)
class Context:
    """What contenders are made for.

    Attributes:
        bundle: the bundle whose images they draw.
        device: ``"auto"``, ``"cpu"`` or a CUDA device.
        folder: an empty folder, for a contender's own files.
    """

    bundle: Bundle
    device: str
    folder: Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to draw a bundle's images.

    Attributes:
        name: a word of the command line.
        summary: what it is, in one line.
        module: its name; it holds a class ``Drawer`` (:class:`hypersd.tools.bench.drawing.Drawer`).
        options: what ``Drawer`` takes, as JSON has it; called once, right before its process starts.
        libraries: modules without which it cannot run.
        holds_halves: it keeps its weights in two bytes each, whatever the bundle does.
        why_not: why it cannot run here although its libraries are there; None if it can.
        why_not_usual: why it is left out unless it is named; None if it is not.
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
        """Why it cannot run here; None if nothing speaks against it. Another interpreter may have other libraries."""
        missing = [name for name in self.libraries if not has_own_python and importlib.util.find_spec(name) is None]
        if missing:
            return f"{' and '.join(missing)} not installed"
        return self.why_not(context)


def _ours(name: str, summary: str, libraries: tuple[str, ...] = (), **arguments: str) -> Contender:
    def options(context: Context) -> dict[str, Any]:
        return {"bundle": str(context.bundle.root), "device": context.device, **arguments}

    module = f"{__name__}.hypersd"
    usual = _is_the_automatic_choice if arguments == {"backend": "onnxruntime"} else lambda _: None
    return Contender(
        name=name, summary=summary, module=module, options=options, libraries=libraries, why_not_usual=usual
    )


def _is_the_automatic_choice(context: Context) -> str | None:
    from ....engines.load import choose

    chosen = choose(context.bundle, "auto", context.device).backend
    return f"it is what {OURS} takes by itself" if chosen == "onnxruntime" else None


def _one_graph_options(context: Context) -> dict[str, Any]:
    return {"bundle": str(context.bundle.root), "device": context.device}


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
        module=f"{__name__}.diffusers",
        options=options,
        libraries=("diffusers", "transformers", "peft"),
        holds_halves=precision == "bf16",
        why_not=_why_no_compiler if mode == "compiled" else lambda _: None,
    )


def _why_no_compiler(_: Context) -> str | None:
    """torch.compile writes C++ for processors, and asks for these compilers."""
    if any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "g++", "clang++")):
        return None
    return "torch.compile needs a C++ compiler: install g++"


def _optimum_options(context: Context) -> dict[str, Any]:
    from ..optimum_folder import write_optimum_folder

    write_optimum_folder(context.bundle, context.folder)
    manifest = context.bundle.manifest
    return {
        "folder": str(context.folder),
        "family": manifest.family,
        "precision": manifest.precision,
        "device": context.device,
    }


def _why_not_optimum(context: Context) -> str | None:
    from ..optimum_folder import why_not_optimum

    return why_not_optimum(context.bundle.manifest)


CONTENDERS = (
    _ours(OURS, "hypersd, the backend that it takes by itself"),
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
        module=f"{__name__}.one_graph",
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
        module=f"{__name__}.optimum",
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
