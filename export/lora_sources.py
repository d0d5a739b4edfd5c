"""LoRAs that are added to the Hyper-SD checkpoint: where the user says they are, and their files."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path

from ..engines.progress import DownloadProgress
from ..errors import RequestError, WeightsError
from ..weights.peft_settings import CONFIG_NAME, WEIGHTS_NAME
from ..weights.safetensors_file import SafetensorsFile
from .repositories import Found, LocalFolder, open_files

USUAL_NAMES = ("pytorch_lora_weights.safetensors", WEIGHTS_NAME)  # diffusers' and peft's
LARGEST_SCALE = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraSource:
    """A LoRA as the user names it.

    Attributes:
        location: a file, a folder, a Hub repository or a file in one (``owner/name/file.safetensors``).
        scale: factor on top of the LoRA's own alpha/rank.
        revision: branch, tag or commit on the Hub.
    """

    location: str
    scale: float = 1.0
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> LoraSource:
        """``WHERE`` or ``WHERE:SCALE``.

        Raises:
            RequestError: SCALE is no number, or out of range.
        """
        location, separator, scale = text.rpartition(":")
        if os.path.exists(text) or not separator:
            return cls(location=text)
        try:
            source = cls(location=location, scale=float(scale))
        except ValueError:
            raise RequestError(
                f"--add-lora {text}: {scale!r} is no scale: expected WHERE:SCALE, such as x:0.8"
            ) from None
        check_scale(source.scale, f"--add-lora {text}: the scale")
        return source


@dataclasses.dataclass(frozen=True)
class AddedLora:
    """A LoRA on this machine.

    Attributes:
        files: the LoRA, and peft's configuration if one is beside it.
        scale: factor on top of the LoRA's own alpha/rank.
    """

    files: tuple[Found, ...]
    scale: float


def check_scale(scale: float, title: str) -> None:
    """Reject a scale that is out of range, or that adds nothing.

    Raises:
        RequestError: the message begins with ``title``.
    """
    if not math.isfinite(scale) or abs(scale) > LARGEST_SCALE:
        raise RequestError(f"{title} {scale} is out of range: expected -10 to 10, usually 1")
    if scale == 0:
        raise RequestError(f"{title} 0 adds nothing of the LoRA: leave the LoRA out, or take another scale, usually 1")


def find_added(source: LoraSource, progress: DownloadProgress | None) -> AddedLora:
    """Find the files of a LoRA, and download them if they are on the Hub.

    Raises:
        WeightsError: there is no such file, or several and none is named.
        DownloadError: it could not be downloaded.
    """
    location = source.location
    is_file = os.path.isfile(location) or (location.endswith(".safetensors") and location.count("/") < 2)
    found = local_file(location, "--add-lora") if is_file else _find_in_place(source, progress)
    return AddedLora(with_settings(found), source.scale)


def local_file(location: str, option: str) -> Found:
    """A weight file on this machine, whole.

    Raises:
        WeightsError: there is none, or it is damaged; the message names ``option``.
    """
    path = Path(location)
    if not path.is_file():
        raise WeightsError(f"{option} {location!r} is not a file: expected a .safetensors file")
    SafetensorsFile(path)  # rejects a damaged file
    return Found(path, path.name)


def with_settings(lora: Found) -> tuple[Found, ...]:
    """The file, and peft's configuration beside it: alphas are there, and in no tensor."""
    if lora.path.name != WEIGHTS_NAME or not (config := lora.path.with_name(CONFIG_NAME)).is_file():
        return (lora,)
    filename = lora.filename.removesuffix(WEIGHTS_NAME) + CONFIG_NAME
    return lora, Found(config, filename, lora.repo, lora.revision)


def _find_in_place(source: LoraSource, progress: DownloadProgress | None) -> Found:
    """The LoRA in a folder or repository: the file that is named, the usual one, or a folder's only one."""
    place, filename = source.location, None
    parts = source.location.split("/")
    if not os.path.isdir(place) and len(parts) > 2 and parts[-1].endswith(".safetensors"):
        place, filename = "/".join(parts[:2]), "/".join(parts[2:])
    files = open_files(place, source.revision, progress, "--add-lora")
    names = [filename] if filename else [*USUAL_NAMES]
    if isinstance(files, LocalFolder):
        others = sorted(path.name for path in files.root.glob("*.safetensors"))
        names += others if len(others) == 1 else []
    found = next((found for name in names if (found := files.find(name))), None)
    if found is None:
        wanted = filename or f"{' or '.join(USUAL_NAMES)}: name the file, as in {place}/FILE.safetensors"
        raise WeightsError(f"--add-lora {source.location}: {files.name} has no {wanted}")
    if found.path.name == WEIGHTS_NAME:
        files.find(found.filename.removesuffix(WEIGHTS_NAME) + CONFIG_NAME)  # fetched beside it
    return found
