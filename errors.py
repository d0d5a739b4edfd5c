"""The errors that users meet. Each message is one line: what was wrong, what was expected, what to do."""

from __future__ import annotations

import contextlib
import errno
import itertools
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: packages whose frames are skipped to find the user's line that a warning is about
PASSED_OVER = ("hypersd", "torch", "contextlib")
# NumPy's tofile, with which onnx_ir writes weights, raises an OSError without errno.
_FULL_IN_WORDS = re.compile(
    r"No space left on device|problem writing element \d+ to file|\d+ requested and \d+ written"
)


class HyperSDError(Exception):
    """Base of every error that this package raises on purpose."""

    exit_code = 1


class UserError(HyperSDError):
    """The input was wrong and the user can correct it: the command line ends with exit code 2."""

    exit_code = 2


class CheckpointError(UserError):
    """The named checkpoint is not known."""


class DownloadError(UserError):
    """The Hub refused the request, or does not have the file."""


class NetworkError(DownloadError):
    """The Hub could not be reached, which is not the user's mistake: the command line ends with exit code 1."""

    exit_code = 1


class WeightsError(UserError):
    """A weight file is missing, is damaged, or has another format or another architecture."""


class BundleError(UserError):
    """A bundle is missing, damaged, altered or written by another version."""


class RequestError(UserError, ValueError):
    """An argument is out of its range; also a ValueError, which library callers expect."""


class EngineError(HyperSDError):
    """An engine failed, or received inputs that it does not accept."""


class DeviceMemoryError(EngineError):
    """The device's memory is exhausted: smaller images need less, and fewer at a time."""


class DeviceError(EngineError, UserError):
    """The requested device does not exist, or the installed packages cannot use it."""

    exit_code = 2


class ExportError(HyperSDError):
    """An exported component failed its checks."""


class VerifyError(HyperSDError):
    """A bundle's images differ from diffusers' images."""


class DiskFullError(UserError):
    """The disk filled up while writing."""


def shortened(text: str, longest: int = 400) -> str:
    """The beginning and the end of a text that a message would not repeat as a whole."""
    if len(text) <= longest:
        return text
    half = (longest - 1) // 2
    return f"{text[:half]}…{text[-half:]}"


def one_line(error: BaseException) -> str:
    """The message of another library's error as one line, long ones shortened; its type if it has no message."""
    return shortened(" ".join(str(error).split())) or type(error).__name__


def shown(value: object) -> str:
    """A value in a message: on one line, as an array is not, and shortened."""
    try:
        return shortened(" ".join(repr(value).split()), 80)
    except ValueError:  # Python writes no integer of more than 4300 digits
        return f"a {type(value).__name__}"


def is_disk_full(error: BaseException) -> bool:
    """Whether a full disk or an exhausted quota is the cause of an error, which libraries wrap in their own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if _FULL_IN_WORDS.search(str(cause)):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def disk_full(place: Path | str, remedy: str) -> DiskFullError:
    """The error of a full disk; ``remedy`` is what helps besides freeing space."""
    return DiskFullError(f"the disk of {place} is full: free some space or {remedy}")


@contextlib.contextmanager
def disk_errors(place: Path, remedy: str) -> Iterator[None]:
    """Say in one line why ``place`` cannot be written, for every OSError of the block.

    Raises:
        DiskFullError: no space is left, or none of the user's quota.
        UserError: the place cannot be written for another reason.
    """
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise disk_full(place, remedy) from error
        raise UserError(f"{place} cannot be written ({error.strerror or error}): {remedy}") from error


def validation_in_words(error: Any) -> tuple[str, str | None]:
    """The first complaint of pydantic's ValidationError (or FastAPI's) in one line, and the name of the field.

    The line does not repeat the input, which may be long or secret.
    """
    first = error.errors()[0]
    path = [str(part) for part in first["loc"] if part != "body"]
    field, where = (path[0][:80] if path else None), ".".join(path)[:120]
    if first["type"] == "json_invalid":
        return 'the body is not valid JSON: expected an object such as {"prompt": "a cat"}', None
    if first["type"] == "extra_forbidden":
        return f"{field!r} is not known: leave it out", field
    if first["type"] == "missing" and field:
        return f"{where} is missing: it is required", field
    message = first["msg"].removeprefix("Value error, ")
    return (f"{where}: {message}", field) if field else (f"the body: {message}: expected a JSON object", None)


def warn_user(message: str, category: type[Warning]) -> None:
    """Warn with the user's own line as the place: Python shows that line, and filters match its module."""
    for level in itertools.count(1):
        frame = sys._getframe(level)
        module = frame.f_globals.get("__name__", "").partition(".")[0]
        if module not in PASSED_OVER or frame.f_back is None:
            warnings.warn(message, category, stacklevel=level + 1)
            return
