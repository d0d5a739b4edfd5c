"""The model repository for Triton Inference Server."""

from __future__ import annotations

import os
from pathlib import Path

from ..engines import Bundle
from ..engines.files import write_whole
from ..errors import RequestError, UserError
from .config import config_text

VERSION = "1"
CONFIG_NAME = "config.pbtxt"
MODEL_NAME = "model.py"
MODEL = '''\
"""The model that Triton runs; hypersd must be installed for Triton's Python."""

import triton_python_backend_utils

from hypersd.triton_backend.model import Model


class TritonPythonModel(Model):
    utils = triton_python_backend_utils
'''


def check_repository(folder: Path, bundle: Path | None) -> None:
    """Reject an impossible model repository early; ``bundle`` is None if its place is not chosen yet.

    Raises:
        RequestError: it is a file, or inside the bundle, which must hold nothing executable.
    """
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"--triton {folder} is a file: expected a folder")
    if bundle is None:
        return
    places = folder.resolve(), (folder / bundle.resolve().name).resolve()  # the repository, and the model in it
    if any(place.is_relative_to(bundle.resolve()) for place in places):
        raise RequestError(f"--triton {folder} is inside the bundle {bundle}: expected a folder of its own")


def write_repository(bundle: Bundle, folder: Path, replace: bool = False) -> Path:
    """Add a bundle to a model repository, which is created if it does not exist.

    The model has the name of the bundle's folder. It finds the bundle by a path relative to its own folder: both can be
    moved together.

    Args:
        bundle: stays where it is; nothing is copied.
        folder: the repository, which may contain other models.
        replace: overwrite a configuration that differs.

    Returns:
        The model's folder.

    Raises:
        RequestError: the repository is inside the bundle.
        UserError: it cannot be written, or has a different configuration for a model of this name.
    """
    check_repository(folder, bundle.root)
    root = bundle.root.resolve()
    model = folder / root.name
    parameters = {"bundle": Path(os.path.relpath(root, model.resolve())).as_posix(), "backend": "auto"}
    if bundle.manifest.lora_slot:
        parameters["lora_folder"] = ""  # none: for the user to fill in
    text = config_text(root.name, bundle.manifest, parameters)
    try:
        _check_same(model / CONFIG_NAME, text, replace)
        (model / VERSION).mkdir(parents=True, exist_ok=True)
        write_whole(model / VERSION / MODEL_NAME, MODEL.encode())
        write_whole(model / CONFIG_NAME, text.encode())
    except OSError as error:
        raise UserError(f"{model} cannot be written: {error.strerror or error}; choose another --triton") from error
    return model


def _check_same(config: Path, text: str, replace: bool) -> None:
    """Reject overwriting a configuration that a user may have changed."""
    if config.exists() and not replace and config.read_bytes() != text.encode():
        raise UserError(f"{config} differs from the new configuration: keep it, or overwrite it with --replace")
