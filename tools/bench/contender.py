"""A contender of the bench: its name, its process and the reasons why it may not run."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...engines import Bundle
    from .protocol import Settings


@dataclasses.dataclass(frozen=True)
class Context:
    """Bundle, device and folder of a contender.

    Attributes:
        bundle: the bundle whose images they generate.
        device: ``"auto"``, ``"cpu"`` or a CUDA device.
        folder: an empty folder, for a contender's own files.
        image: the first image, whose size and guidance all have; None before a contender is started.
    """

    bundle: Bundle
    device: str
    folder: Path
    image: Settings | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to generate a bundle's images.

    Attributes:
        name: the name on the command line.
        summary: one line.
        module: name of the module with its class ``Runner`` (:class:`hypersd.tools.bench.protocol.Runner`).
        options: makes the arguments of ``Runner``, in JSON's types; called once, right before its process starts.
        libraries: modules that it requires.
        preparation: name of a module whose function ``prepare`` makes the contender's files from the same arguments, in
            a process that ends before the contender's starts; None if nothing is to be made.
        takes_noise: it cannot draw the noise of a seed as the others do: each image's is handed over.
        holds_halves: it keeps its weights in two bytes each, for any bundle.
        why_not: the reason why it cannot run here although its libraries are installed; None if it can.
        why_not_usual: the reason why it is left out unless it is named; None if it takes part.
    """

    name: str
    summary: str
    module: str
    options: Callable[[Context], Mapping[str, Any]]
    libraries: tuple[str, ...] = ()
    preparation: str | None = None
    takes_noise: bool = False
    holds_halves: bool = False
    why_not: Callable[[Context], str | None] = lambda _: None
    why_not_usual: Callable[[Context], str | None] = lambda _: None

    def why_not_here(self, context: Context, has_own_python: bool) -> str | None:
        """The reason why it cannot run here; None if it can. Another interpreter may have other libraries."""
        missing = [name for name in self.libraries if not has_own_python and not _is_installed(name)]
        if missing:
            return f"{' and '.join(missing)} not installed"
        return self.why_not(context)


def _is_installed(library: str) -> bool:
    """Whether a module can be imported, also one inside a package that is not there."""
    try:
        return importlib.util.find_spec(library) is not None
    except ModuleNotFoundError:
        return False
