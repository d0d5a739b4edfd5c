"""The figures of `hypersd verify` as a file, which a bundle's model card shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from ..engines.bundle import Bundle
from ..engines.files import sha256_file
from ..engines.manifest import MANIFEST_NAME

FIGURES = "figures.json"  # in the folder of the pairs


class ImageFigures(msgspec.Struct, frozen=True, kw_only=True):
    """An image's difference from diffusers': PSNR in dB (None: equal), largest error in parts of full scale.

    ``starts_from`` is ``"noise"``, ``"image"`` or ``"mask"``.
    """

    prompt: str
    seed: int
    controlnets: tuple[str, ...] = ()
    starts_from: str = "noise"
    psnr: float | None
    largest: float


class VerifyFigures(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one run; ``manifest`` is the SHA-256 of the ``bundle.json`` that was compared."""

    manifest: str
    backend: str
    images: tuple[ImageFigures, ...]


def write_figures(file: Path, bundle: Bundle, backend: str, images: Sequence[ImageFigures]) -> None:
    """Write the figures of a bundle's images, which were made on ``backend``."""
    figures = VerifyFigures(manifest=_digest(bundle), backend=backend, images=tuple(images))
    file.write_bytes(msgspec.json.format(msgspec.json.encode(figures), indent=2) + b"\n")


def read_figures(file: Path, bundle: Bundle) -> VerifyFigures | None:
    """The figures in a file; None if it is not there, holds something else, or is about another bundle."""
    try:
        figures = msgspec.json.decode(file.read_bytes(), type=VerifyFigures)
    except (OSError, msgspec.DecodeError):
        return None
    return figures if figures.manifest == _digest(bundle) else None


def _digest(bundle: Bundle) -> str:
    return sha256_file(bundle.root / MANIFEST_NAME)
