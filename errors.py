"""The errors that users meet. Each message is one line: what was wrong, what was expected, what to do."""

from __future__ import annotations

import itertools
import sys
import warnings

#: whose frames lie between what the user wrote and a warning
PASSED_OVER = ("hypersd", "torch", "contextlib")


class HyperSDError(Exception):
    """Base of every error that this package raises on purpose."""

    exit_code = 1


class UserError(HyperSDError):
    """The input was wrong and the user can mend it: the command line ends with exit code 2."""

    exit_code = 2


class CheckpointError(UserError):
    """The named checkpoint is not known."""


class DownloadError(UserError):
    """The Hub refused or has not got what was asked for."""


class NetworkError(DownloadError):
    """The Hub could not be reached: not the user's input, so the command line ends with exit code 1."""

    exit_code = 1


class WeightsError(UserError):
    """A weight file is missing, damaged, of another format or of another model."""


class BundleError(UserError):
    """A bundle is missing, damaged, altered or written by another version."""


class RequestError(UserError, ValueError):
    """An argument is out of its range. Also a ValueError, as library callers expect."""


class EngineError(HyperSDError):
    """An engine failed, or was fed what it does not take."""


class DeviceError(EngineError, UserError):
    """The device that was asked for is not here, or the installed packages cannot use it."""

    exit_code = 2


class ExportError(HyperSDError):
    """An exported network failed its checks."""


class VerifyError(HyperSDError):
    """A bundle's images are not those of diffusers."""


class DiskFullError(UserError):
    """The disk filled up while writing."""


def one_line(error: BaseException) -> str:
    """Another library's error as one line."""
    return " ".join(str(error).split()) or type(error).__name__


def warn_user(message: str, category: type[Warning]) -> None:
    """Warn of the line outside this package that led here: Python shows it, and filters go by its module."""
    for level in itertools.count(1):
        frame = sys._getframe(level)
        module = frame.f_globals.get("__name__", "").partition(".")[0]
        if module not in PASSED_OVER or frame.f_back is None:
            warnings.warn(message, category, stacklevel=level + 1)
            return
